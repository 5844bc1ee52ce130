"""Adapters exchanged with PEFT on the reference's networks: equal results in both directions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from tests.unit.adapter_layers import (
    PROJECTIONS,
    attention_layers,
    flat_layout,
    peft_layout,
    processor_layout,
    random_pairs,
)
from tests.unit.tiny_models import TINY_PRIOR, TINY_UNET
from torch import Tensor

from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorPipeline, PriorTransformer, UNet2DConditionModel
from kandinsky22.adapters.files import write_adapter
from kandinsky22.adapters.formats import PRIOR, UNET, match_updates
from kandinsky22.errors import CheckpointError

peft = pytest.importorskip("peft")
TARGETS = {UNET: list(PROJECTIONS), PRIOR: ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in"]}
CONVOLUTIONAL = {UNET: [*PROJECTIONS, "conv1", "conv_shortcut", "time_emb_proj"], PRIOR: TARGETS[PRIOR]}


@pytest.fixture(autouse=True)
def _no_warnings_of_the_reference() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def networks(role: str) -> tuple[Any, Any]:
    """Return the reference's network and ours, with the same weights."""
    if role == UNET:
        theirs, ours = diffusers.UNet2DConditionModel(**TINY_UNET), UNet2DConditionModel(**TINY_UNET)
    else:
        theirs, ours = diffusers.PriorTransformer(**TINY_PRIOR), PriorTransformer(**TINY_PRIOR)
        torch.nn.init.normal_(theirs.positional_embedding)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def pipeline(role: str, network: Any) -> Any:
    """Return a pipeline around one of our networks."""
    if role == UNET:
        return KandinskyV22Pipeline(unet=network, scheduler=None, movq=None)
    names = ("image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor")
    return KandinskyV22PriorPipeline(prior=network, **dict.fromkeys(names))


@torch.no_grad()
def output(role: str, network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if role == UNET:
        sample, embeds = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 16, generator=generator)
        return network(sample, torch.tensor(7), None, added_cond_kwargs={"image_embeds": embeds}).sample
    sample, text = torch.randn(2, 16, generator=generator), torch.randn(2, 16, generator=generator)
    tokens, mask = torch.randn(2, 77, 16, generator=generator), torch.arange(77)[None].repeat(2, 1) < 9
    return network(sample, 7, text, tokens, mask).predicted_image_embedding


def assert_equal_outputs(role: str, ours: Any, theirs: Any) -> None:
    expected = output(role, theirs)
    assert float((output(role, ours) - expected).abs().max() / expected.abs().max()) < 1e-5


def randomise(network: Any) -> None:
    """Replace the zeros that PEFT initialises one factor with."""
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)


