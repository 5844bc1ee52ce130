"""Networks act as any torch module: hooks, replaced forwards, compiled forms, wrappers, adapters, computed weights."""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.pipelines.tiny import difference, pair, seeded
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from kandinsky22 import (
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UNet2DConditionModel,
)
from kandinsky22.errors import CheckpointError
from kandinsky22.kernels import conv, linear
from kandinsky22.kernels.conv import Conv2d
from kandinsky22.kernels.linear import apply_linear
from kandinsky22.models.clip import CLIPTextModelWithProjection
from kandinsky22.models.modifications import find_modification
from kandinsky22.runtime.network_state import unwrapped
from kandinsky22.training.finetuning.networks import Encoders

STEPS = 3


@pytest.fixture(autouse=True)
def fast_kernels_for_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tiny layers take the fused code that large ones take."""
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(conv, "MIN_MULTIPLICATIONS", 1)


def decode(pipe: Any, **arguments: Any) -> Tensor:
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(**{**pair(), **options, "generator": seeded(3), **arguments}).images


def embed(pipe: Any, **arguments: Any) -> Tensor:
    return pipe(
        **{"prompt": "a red cat", "num_inference_steps": STEPS, "generator": seeded(3), **arguments}
    ).image_embeds


RUN: dict[str, Callable[..., Tensor]] = {"unet": decode, "prior": embed}


@pytest.fixture(params=["unet", "prior"])
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    name: str = request.param
    return name, request.getfixturevalue("decoder" if name == "unet" else "prior")


def count_calls(network: nn.Module) -> Counter[str]:
    """Count the calls of each module, by name; values are unchanged."""
    calls: Counter[str] = Counter()

    def count(name: str, *_: Any) -> None:
        calls[name] += 1

    for name, module in network.named_modules():
        module.register_forward_hook(functools.partial(count, name))
    return calls


# Towers


class IdsOnly(CLIPTextModelWithProjection):
    """A text tower that knows no argument but the ids."""

    def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
        return super().forward(ids)


def test_towers_whose_config_asks_for_tuples(prior: Any) -> None:
    def results() -> list[Tensor]:
        pipe = type(prior)(**prior.components)  # without stored text encodings
        pipe.set_progress_bar_config(disable=True)
        training = Encoders(
            prior.image_encoder, prior.image_processor, None, prior.text_encoder, prior.tokenizer, torch.device("cpu")
        )
        embeds = [embed(pipe), embed(pipe, prompt="a (red:1.5) cat", prompt_weights=True), pipe.get_zero_embed()]
        return [*embeds, training.zero_embed(), *training.text("a red cat").values()]

    expected = results()
    for tower in (prior.text_encoder, prior.image_encoder):
        tower.config.update({"return_dict": False})
    torch.testing.assert_close(results(), expected, rtol=0, atol=1e-5)
    prior.text_encoder.config.update({"return_dict": True})
    other = IdsOnly(prior.text_encoder.config).eval()
    other.load_state_dict(prior.text_encoder.state_dict())
    prior.text_encoder = other
    torch.testing.assert_close(results(), expected, rtol=0, atol=1e-5)


# Hooks and replaced forwards


def test_hooks_of_a_network_run_at_each_step(case: tuple[str, Any]) -> None:
    name, pipe = case
    network, baseline = pipe.components[name], RUN[case[0]](pipe)
    inputs: list[Any] = []
    outputs: list[Any] = []
    handles = [
        network.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True),
        network.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    assert difference(RUN[name](pipe), baseline) < 1e-4
    assert len(inputs) == len(outputs) == STEPS
    for handle in handles:
        handle.remove()
    assert torch.equal(RUN[name](pipe), baseline)
    assert len(outputs) == STEPS


def test_hooks_change_the_result(case: tuple[str, Any]) -> None:
    name, pipe = case
    network, baseline = pipe.components[name], RUN[case[0]](pipe)

    def negated(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (-output[0],)
        return type(output)(-output.predicted_image_embedding)

    handle = network.register_forward_hook(negated)
    changed = RUN[name](pipe)
    handle.remove()
    assert difference(changed, baseline) > 0.1
    last = network.conv_out if name == "unet" else network.proj_to_clip_embeddings
    with torch.no_grad():
        last.weight.neg_()
        last.bias.neg_()
    assert difference(RUN[name](pipe), changed) < 1e-4


def test_each_module_of_a_network_is_called_at_each_step(case: tuple[str, Any]) -> None:
    """Except containers, which no network calls, and the parts of the hint's and text's projections that are called."""
    name, pipe = case
    network, baseline = pipe.components[name], RUN[case[0]](pipe)
    calls = count_calls(network)
    assert difference(RUN[name](pipe), baseline) < 1e-4
    containers = {path for path, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    expected = {path for path, _ in network.named_modules()} - containers
    assert {path: calls[path] for path in expected} == dict.fromkeys(expected, STEPS)


def test_one_hook_inside_acts(case: tuple[str, Any]) -> None:
    """A hook on one layer alone is called, and what it returns is used: one layer of each kind and position."""
    name, pipe = case
    network, baseline = pipe.components[name], RUN[case[0]](pipe, num_inference_steps=1)
    layers = {re.sub(r"\d+", "#", path): module for path, module in network.named_modules() if module._parameters}
    ignored = []
    for path, layer in layers.items():
        if layer is network:
            continue
        handle = layer.register_forward_hook(lambda module, args, output: output + 0.1 * output.std() + 0.1)
        if torch.equal(RUN[name](pipe, num_inference_steps=1), baseline):
            ignored.append(path)
        handle.remove()
    assert ignored == []
    assert torch.equal(RUN[name](pipe, num_inference_steps=1), baseline)


@pytest.mark.parametrize("kernels", ["fused", "as built"])
def test_hooks_may_store_what_they_receive(case: tuple[str, Any], kernels: str) -> None:
    """Nothing that a hook received is overwritten later, although the networks compute in place without hooks."""
    name, pipe = case
    network, stored = pipe.components[name], list[tuple[Tensor, Tensor]]()

    def store(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [*args, *(output if isinstance(output, tuple) else [output])]
        stored.extend((tensor, tensor.clone()) for tensor in tensors if isinstance(tensor, Tensor))

    for path, module in network.named_modules():
        if kernels == "as built" or path.endswith(("resnets.0", "conv1", "norm2", "conv_norm_out", "attentions.0")):
            module.register_forward_hook(store)
    RUN[name](pipe)
    assert all(torch.equal(tensor, copied) for tensor, copied in stored)
    assert stored or name == "prior"


def test_movq_hooks_may_store_what_they_receive(decoder: KandinskyV22Pipeline) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=seeded(1))
    with torch.no_grad():
        baseline = decoder.movq.decode(latents).sample
        for layer in (*decoder.movq.decoder.modules(), *decoder.movq.encoder.modules()):
            stored = list[tuple[Tensor, Tensor]]()
            handle = layer.register_forward_hook(
                lambda module, args, output, stored=stored: stored.extend(
                    (t, t.clone()) for t in (*args, output) if isinstance(t, Tensor)
                )
            )
            assert difference(decoder.movq.decode(latents).sample, baseline) < 1e-4
            decoder.movq.encode(torch.zeros(1, 3, 32, 32))
            handle.remove()
            assert all(torch.equal(tensor, copied) for tensor, copied in stored)


@pytest.mark.parametrize("path", ["decoder.mid_block.resnets.0.norm1", "decoder.conv_norm_out.norm_layer"])
def test_hooks_of_movq_act_with_tiling(
    path: str, decoder: KandinskyV22Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    latents, movq = torch.randn(1, 4, 8, 8, generator=seeded(1)), decoder.movq
    movq.get_submodule(path).register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        expected = movq.decode(latents).sample
        movq.enable_tiling()
        with caplog.at_level(logging.WARNING):
            assert torch.equal(movq.decode(latents).sample, expected)
    assert f"{path} has hooks" in caplog.text


def test_global_hooks_run(decoder: KandinskyV22Pipeline) -> None:
    seen: list[type] = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        decode(decoder)
    finally:
        handle.remove()
    assert seen.count(UNet2DConditionModel) == STEPS
    assert {nn.Linear, Conv2d} <= set(seen)


def test_hooks_that_a_callback_registers_act(case: tuple[str, Any]) -> None:
    name, pipe = case
    calls: list[int] = []

    def register(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if step == 0:
            pipe.components[name].register_forward_hook(lambda *_: calls.append(1))
        return {}

    RUN[name](pipe, callback_on_step_end=register)
    assert len(calls) == STEPS - 1


def test_a_replaced_forward_runs(case: tuple[str, Any]) -> None:
    name, pipe = case
    network, baseline = pipe.components[name], RUN[case[0]](pipe)
    forward, calls = network.forward, list[dict[str, Any]]()

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(*args, **kwargs)

    network.forward = replaced
    assert difference(RUN[name](pipe), baseline) < 1e-4
    assert len(calls) == STEPS
    del network.forward
    assert torch.equal(RUN[name](pipe), baseline)


def test_a_forward_replaced_inside_runs(case: tuple[str, Any]) -> None:
    name, pipe = case
    network = pipe.components[name]
    paths = (
        ("mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1", "conv_norm_out", "mid_block", "time_embedding")
        if name == "unet"
        else ("transformer_blocks.0.attn1", "transformer_blocks.1", "transformer_blocks.0.ff.net.2", "proj_in")
    )
    for path in paths:
        module, calls = network.get_submodule(path), list[int]()
        forward = module.forward
        module.forward = lambda *args, forward=forward, calls=calls, **kw: (calls.append(1), forward(*args, **kw))[1]
        RUN[name](pipe)
        assert len(calls) == STEPS, path
        del module.forward


def test_a_forward_replaced_in_the_class_runs(case: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name, pipe = case
    kind = type(pipe.components[name])
    forward, calls = kind.forward, list[int]()
    monkeypatch.setattr(kind, "forward", lambda *args, **kw: (calls.append(1), forward(*args, **kw))[1])
    RUN[name](pipe)
    assert len(calls) == STEPS


def test_a_linear_forward_replaced_in_torchs_class_runs(
    prior: KandinskyV22PriorPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = nn.Linear.forward, list[nn.Module]()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])
    embed(prior)
    assert {id(m) for m in prior.prior.modules() if isinstance(m, nn.Linear)} <= {id(m) for m in calls}


def test_subclasses_run_their_own_forward(decoder: KandinskyV22Pipeline) -> None:
    calls: list[int] = []

    class Counting(UNet2DConditionModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().forward(*args, **kwargs)

    baseline, network = decode(decoder), Counting.from_config(decoder.unet.config).eval()
    network.load_state_dict(decoder.unet.state_dict())
    decoder.unet = network
    assert difference(decode(decoder), baseline) < 1e-4
    assert len(calls) == STEPS


@pytest.mark.parametrize("mode", ["Inpaint", "Controlnet"])
def test_hooks_act_in_every_mode(mode: str, make_pipeline: Callable[[str], Any]) -> None:
    pipe, picture = make_pipeline(mode), torch.rand(1, 3, 64, 64, generator=seeded(5))
    assert isinstance(pipe, KandinskyV22InpaintPipeline | KandinskyV22ControlnetPipeline)
    arguments: dict[str, Any] = {"hint": picture}
    if mode == "Inpaint":
        arguments = {"image": picture, "mask_image": (picture[:, 0] > 0.5).float()}
    baseline, calls = decode(pipe, **arguments), count_calls(pipe.unet)
    assert difference(decode(pipe, **arguments), baseline) < 1e-4
    assert calls[""] == calls["add_embedding"] == STEPS
    if mode == "Controlnet":
        assert calls["add_embedding.input_hint_block.0"] == STEPS


def test_what_cannot_act_is_said(decoder: KandinskyV22Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    baseline = decode(decoder)
    decoder.enable_feature_caching(every=2)
    decoder.unet.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING):
        assert difference(decode(decoder), baseline) < 1e-4
    assert "feature caching has no effect, because UNet2DConditionModel has hooks" in caplog.text


# Compiled forms and wrappers


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_networks_run_compiled(case: tuple[str, Any], in_place: bool) -> None:
    name, pipe = case
    graphs: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    baseline, network = RUN[name](pipe), pipe.components[name]
    torch._dynamo.reset()
    if in_place:
        network.compile(backend=backend, fullgraph=True)
    else:
        setattr(pipe, name, torch.compile(network, backend=backend, fullgraph=True))
    assert difference(RUN[name](pipe), baseline) < 1e-4
    assert len(graphs) == 1
    torch._dynamo.reset()


class Wrapper(nn.Module):
    """A module around a network, which the user may have written."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_parallel_wrappers_are_called(case: tuple[str, Any], tmp_path: Path) -> None:
    name, pipe = case
    network, baseline = pipe.components[name], RUN[case[0]](pipe)
    wrapper, calls = nn.DataParallel(network), list[int]()
    wrapper.register_forward_hook(lambda *_: calls.append(1))
    setattr(pipe, name, wrapper)
    assert difference(RUN[name](pipe), baseline) < 1e-4
    assert len(calls) == STEPS
    assert unwrapped(pipe.components[name]) is network
    pipe.save_pretrained(tmp_path)
    saved = type(network).from_pretrained(tmp_path / name)
    assert all(torch.equal(tensor, saved.state_dict()[key]) for key, tensor in network.state_dict().items())


