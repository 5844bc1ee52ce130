"""Compiled pipelines: equal pictures, no needless recompilation, and refused settings.

Most tests trace with the backend "eager", which traces at the same times but generates no machine code.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines.tiny import difference, pair, seeded
from torch._dynamo.utils import counters

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline
from kandinsky22.errors import InputError, MissingDependencyError
from kandinsky22.kernels import conv, linear
from kandinsky22.kernels.linear import ONEDNN_DTYPES, packing_layers
from kandinsky22.runtime import compile as compilation

TRACED = {"backend": "eager"}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    shapes: Any = importlib.import_module("torch.fx.experimental._config")
    assert shapes.use_duck_shape is True
    yield
    assert shapes.use_duck_shape is True, "torch's settings are changed during calls only"


@pytest.fixture
def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack no weights, as on GPUs: blocks are single graphs, and memory layouts do not depend on sizes."""
    monkeypatch.setattr(compilation, "ONEDNN_DTYPES", ())
    for module in (linear, conv):
        monkeypatch.setattr(module, "may_pack", lambda layer: False)


def generate(pipe: Any, steps: int = 2, **arguments: Any) -> torch.Tensor:
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": steps, "output_type": "pt"}
    return pipe(**{**pair(), **options, "generator": seeded(3), **arguments}).images.float()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_only_new_sizes_are_recompiled(decoder: KandinskyV22Pipeline) -> None:
    baseline = generate(decoder)
    decoder.compile(**TRACED)
    assert difference(generate(decoder, steps=1), generate(decoder, steps=1)) == 0
    first = graphs()
    assert first > 0
    assert difference(generate(decoder), baseline) < 1e-5
    generate(decoder, steps=5, guidance_scale=2.0, **pair(seed=7))
    assert graphs() == first
    generate(decoder, width=128)
    wide = graphs()
    assert wide > first
    generate(decoder)
    generate(decoder, width=128)
    assert graphs() == wide


@pytest.mark.slow
@pytest.mark.skipif(not ONEDNN_DTYPES, reason="this torch has no packed products on this machine")
def test_packed_layers_stay_outside_graphs_in_any_order(decoder: KandinskyV22Pipeline) -> None:
    for prepare in (lambda: None, decoder.enable_low_memory):
        prepare()
        decoder.compile(**TRACED)
        layers = list(packing_layers(decoder.unet))
        assert layers
        assert all("_outside_graphs" in vars(layer) for layer in layers)
        decoder.uncompile()
        assert not any("_outside_graphs" in vars(layer) for layer in layers)


def test_dynamic_code_serves_all_sizes(decoder: KandinskyV22Pipeline, no_packing: None) -> None:
    decoder.compile(dynamic=True, components=["unet"], **TRACED)
    generate(decoder, steps=1)
    first = graphs()
    baseline = copy.deepcopy(decoder.unet)
    for height, width in ((128, 64), (64, 192), (192, 192)):
        compiled = generate(decoder, steps=1, height=height, width=width)
        other = KandinskyV22Pipeline(**{**decoder.components, "unet": baseline})
        assert difference(compiled, generate(other, steps=1, height=height, width=width)) < 1e-4
    assert graphs() == first


@pytest.mark.slow
def test_prompt_lengths_cause_no_recompilation(prior: KandinskyV22PriorPipeline, no_packing: None) -> None:
    def embed(prompt: str) -> torch.Tensor:
        return prior(prompt, num_inference_steps=3, generator=seeded(1)).image_embeds

    prompts = ["a red cat", "a cat", "a red cat on a red cat and a cat"]
    baseline = [embed(prompt) for prompt in prompts]
    prior.compile(**TRACED)
    assert difference(embed(prompts[0]), baseline[0]) < 1e-5
    first = graphs()
    for prompt, expected in zip(prompts, baseline, strict=True):
        assert difference(embed(prompt), expected) < 1e-5
    assert graphs() == first > 0


