"""Constructors of networks and schedulers, from arguments and from configs."""

from __future__ import annotations

import inspect
import random
from typing import Any

import torch
from tests.fuzz.calls import assert_finite
from tests.fuzz.harness import Case
from tests.fuzz.values import VALUES, any_json, any_value
from tests.fuzz.world import World

import kandinsky22
from kandinsky22.schedulers import __all__ as SCHEDULER_NAMES

# Small arguments of networks, so that a case is fast.
NETWORKS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "layers_per_block": 1,
        "encoder_hid_dim": 32,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
    },
    "VQModel": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "layers_per_block": 1,
        "num_vq_embeddings": 12,
    },
    "PriorTransformer": {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "embedding_dim": 32},
}
SCHEDULERS = sorted(name for name in SCHEDULER_NAMES if hasattr(kandinsky22, name))


class Constructors:
    """Networks and schedulers with one to three unexpected settings; accepted schedulers make all steps.

    Args:
        world: Checkpoints and pipelines; not used.
    """

    name = "constructors"

    def __init__(self, world: World) -> None:
        del world

    def generate(self, rng: random.Random) -> Case:
        """Return a case: a class and settings, as JSON for `from_config` or as names of values for the constructor."""
        name = rng.choice([*NETWORKS, *SCHEDULERS, *SCHEDULERS])
        accepted = list(inspect.signature(getattr(kandinsky22, name)).parameters)
        chosen = rng.sample(accepted, rng.randrange(1, min(4, len(accepted) + 1)))
        if rng.random() < 0.5:
            return {"class": name, "config": {argument: any_json(rng) for argument in chosen}}
        case: Case = {"class": name, "arguments": {argument: any_value(rng) for argument in chosen}}
        if name in SCHEDULERS and rng.random() < 0.4:
            case = {"class": name, "arguments": {}}
            accepted = list(inspect.signature(getattr(kandinsky22, name).set_timesteps).parameters)[1:]
            case["steps"] = {rng.choice(accepted): any_value(rng)}
        return case

    def run(self, case: Case) -> None:
        """Build the object; a scheduler then makes three steps."""
        built = getattr(kandinsky22, case["class"])
        base = NETWORKS.get(case["class"], {})
        if "config" in case:
            instance = built.from_config({**base, **case["config"]})
        else:
            instance = built(**{**base, **{name: VALUES[value]() for name, value in case["arguments"].items()}})
        if case["class"] in NETWORKS:
            return
        steps = {name: VALUES[value]() for name, value in case.get("steps", {"num_inference_steps": "two"}).items()}
        instance.set_timesteps(**{"num_inference_steps": 2, **steps} if "device" in steps else steps)
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, 4, 4, 4, generator=generator) * instance.init_noise_sigma
        accepts_generator = "generator" in inspect.signature(instance.step).parameters
        more = {"generator": generator} if accepts_generator else {}
        for timestep in instance.timesteps[:50]:
            model_input = instance.scale_model_input(sample, timestep)
            sample = instance.step(model_input * 0.1, timestep, sample, **more).prev_sample
        assert_finite(sample)
