"""Calls of the ten pipelines, and of their methods, with unexpected arguments."""

from __future__ import annotations

import copy
import inspect
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from tests.fuzz.harness import Case, Escape
from tests.fuzz.values import VALUES, any_value
from tests.fuzz.world import World
from tests.pipelines.calls import DECODERS, TEN, inputs, is_combined
from tests.pipelines.tiny import seeded

import kandinsky22
from kandinsky22 import KandinskyError

# Values that may be right for an argument, next to those of the catalogue.
LIKELY: dict[str, list[Any]] = {
    "prompt": ["a red cat", ["a cat", "red"], "", "cat " * 200, "\ud83d\ude00 é"],
    "negative_prompt": ["blue", ["blue", "red"], ""],
    "height": [32, 20, 64, 1, 96, 10**7, 2**40],
    "width": [32, 33, 64, 1, 10**8],
    "num_inference_steps": [1, 2, 3, 10**4, 10**9],
    "prior_num_inference_steps": [1, 2, 10**9],
    "num_images_per_prompt": [1, 2, 3, 10**7, 2**40],
    "guidance_scale": [0, 1, 1.5, 4, 1e30, -3.0, 3e38],
    "prior_guidance_scale": [0, 1, 4.0, 1e30],
    "guidance_rescale": [0.0, 0.7, 1.0],
    "guidance_interval": [(0.0, 1.0), [0.2, 0.8], (0.5, 0.5)],
    "guidance_threshold": [0.9, 1.0],
    "strength": [0.0, 1e-9, 0.3, 0.5, 1.0],
    "output_type": ["pil", "np", "pt", "latent"],
    "timesteps": [[500, 100], [999], [3, 2, 1, 0]],
    "sigmas": [[10.0, 1.0], [1e30, 1e-30]],
    "return_dict": [True, False],
    "keep_pixels": [True, False],
    "callback_steps": [1, 2],
    "callback_on_step_end_tensor_inputs": [["latents"], []],
    "padding_mask_crop": [0, 1, 4, 10**6, 2**40, -1],
    "prompt_weights": [True, False],
    "weights": [[0.5, 0.5], [1], [1e308, 1e308], [-1.0, 2.0]],
    "images_and_prompts": [["a red cat", "blue"], ["a (red:1.5) cat"], []],
    "latents": [[[0.0]]],
}
# Names of values that may be right for an argument.
LIKELY_VALUES: dict[str, list[str]] = {
    "image": ["picture RGB", "picture LA", "pictures", "picture tall", "tensor picture", "tensor latents"],
    "mask_image": ["mask", "picture L", "picture 1", "picture of one pixel", "array bool", "pictures"],
    "hint": ["tensor picture", "picture RGB", "pictures", "array big-endian"],
    "image_embeds": ["tensor valid embeds", "tensor float16", "tensor huge values", "tensor transposed"],
    "negative_image_embeds": ["tensor valid embeds", "tensor float64", "tensor huge values", "parameter"],
    "latents": ["tensor latents", "tensor huge latents", "tensor valid embeds", "tensor huge values"],
    "callback_on_step_end": ["lambda of everything", "lambda", "function"],
    "callback": ["lambda of everything", "lambda", "function"],
    "generator": ["generator of torch", "none"],
    "device": ["torch device", "text", "2**63", "zero", "surrogate"],
    "dtype": ["dtype", "class"],
    "torch_dtype": ["dtype", "class", "empty dict"],
}


