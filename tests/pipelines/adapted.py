"""Adapters for all networks of a tiny pipeline, and the weights that they should give."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tests.pipelines.calls import two_step_call
from tests.pipelines.tiny import seeded
from tests.unit.adapter_layers import Pair, attention_layers, peft_layout, random_pairs
from torch import Tensor, nn


def run(pipe: Any, name: str = "") -> Tensor:
    """Return the first result of a small call of a class."""
    out = pipe(**two_step_call(name), generator=seeded(1))
    return next(iter(vars(out).values())).cpu()


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline that take adapters, by the prefix of their tensors' names."""
    names = {"unet": "unet", "prior": "prior", "prior_prior": "prior"}
    return {role: pipe.components[name] for name, role in names.items() if name in pipe.components}


def all_pairs(pipe: Any, seed: int = 0) -> dict[str, dict[str, Pair]]:
    return {role: random_pairs(each, attention_layers(each), seed=seed) for role, each in networks_of(pipe).items()}


def tensors_for(pipe: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return an adapter for all networks of a pipeline."""
    tensors: dict[str, Tensor] = {}
    for role, pairs in all_pairs(pipe, seed).items():
        tensors |= peft_layout(pairs, f"{role}.")
    return tensors


def merge_by_hand(pipe: Any, *weighted: tuple[int, float]) -> Any:
    """Return a copy of a pipeline whose weights are changed by (seed, weight) of `all_pairs`, in float64."""
    copied = copy.copy(pipe)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            setattr(copied, name, copy.deepcopy(component))
    for role, network in networks_of(copied).items():
        with torch.no_grad():
            for seed, weight in weighted:
                for path, pair in all_pairs(pipe, seed)[role].items():
                    parameter = network.get_parameter(f"{path}.weight")
                    parameter.copy_(parameter.double() + pair.difference(weight))
    return copied


def state(pipe: Any) -> dict[str, Tensor]:
    """Return copies of the weights that the networks compute with."""
    return {
        f"{role}.{name}": parameter.detach().clone()
        for role, network in networks_of(pipe).items()
        for name, parameter in network.named_parameters()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