def test_names_and_files_stay(decoder: KandinskyV22Pipeline, tmp_path: Path) -> None:
    names = list(decoder.unet.state_dict())
    decoder.compile(**TRACED)
    compiled = generate(decoder)
    assert list(decoder.unet.state_dict()) == names
    decoder.save_pretrained(tmp_path)
    again = KandinskyV22Pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert difference(generate(again), compiled) < 1e-5


def test_copies_compute_with_their_own_weights(decoder: KandinskyV22Pipeline) -> None:
    decoder.compile(**TRACED)
    twin = copy.deepcopy(decoder.unet)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        condition = twin.encode_condition(pair()["image_embeds"])
        assert twin.denoise(torch.ones(1, 4, 8, 8), 5, condition).abs().max() == 0


def test_uncompiled_networks_run_as_written(decoder: KandinskyV22Pipeline) -> None:
    baseline = generate(decoder)
    decoder.compile(**TRACED)
    decoder.uncompile()
    assert torch.equal(generate(decoder), baseline)
    assert graphs() == 0


@pytest.mark.slow
def test_feature_caching_compiles_each_level_once(decoder: KandinskyV22Pipeline) -> None:
    decoder.enable_feature_caching(every=2)
    baseline = generate(decoder, steps=4)
    decoder.compile(components=["unet"], **TRACED)
    generate(decoder, steps=1)
    first = graphs()
    assert difference(generate(decoder, steps=4), baseline) < 1e-4
    assert graphs() == first


def test_all_networks_of_a_combined_pipeline_are_compiled(combined: KandinskyV22CombinedPipeline) -> None:
    combined.compile(**TRACED)
    for name in ("unet", "movq", "prior_prior"):
        network = combined.components[name]
        assert all(
            module._compiled_call_impl is not None
            for module in network.modules()
            if isinstance(module, network.compiled_blocks)
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "fast"}, "mode='fast' is invalid: expected one of default, reduce-overhead"),
        (
            {"mode": "reduce-overhead"},
            "mode='reduce-overhead' is invalid: expected default .*because unet is on cpu; .*CUDA graphs",
        ),
        ({"backend": "gcc"}, "backend='gcc' is invalid: expected one of .*inductor"),
        ({"dynamic": 1}, "dynamic=1 is invalid: expected True or False"),
        ({"components": ["scheduler"]}, r"components=\['scheduler'\] is invalid: .*can be compiled \(unet, movq\)"),
    ],
)
def test_invalid_settings_are_refused(decoder: KandinskyV22Pipeline, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        decoder.compile(**arguments)
    assert all(module._compiled_call_impl is None for module in decoder.unet.modules())


def test_networks_offloaded_layer_by_layer_are_refused(decoder: KandinskyV22Pipeline) -> None:
    decoder.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(InputError, match="unet is offloaded layer by layer"):
        decoder.compile(**TRACED)


def test_missing_compiler_error_says_what_to_install(decoder: KandinskyV22Pipeline) -> None:
    from torch._inductor import config

    # monkeypatch cannot restore torch's initial value.
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(MissingDependencyError, match="install g"):
        decoder.compile()


@pytest.mark.slow
def test_machine_code_gives_equal_results_and_is_cached(
    prior: KandinskyV22PriorPipeline, no_packing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # monkeypatch restores it
    baseline = prior("a red cat", num_inference_steps=2, generator=seeded(1)).image_embeds
    prior.compile(cache_dir=tmp_path)
    compiled = prior("a red cat", num_inference_steps=2, generator=seeded(1)).image_embeds
    assert 0 < graphs() <= 4
    assert difference(compiled, baseline) < 1e-5
    assert any(tmp_path.rglob("*.so"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("every", [1, 2])
def test_on_a_gpu_compiled_pictures_are_the_same(decoder: KandinskyV22Pipeline, mode: str, every: int) -> None:
    decoder.to("cuda")
    decoder.enable_feature_caching(every=every)
    baseline = generate(decoder, steps=6)
    decoder.compile(mode=mode)
    generate(decoder, steps=3)
    first = graphs()
    for _ in range(3):
        assert difference(generate(decoder, steps=6).cpu(), baseline.cpu()) < 1e-3
    assert graphs() == first