# Replaced layers


class LoRA(nn.Module):
    """A low-rank adapter, as scripts write it: it knows nothing of our layers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0
        if isinstance(layer, nn.Linear):
            self.down, self.up = (
                nn.Linear(layer.in_features, 2, bias=False),
                nn.Linear(2, layer.out_features, bias=False),
            )
        else:
            self.down = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + self.up(self.down(x))

    def merged(self) -> Any:
        layer, down, up = copy.deepcopy(self.layer), self.down.weight, self.up.weight
        change = up @ down if down.ndim == 2 else torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
        layer.weight = nn.Parameter(layer.weight.detach() + change.detach())
        return layer


def replace(network: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[Any], nn.Module]) -> int:
    paths = [path for path, module in network.named_modules() if isinstance(module, kinds)]
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, make(network.get_submodule(path)))
    return len(paths)


@pytest.mark.parametrize("name", ["unet", "prior", "movq"])
def test_replaced_layers_are_called(name: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    pipe = request.getfixturevalue("prior" if name == "prior" else "decoder")
    run = functools.partial(embed, pipe) if name == "prior" else functools.partial(decode, pipe, output_type="pt")
    baseline, network = run(), pipe.components[name]
    assert replace(network, (nn.Linear, nn.Conv2d), LoRA) > 10
    adapted = run()
    adapters = [module for module in network.modules() if isinstance(module, LoRA)]
    unused = [path for path, m in network.named_modules() if isinstance(m, LoRA) and not m.calls]
    assert all(path.startswith(("encoder.", "quant_conv")) for path in unused), "a decoder encodes no image"
    assert difference(adapted, baseline) > 1e-3
    replace(network, (LoRA,), lambda adapter: adapter.merged())
    assert difference(run(), adapted) < 2e-4
    assert adapters


def test_replaced_norms_and_blocks_are_called(decoder: KandinskyV22Pipeline, prior: KandinskyV22PriorPipeline) -> None:
    for pipe, name, kinds in (
        (decoder, "unet", (nn.GroupNorm,)),
        (decoder, "unet", (type(decoder.unet.mid_block.attentions[0]),)),
        (decoder, "unet", (type(decoder.unet.mid_block.resnets[0]),)),
        (decoder, "movq", (nn.GroupNorm,)),
        (prior, "prior", (type(prior.prior.transformer_blocks[0]),)),
        (prior, "prior", (type(prior.prior.transformer_blocks[0].attn1),)),
    ):
        run = functools.partial(RUN.get(name, decode), pipe, **({"output_type": "pt"} if name == "movq" else {}))
        baseline, original = run(), pipe.components[name]
        network = copy.deepcopy(original)
        assert replace(network, kinds, Wrapper) > 0
        setattr(pipe, name, network)
        assert difference(run(), baseline) < 1e-4, (name, kinds)
        setattr(pipe, name, original)


def test_adapters_keep_the_fast_methods(decoder: KandinskyV22Pipeline) -> None:
    replace(decoder.unet, (nn.Linear,), LoRA)
    assert find_modification(decoder.unet) is None


def test_dynamic_quantization_of_torch(prior: KandinskyV22PriorPipeline) -> None:
    baseline = embed(prior)
    quantized = torch.ao.quantization.quantize_dynamic(prior.prior, {nn.Linear}, dtype=torch.qint8)
    layers = [m for m in quantized.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    linears = [m for m in prior.prior.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == len(linears) > 0
    prior.prior = quantized
    assert difference(embed(prior), baseline) < 0.2
    assert not torch.equal(embed(prior), baseline)


# Computed weights


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def effective(network: nn.Module) -> nn.Module:
    """Return a plain network with the weights that the parametrized one computes."""
    plain = type(network).from_config(network.config).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for path, parameter in plain.named_parameters():
            module, _, name = path.rpartition(".")
            parameter.copy_(getattr(network.get_submodule(module), name))
    return plain


def add_weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(0.5)


@pytest.mark.parametrize(
    "attach",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
        add_weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
    ],
    ids=["parametrization", "weight norm", "pruned weight", "pruned bias"],
)
@pytest.mark.parametrize("name", ["unet", "prior", "movq"])
def test_computed_weights_are_used(name: str, attach: Callable[[nn.Module], Any], request: Any) -> None:
    pipe = request.getfixturevalue("prior" if name == "prior" else "decoder")
    run = functools.partial(embed, pipe) if name == "prior" else functools.partial(decode, pipe, output_type="pt")
    baseline, network = run(), copy.deepcopy(pipe.components[name])
    for module in list(network.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm) and module.weight.numel() > 8:
            attach(module)
    setattr(pipe, name, network)
    changed = run()
    assert difference(changed, baseline) > 1e-4
    setattr(pipe, name, effective(network))
    assert difference(run(), changed) < 2e-4


def test_pruned_weights_follow_their_mask(prior: KandinskyV22PriorPipeline) -> None:
    layer = prior.prior.transformer_blocks[0].attn1.to_v
    prune.l1_unstructured(layer, "weight", amount=0.5)
    first = embed(prior)
    with torch.no_grad():
        layer.weight_mask.zero_()
    assert difference(embed(prior), first) > 1e-5


def test_a_layer_with_computed_weights_packs_nothing() -> None:
    layer, features = nn.Linear(16, 16), torch.randn(2, 16)
    parametrize.register_parametrization(layer, "weight", Halved())
    with torch.no_grad():
        result = apply_linear(layer, features)
        assert difference(result, F.linear(features, layer.weight, layer.bias)) < 1e-5
    assert "_packed_weight" not in vars(layer)


def test_networks_are_recognised(decoder: KandinskyV22Pipeline, prior: KandinskyV22PriorPipeline) -> None:
    assert find_modification(decoder.unet) is None
    assert find_modification(prior.prior) is None
    assert find_modification(Wrapper(prior.prior)) == "it is a Wrapper"
    prior.prior.transformer_blocks[0].ff.register_forward_pre_hook(lambda *_: None)
    assert find_modification(prior.prior) == "transformer_blocks.0.ff has hooks"
    decoder.compile(backend="eager")
    assert find_modification(decoder.unet) is None, "a pipeline's compilation goes block by block"
    decoder.unet.mid_block.compile(backend="eager")
    assert find_modification(decoder.unet) == "mid_block has a compiled form"
    assert isinstance(prior.prior, PriorTransformer)


# Saving


@pytest.mark.parametrize("attached", ["parametrization", "pruning", "adapters", "wrapped block", "wrapped network"])
def test_saving_writes_tensors_that_load(attached: str, prior: KandinskyV22PriorPipeline, tmp_path: Path) -> None:
    network = prior.prior
    expected = dict(network.state_dict())
    weight = "transformer_blocks.0.attn1.to_v.weight"
    layer = network.transformer_blocks[0].attn1.to_v
    if attached == "parametrization":
        parametrize.register_parametrization(layer, "weight", Halved())
        expected[weight] = expected[weight] / 2
    elif attached == "pruning":
        prune.l1_unstructured(layer, "weight", amount=0.5)
        expected[weight] = layer.weight
    elif attached == "adapters":
        replace(network, (nn.Linear,), LoRA)
    elif attached == "wrapped block":
        network.transformer_blocks[0] = Wrapper(network.transformer_blocks[0])
    else:
        prior.prior = torch.compile(network, backend="eager")
    prior.save_pretrained(tmp_path)
    saved = PriorTransformer.from_pretrained(tmp_path / "prior").state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in expected.items())


def test_a_network_without_weights_of_its_own_is_not_saved(prior: KandinskyV22PriorPipeline, tmp_path: Path) -> None:
    prior.prior = torch.ao.quantization.quantize_dynamic(prior.prior, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CheckpointError, match=r"PriorTransformer cannot be saved: .*weight"):
        prior.prior.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))
