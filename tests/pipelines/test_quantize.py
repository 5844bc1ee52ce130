"""Quantized pipelines: in place, shared, saved, loaded, in the low-memory mode, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines.tiny import HAS_AVX512, difference, pair, seeded

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline
from kandinsky22.errors import InputError, MissingDependencyError
from kandinsky22.runtime.quantize import KINDS, kind_of

pytest.importorskip("torchao")


def generate(pipe: Any) -> torch.Tensor:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "generator": seeded(3)}
    if isinstance(pipe, KandinskyV22CombinedPipeline):
        return pipe("a red cat", height=64, width=64, prior_num_inference_steps=2, **options).images.float()
    return pipe(**pair(), height=64, width=64, **options).images.float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_pipeline_is_saved_and_loaded(
    combined: KandinskyV22CombinedPipeline, kind: str, tmp_path: Path
) -> None:
    exact = generate(combined)
    if kind == "int4":
        combined.to(torch.bfloat16)
    combined.quantize(kind)
    parts = combined.components
    assert {name: kind_of(part) for name, part in parts.items() if kind_of_or_none(part)} == {
        "unet": kind,
        "prior_prior": kind,
    }
    quantized = generate(combined)
    assert 1e-4 < difference(quantized, exact) < 0.5
    combined.save_pretrained(tmp_path)
    again = KandinskyV22CombinedPipeline.from_pretrained(tmp_path, torch_dtype=combined.dtype)
    again.set_progress_bar_config(disable=True)
    # results depend, by rounding, on the alignment of weights: an activation between two levels may become the other
    bounds = {"int4": 0.05, "int8-static": 2e-3 if HAS_AVX512 else 5e-3}
    assert difference(generate(again), quantized) < bounds.get(kind, 1e-5)


def kind_of_or_none(part: Any) -> str | None:
    return kind_of(part) if isinstance(part, torch.nn.Module) else None


def test_only_the_components_named_are_quantized(combined: KandinskyV22CombinedPipeline) -> None:
    combined.quantize("int8", components=["prior_prior"])
    assert kind_of(combined.prior_prior) == "int8"
    assert kind_of(combined.unet) is None
    assert combined.prior_pipe.prior is combined.prior_prior


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int8-static"])
def test_quantized_weights_work_in_the_low_memory_mode(
    decoder: KandinskyV22Pipeline, kind: str, tmp_path: Path
) -> None:
    # kernels for upsampled features, which are rounded again, are not computed in the low-memory mode
    tolerance = 0.2 if kind == "int8-static" else 1e-5
    decoder.quantize(kind)
    baseline = generate(decoder)
    decoder.enable_low_memory(tmp_path)  # quantized after loading: written to a temporary file
    assert difference(generate(decoder), baseline) < tolerance
    decoder.remove_all_hooks()
    decoder.save_pretrained(tmp_path / "small")
    again = KandinskyV22Pipeline.from_pretrained(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    again.enable_low_memory()  # read from the quantized checkpoint each time
    assert difference(generate(again), baseline) < tolerance
    assert all(parameter.is_meta for parameter in again.unet.parameters())


@pytest.mark.parametrize(
    ("kind", "components", "words"),
    [
        ("int3", None, "kind='int3' is invalid: expected one of int8, int8-dynamic, int8-static, int4"),
        ("int8", ["movq"], r"components=\['movq'\] is invalid: .*can be quantized \(prior_prior, unet\)"),
        ("int8", ["prior_tokenizer"], r"components=\['prior_tokenizer'\] is invalid: .*can be quantized"),
        ("int4", None, "bfloat16 on CPUs"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_changes(
    combined: KandinskyV22CombinedPipeline, kind: str, components: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        combined.quantize(kind, components)
    assert kind_of(combined.unet) is None
    assert kind_of(combined.prior_prior) is None


def ranges(pipe: Any) -> dict[str, list[float]]:
    layers = pipe.unet.named_modules()
    return {name: layer.input_range.tolist() for name, layer in layers if hasattr(layer, "input_range")}


def test_calibration_by_prompts_and_by_a_function(combined: KandinskyV22CombinedPipeline, tmp_path: Path) -> None:
    combined.save_pretrained(tmp_path)
    results = []
    runs: list[int] = []
    for number in range(3):
        pipe = KandinskyV22CombinedPipeline.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)

        def call(pipe: Any = pipe, number: int = number) -> None:
            runs.append(number)
            generate(pipe)

        calibration = {0: None, 1: ["a red cat", "a dog"], 2: call}[number]
        pipe.quantize("int8-static", calibration=calibration)
        results.append(ranges(pipe))
        assert all(low <= 0 <= high and low < high for low, high in results[-1].values())
    assert runs == [2]
    assert results[0].keys() == results[1].keys() == results[2].keys()
    assert results[0] != results[1] != results[2]


@pytest.mark.parametrize(
    ("kind", "calibration", "words"),
    [
        ("int8", ["a red cat"], "calibration=.* is invalid: expected None for kind='int8'"),
        ("int8-static", "a red cat", "calibration='a red cat' is invalid: expected a list of prompts, a function"),
        ("int8-static", [], r"calibration=\[\] is invalid"),
        ("int8-static", lambda: None, "calibration did not run 39 of 39 layers of UNet2DConditionModel"),
    ],
)
def test_invalid_calibration_is_refused(
    combined: KandinskyV22CombinedPipeline, kind: str, calibration: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        combined.quantize(kind, calibration=calibration)
    assert kind_of(combined.unet) is None
    assert kind_of(combined.prior_prior) is None


def test_offloaded_networks_are_refused(decoder: KandinskyV22Pipeline) -> None:
    decoder.enable_low_memory()
    with pytest.raises(InputError, match=r"unet is offloaded by enable_low_memory\(\); call remove_all_hooks\(\)"):
        decoder.quantize()


def test_quantizing_twice_is_refused(combined: KandinskyV22CombinedPipeline) -> None:
    combined.quantize("int8", components=["unet"])
    with pytest.raises(InputError, match="UNet2DConditionModel is quantized already"):
        combined.quantize("int8", components=["prior_prior", "unet"])
    assert kind_of(combined.prior_prior) is None


def test_missing_torchao_error_names_the_extra(decoder: KandinskyV22Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"kandinsky22\[quantize\]"):
        decoder.quantize()
