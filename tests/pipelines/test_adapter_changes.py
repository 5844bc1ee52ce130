"""Changes below loaded adapters: weights that are loaded, and adapters that replace others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.adapted import merge_by_hand, same, state, tensors_for
from torch import Tensor, nn

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline

WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "none": lambda unet: unet,
    "parent": lambda unet: nn.ModuleDict({"unet": unet, "head": nn.Linear(2, 2)}),
    "compiled": lambda unet: torch.compile(unet, backend="eager"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_loaded_below_active_adapters(decoder: KandinskyV22Pipeline, wrapper: str, assign: bool) -> None:
    wrap, other = WRAPPERS[wrapper], copy.deepcopy(decoder.unet)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    expected = state(merge_by_hand(KandinskyV22Pipeline.from_pipe(decoder, unet=other), (0, 1.0)))
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    wrap(decoder.unet).load_state_dict(wrap(copy.deepcopy(other)).state_dict(), assign=assign)
    loaded = state(decoder)
    assert all(torch.allclose(loaded[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert decoder.get_active_adapters() == ["style"] and same(decoder.unet.state_dict(), other.state_dict())
    decoder.unload_lora_weights()
    assert same(dict(decoder.unet.named_parameters()), other.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["low rank", "whole weights"])
def test_a_round_trip_of_weights_with_fused_adapters_changes_nothing(
    decoder: KandinskyV22Pipeline, wrapper: str, assign: bool, kind: str
) -> None:
    plain, tensors = state(decoder), tensors_for(decoder)
    if kind == "whole weights":
        tensors = {f"unet.{name}": value * 1.1 for name, value in decoder.unet.state_dict().items()}
    decoder.load_lora_weights(tensors, adapter_name="fused")
    decoder.fuse_lora()
    decoder.load_lora_weights(tensors_for(decoder, 1), adapter_name="active")
    before = state(decoder)
    parent = WRAPPERS[wrapper](decoder.unet)
    for stored in (parent.state_dict(), copy.deepcopy(parent.state_dict())):
        parent.load_state_dict(stored, assign=assign)
        assert same(state(decoder), before)
        assert decoder.fused_loras == {"fused"} and decoder.get_active_adapters() == ["active"]
    decoder.unfuse_lora()
    decoder.unload_lora_weights()
    assert same(state(decoder), plain)


def test_fused_adapters_are_no_longer_known_after_other_weights_were_loaded(decoder: KandinskyV22Pipeline) -> None:
    other = {name: tensor * 1.01 for name, tensor in decoder.unet.state_dict().items()}
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="fused")
    decoder.fuse_lora()
    decoder.load_lora_weights(tensors_for(decoder, 1), adapter_name="active")
    decoder.unet.load_state_dict(other)
    assert same(decoder.unet.state_dict(), other)
    assert decoder.get_list_adapters() == {"unet": ["active"]} and decoder.num_fused_loras == 0
    decoder.unfuse_lora()
    decoder.unload_lora_weights()
    assert same(state(decoder), {f"unet.{name}": tensor for name, tensor in other.items()})


@pytest.mark.parametrize("stored", [{"unknown": torch.zeros(1)}, {"conv_in.weight": torch.zeros(1)}, {}, 5], ids=str)
def test_a_failed_load_of_weights_changes_nothing(decoder: KandinskyV22Pipeline, stored: Any) -> None:
    plain = state(decoder)
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="fused")
    decoder.fuse_lora(lora_scale=0.5)
    decoder.load_lora_weights(tensors_for(decoder, 1), adapter_name="active")
    before = state(decoder)
    for parent in (decoder.unet, nn.ModuleDict({"unet": decoder.unet})):
        with pytest.raises((RuntimeError, TypeError)):
            parent.load_state_dict(stored)
        assert same(state(decoder), before)
        assert decoder.fused_loras == {"fused"} and decoder.get_active_adapters() == ["active"]
    decoder.unload_lora_weights()
    decoder.unfuse_lora()
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="again")
    assert not same(state(decoder), plain)


def test_a_load_that_another_module_stops_is_made_good(decoder: KandinskyV22Pipeline) -> None:
    class Broken(nn.Module):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise KeyError("broken")

    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    before = state(decoder)
    decoder.unet.conv_out.add_module("broken", Broken())
    with pytest.raises(KeyError):
        decoder.unet.load_state_dict({}, strict=False)
    assert same(state(decoder), before) and decoder.get_active_adapters() == ["style"]
    with pytest.raises(KeyError):
        nn.ModuleDict({"unet": decoder.unet}).load_state_dict({}, strict=False)
    assert decoder.get_active_adapters() == [], "nothing is said to be applied that is not"
    del decoder.unet.conv_out.broken
    decoder.unet.load_state_dict({}, strict=False)
    assert same(state(decoder), before) and decoder.get_active_adapters() == ["style"]


def test_a_hotswap_replaces_one_adapter_and_leaves_others_alone(combined: KandinskyV22CombinedPipeline) -> None:
    def of(role: str, seed: int) -> dict[str, Tensor]:
        return {name: value for name, value in tensors_for(combined, seed).items() if name.startswith(f"{role}.")}

    combined.load_lora_weights(of("prior", 0), adapter_name="first")
    combined.load_lora_weights(of("unet", 1), adapter_name="second")
    combined.set_adapters(["first", "second"], [0.5, {"unet": 0.3, "prior": 0.2}])
    combined.load_lora_weights(of("unet", 2) | of("prior", 2), adapter_name="second", hotswap=True)
    swapped = state(combined)
    assert combined.get_list_adapters() == {"unet": ["second"], "prior_prior": ["first", "second"]}
    combined.unload_lora_weights()
    combined.load_lora_weights(of("prior", 0), adapter_name="first")
    combined.load_lora_weights(of("unet", 2) | of("prior", 2), adapter_name="second")
    combined.set_adapters(["first", "second"], [0.5, {"unet": 0.3, "prior": 0.2}])
    assert same(swapped, state(combined))

    # back to the UNet alone, then again to both
    combined.load_lora_weights(of("unet", 1), adapter_name="second", hotswap=True)
    assert combined.get_list_adapters() == {"unet": ["second"], "prior_prior": ["first"]}
    combined.load_lora_weights(of("unet", 2) | of("prior", 2), adapter_name="second", hotswap=True)
    assert same(swapped, state(combined))


def test_a_hotswap_activates_nothing_that_was_not_active(combined: KandinskyV22CombinedPipeline) -> None:
    tensors = tensors_for(combined, 1)
    unet_only = {name: tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    plain = state(combined)
    combined.load_lora_weights(unet_only, adapter_name="style")
    combined.set_adapters([])
    combined.load_lora_weights(tensors, adapter_name="style", hotswap=True)
    assert combined.get_active_adapters() == [] and same(state(combined), plain)
    combined.unload_lora_weights()

    combined.load_lora_weights(unet_only, adapter_name="style")
    combined.disable_lora()
    combined.load_lora_weights(tensors, adapter_name="style", hotswap=True)
    assert same(state(combined), plain), "it is still switched off"
    combined.enable_lora()
    enabled = state(combined)
    combined.unload_lora_weights()
    combined.load_lora_weights(tensors)
    assert same(state(combined), enabled)


def test_a_new_adapter_has_weight_1_whatever_an_earlier_one_of_its_name_had(
    combined: KandinskyV22CombinedPipeline,
) -> None:
    tensors = tensors_for(combined, 1)
    unet_only = {name: tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    for remove in (combined.unload_lora_weights, lambda: combined.delete_adapters("style")):
        combined.load_lora_weights(unet_only, adapter_name="style")
        combined.set_adapters("style", 0.3)
        remove()
        combined.load_lora_weights(unet_only, adapter_name="style")
        combined.load_lora_weights(tensors, adapter_name="style", hotswap=True)
        swapped = state(combined)
        combined.unload_lora_weights()
        combined.load_lora_weights(tensors)
        assert same(state(combined), swapped)
        combined.unload_lora_weights()