def outcome_tensors(value: Any) -> Iterator[Any]:
    """Yield all arrays and tensors of a result."""
    if isinstance(value, torch.Tensor) and value.is_meta:
        return  # asked for, by a device argument
    if isinstance(value, torch.Tensor | np.ndarray):
        yield value
    elif isinstance(value, PIL.Image.Image):
        yield np.asarray(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from outcome_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from outcome_tensors(item)


def assert_finite(result: Any) -> None:
    """Raise Escape if a result has values that are not finite."""
    for values in outcome_tensors(result):
        array = values.detach().float().numpy() if isinstance(values, torch.Tensor) else values
        if not np.isfinite(array).all():
            raise Escape(f"the result is not finite: {type(values).__name__} {tuple(array.shape)}")


@contextmanager
def no_error_after_a_network(pipe: Any) -> Iterator[None]:
    """Raise Escape if an error about an argument comes after a network ran."""
    ran = []
    hooks = [
        part.register_forward_hook(lambda *_: ran.append(1))
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
    ]
    try:
        yield
    except KandinskyError as error:
        if ran and "finite" not in str(error):
            raise Escape(f"a network ran before this error: {error}") from error
        raise
    finally:
        for hook in hooks:
            hook.remove()


def any_argument(rng: random.Random, argument: str) -> Any:
    """Return a choice for an argument: a value of JSON (``{"json": value}``) or the name of a value."""
    name = argument.removeprefix("prior_")
    likely: list[Any] = [{"json": value} for value in LIKELY.get(argument) or LIKELY.get(name, [])]
    likely += LIKELY_VALUES.get(name, [])
    return rng.choice(likely) if likely and rng.random() < 0.4 else any_value(rng)


def value_of(choice: Any) -> Any:
    """Return the value of a choice."""
    return choice["json"] if isinstance(choice, dict) else VALUES[choice]()


class Calls:
    """Calls with one to three unexpected arguments.

    Args:
        world: Checkpoints and pipelines.
    """

    name = "calls"

    def __init__(self, world: World) -> None:
        self.world = world

    def generate(self, rng: random.Random) -> Case:
        """Return a case: a class, and arguments as JSON (``{"json": value}``) or as names of values."""
        name = rng.choice(TEN)
        accepted = list(inspect.signature(getattr(kandinsky22, name).__call__).parameters)[1:]
        chosen = rng.sample(accepted, rng.randrange(1, 5))
        return {"class": name, "arguments": {argument: any_argument(rng, argument) for argument in chosen}}

    def run(self, case: Case) -> None:
        """Call a pipeline and check that the result is finite."""
        name, pipe = case["class"], self.world.pipeline(case["class"])
        call = self.valid_call(name)
        for argument, choice in case["arguments"].items():
            call[argument] = value_of(choice)
        with no_error_after_a_network(pipe):
            assert_finite(pipe(**call))

    @staticmethod
    def valid_call(name: str) -> dict[str, Any]:
        """Return a short valid call."""
        middle = name.removeprefix("KandinskyV22").removesuffix("Pipeline")
        call = {**inputs(middle), "num_inference_steps": 2, "generator": seeded(0)}
        if "strength" in call:
            call["strength"] = 0.6
        if middle in DECODERS or is_combined(name):
            call |= {"height": 32, "width": 32, "output_type": "np"}
        return call | ({"prior_num_inference_steps": 2} if is_combined(name) else {})


# Methods and the arguments that cases may pass, all by name. Networks and folders replace what would touch the disk.
METHODS: dict[str, tuple[str, ...]] = {
    "to": ("device", "dtype"),
    "interpolate": (
        "images_and_prompts",
        "weights",
        "num_images_per_prompt",
        "num_inference_steps",
        "generator",
        "latents",
        "negative_prior_prompt",
        "negative_prompt",
        "guidance_scale",
        "device",
        "guidance_interval",
        "timesteps",
        "sigmas",
        "prompt_weights",
    ),
    "get_zero_embed": ("batch_size", "device"),
    "enable_feature_caching": ("every", "levels"),
    "enable_model_cpu_offload": ("gpu_id", "device"),
    "enable_sequential_cpu_offload": ("gpu_id", "device"),
    "enable_low_memory": ("folder", "by_layer"),
    "enable_cuda_graphs": (),
    "compile": ("mode", "dynamic", "components", "backend", "cache_dir"),
    "quantize": ("kind", "components"),
    "from_pipe": ("pipeline", "torch_dtype", "unet", "prior"),
    "register_modules": ("unet", "scheduler", "movq", "prior", "tokenizer"),
    "progress_bar": ("iterable", "total"),
    "set_progress_bar_config": ("disable", "desc", "leave", "file", "ncols", "unit", "colour", "bar_format", "display"),
    "save_pretrained": ("save_directory", "max_shard_size", "variant", "safe_serialization"),
    "from_pretrained": (
        "torch_dtype",
        "dtype",
        "variant",
        "revision",
        "cache_dir",
        "token",
        "unet",
        "device_map",
        "prior",
    ),
    "download": ("variant", "revision", "cache_dir", "local_files_only", "token", "use_safetensors"),
    "numpy_to_pil": ("images",),
}
# Methods that change networks run on copies of them.
CHANGING = {
    "to",
    "compile",
    "quantize",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_low_memory",
}


class Methods:
    """Calls of methods and assignments of attributes with unexpected values.

    Args:
        world: Checkpoints and pipelines.
    """

    name = "methods"

    def __init__(self, world: World) -> None:
        self.world = world

    def generate(self, rng: random.Random) -> Case:
        """Return a case: a class and a method with arguments, or an attribute with a value."""
        name = rng.choice(TEN)
        if rng.random() < 0.2:
            parts = [*self.world.pipelines[name].components, "generation_defaults"]
            return {"class": name, "attribute": rng.choice(parts), "value": any_value(rng)}
        method = rng.choice(list(METHODS))
        accepted = METHODS[method]
        chosen = rng.sample(accepted, rng.randrange(min(3, len(accepted)) + 1))
        return {
            "class": name,
            "method": method,
            "arguments": {argument: any_argument(rng, argument) for argument in chosen},
        }

    def run(self, case: Case) -> None:
        """Call the method, or assign the attribute and make a call."""
        name = case["class"]
        pipe = self.world.pipeline(name)
        if "attribute" in case:
            setattr(pipe, case["attribute"], VALUES[case["value"]]())
            assert_finite(pipe(**Calls.valid_call(name)))
            return
        method = case["method"]
        if not hasattr(pipe, method):
            return
        if method in CHANGING:
            pipe = type(pipe)(**{key: copy.deepcopy(part) for key, part in pipe.components.items()})
        arguments = {argument: value_of(choice) for argument, choice in case["arguments"].items()}
        for argument in ("save_directory", "folder", "cache_dir"):
            if isinstance(arguments.get(argument), str | bytes | os.PathLike):
                arguments[argument] = self.world.folder / "saved"
        if method in ("from_pretrained", "download"):
            accepted = inspect.signature(getattr(pipe, method)).parameters
            arguments = {next(iter(accepted)): self.world.folder / "decoder", **arguments}
        if method == "interpolate":
            arguments = {"images_and_prompts": ["a cat", "red"], "weights": [0.5, 0.5], **arguments}
            arguments = {"num_inference_steps": 2, **arguments}
        try:
            inspect.signature(getattr(pipe, method)).bind(**arguments)
        except TypeError:
            return  # Python itself refuses missing and unknown arguments
        with no_error_after_a_network(pipe):
            assert_finite(getattr(pipe, method)(**arguments))