@pytest.mark.parametrize("role", [UNET, PRIOR])
@pytest.mark.parametrize("targets", [TARGETS, CONVOLUTIONAL], ids=["attention", "all kinds"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_the_reference_saves_gives_the_same_here(role: str, targets: Any, rslora: bool, tmp_path: Path) -> None:
    theirs, ours = networks(role)
    plain = output(role, theirs)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets[role],
        rank_pattern={"to_q": 2},
        alpha_pattern={"to_k": 3},
        use_rslora=rslora,
    )
    theirs.add_adapter(config)
    randomise(theirs)
    theirs.save_lora_adapter(tmp_path)
    pipe = pipeline(role, ours)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert float((output(role, theirs) - plain).abs().max() / plain.abs().max()) > 0.01
    assert_equal_outputs(role, ours, theirs)
    theirs.set_adapters("default", 0.3)
    pipe.set_adapters("style", 0.3)
    assert_equal_outputs(role, ours, theirs)
    pipe.unload_lora_weights()
    theirs.disable_adapters()
    assert_equal_outputs(role, ours, theirs)


@pytest.mark.parametrize("role", [UNET, PRIOR])
def test_what_peft_saves_gives_the_same_here(role: str, tmp_path: Path) -> None:
    theirs, ours = networks(role)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS[role]))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    pipeline(role, ours).load_lora_weights(tmp_path)
    assert_equal_outputs(role, ours, wrapped)


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_adapters_that_change_the_base_weights_are_read_once_they_are_converted(
    initialisation: str, tmp_path: Path
) -> None:
    """As the message about such adapters advises."""
    theirs, ours = networks(PRIOR)
    plain = output(PRIOR, theirs)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=initialisation)
    wrapped = peft.get_peft_model(theirs, config)
    wrapped.peft_config["default"].init_lora_weights = True  # as PEFT's guide says
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = initialisation
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(2)
    wrapped.save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{initialisation}'"):
        ours.load_lora_adapter(tmp_path / "trained")
    expected = output(PRIOR, wrapped)
    assert float((expected - plain).abs().max() / plain.abs().max()) > 0.01
    initial = str(tmp_path / "initial")
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    ours.load_lora_adapter(tmp_path / "converted")
    assert float((output(PRIOR, ours) - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("role", [UNET, PRIOR])
def test_what_is_saved_here_gives_the_same_there(role: str, tmp_path: Path) -> None:
    theirs, ours = networks(role)
    layers = [path for path in attention_layers(ours) if not path.endswith("proj_in")]
    pairs = random_pairs(ours, layers)
    ranks = {path: 2 if path.endswith("to_q") else 4 for path in layers}
    tensors = flat_layout(pairs, alpha=6.0)
    for path, rank in ranks.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = pairs[path].down[:rank]
        tensors[f"{name}.lora_up.weight"] = pairs[path].up[:, :rank]
    pipe = pipeline(role, ours)
    pipe.load_lora_weights(tensors)
    pipe.save_lora_weights(tmp_path)
    theirs.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_equal_outputs(role, ours, theirs)


@pytest.mark.parametrize("role", [UNET, PRIOR])
def test_methods_of_networks_are_those_of_the_reference(role: str, tmp_path: Path) -> None:
    theirs, ours = networks(role)
    adapters = match_updates(peft_layout(random_pairs(ours, attention_layers(ours))), {role: ours}, origin="file")
    write_adapter(tmp_path, adapters)
    results: list[list[Any]] = []
    for network in (theirs, ours):
        network.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="style")
        active, outputs = network.active_adapters(), [output(role, network)]
        for change in (
            lambda net: net.set_adapters(["style"], weights=[0.5]),
            lambda net: net.disable_lora(),
            lambda net: net.enable_lora(),
            lambda net: net.fuse_lora(),
            lambda net: net.unfuse_lora(),
            lambda net: net.save_lora_adapter(tmp_path / type(net).__module__, adapter_name="style"),
            lambda net: net.delete_adapters("style"),
            lambda net: net.unload_lora(),
        ):
            change(network)
            outputs.append(output(role, network))
        results.append([active, *outputs])
    assert results[0][0] == results[1][0] == ["style"]
    for expected, result in zip(results[0][1:], results[1][1:], strict=True):
        assert float((result - expected).abs().max() / expected.abs().max()) < 1e-5
    ours.load_attn_procs(tmp_path / type(ours).__module__)
    assert torch.equal(output(role, ours), results[1][1])


def test_unfusing_restores_the_weight_of_an_adapter(tmp_path: Path) -> None:
    theirs, ours = networks(UNET)
    adapters = match_updates(peft_layout(random_pairs(ours, attention_layers(ours))), {UNET: ours}, origin="file")
    write_adapter(tmp_path, adapters)
    changes = []
    for network in (theirs, ours):
        network.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        before = output(UNET, network)
        network.fuse_lora(lora_scale=2.0)
        network.unfuse_lora()
        changes.append(float((output(UNET, network) - before).abs().max() / before.abs().max()))
    assert changes[0] > 0.01, "the reference keeps the scale of fusing"
    assert changes[1] == 0


def test_a_file_for_both_networks_loads_there_by_prefix(tmp_path: Path) -> None:
    both = {role: networks(role) for role in (UNET, PRIOR)}
    adapters = {}
    for role, (_, ours) in both.items():
        tensors = peft_layout(random_pairs(ours, attention_layers(ours)))
        adapters |= match_updates(tensors, {role: ours}, origin="file", settings={"r": 4, "lora_alpha": 10})
    write_adapter(tmp_path, adapters)
    for role, (theirs, ours) in both.items():
        theirs.load_lora_adapter(tmp_path, prefix=role, use_safetensors=True)
        pipeline(role, ours).load_lora_weights(tmp_path, prefix=role)
        assert_equal_outputs(role, ours, theirs)


def test_the_old_layout_has_its_whole_effect_here(tmp_path: Path) -> None:
    theirs, ours = networks(UNET)
    pairs = random_pairs(ours, attention_layers(ours))
    save_file(processor_layout(pairs), tmp_path / "pytorch_lora_weights.safetensors")
    partly, _ = networks(UNET)
    partly.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    loaded = [path for path, module in partly.named_modules() if hasattr(module, "lora_A")]
    assert len(loaded) == len(pairs) * 28 // 42, "the reference drops add_k_proj and add_v_proj"
    assert not any("add_" in path for path in loaded)
    pipeline(UNET, ours).load_lora_weights(tmp_path)
    with torch.no_grad():
        for path, pair in pairs.items():
            weight = theirs.get_parameter(f"{path}.weight")
            weight.copy_(weight.double() + pair.difference())
    assert_equal_outputs(UNET, ours, theirs)


def test_two_adapters_and_fusing_as_there(tmp_path: Path) -> None:
    theirs, ours = networks(UNET)
    pipe = pipeline(UNET, ours)
    for seed, name in enumerate(("first", "second")):
        folder = tmp_path / name
        adapters = match_updates(
            peft_layout(random_pairs(ours, attention_layers(ours), seed=seed)), {UNET: ours}, origin=name
        )
        write_adapter(folder, adapters)
        theirs.load_lora_adapter(folder, prefix=None, use_safetensors=True, adapter_name=name)
        pipe.load_lora_weights(folder, adapter_name=name)
        assert theirs.active_adapters() == pipe.get_active_adapters() == [name]
        assert_equal_outputs(UNET, ours, theirs)
    for each in (theirs, pipe):
        each.set_adapters(["first", "second"], [0.7, -0.4])
    assert_equal_outputs(UNET, ours, theirs)
    theirs.fuse_lora(lora_scale=0.5)
    pipe.fuse_lora(lora_scale=0.5)
    assert_equal_outputs(UNET, ours, theirs)
    theirs.unload_lora()
    pipe.unload_lora_weights()
    assert_equal_outputs(UNET, ours, theirs)
