"""Wrong arguments that several classes share: the start of the expected message, and the argument."""

from __future__ import annotations

import decimal
import fractions
from typing import Any

import numpy as np
import torch
from tests.pipelines.tiny import DIM, seeded

NAN = torch.full((1, DIM), float("nan"))

SHARED: list[tuple[str, dict[str, Any]]] = [
    ("num_images_per_prompt", {"num_images_per_prompt": 0}),
    ("num_images_per_prompt", {"num_images_per_prompt": True}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_inference_steps", {"num_inference_steps": "many"}),
    ("num_inference_steps", {"num_inference_steps": 100_000}),
    ("guidance_scale", {"guidance_scale": float("nan")}),
    ("guidance_scale", {"guidance_scale": "4"}),
    ("guidance_scale", {"guidance_scale": None}),
    ("output_type", {"output_type": "jpeg"}),
    ("output_type", {"output_type": None}),
    ("generator", {"generator": 7}),
    ("generator", {"generator": [seeded(0), seeded(1), seeded(2)]}),
    ("generator", {"generator": []}),
    ("callback_on_step_end", {"callback_on_step_end": "print"}),
    ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": ["noise"]}),
    ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": "latents"}),
    ("latents", {"latents": torch.zeros(3, 3)}),
    ("latents", {"latents": [0.0]}),
    ("return_dict", {"return_dict": None}),
    ("return_dict", {"return_dict": "no"}),
    ("num_images_per_prompt", {"num_images_per_prompt": 2**70}),
    ("num_images_per_prompt", {"num_images_per_prompt": np.int64(2**62)}),
    ("num_inference_steps", {"num_inference_steps": 2**70}),
    ("num_inference_steps", {"num_inference_steps": np.bool_(True)}),
    ("guidance_scale", {"guidance_scale": 10**400}),
    ("guidance_scale", {"guidance_scale": fractions.Fraction(10**400, 3)}),
    ("guidance_scale", {"guidance_scale": decimal.Decimal("0.5")}),
    ("callback_on_step_end", {"callback_on_step_end": lambda pipe, step: None}),
    ("callback_on_step_end", {"callback_on_step_end": lambda: None}),
    ("callback_on_step_end", {"callback_on_step_end": lambda a, b, c, d, e: None}),
    ("callback_on_step_end", {"callback_on_step_end": dict}),
]
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 3}),
    (r"prompt\[1\]", {"prompt": ["a cat", b"red"]}),
    ("prompt", {"prompt": "\ud83d"}),
    (r"negative_prompt\[1\]", {"negative_prompt": ["blue", "\udcff"]}),
    ("negative_prompt", {"negative_prompt": []}),
    ("negative_prompt", {"negative_prompt": {"a": 1}}),
    ("negative_prompt", {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}),
]
SIZES: list[tuple[str, dict[str, Any]]] = [
    ("height", {"height": 0}),
    ("width", {"width": -8}),
    ("height", {"height": "512"}),
    ("width", {"width": 64.5}),
    ("callback_steps", {"callback_steps": 0}),
    ("callback", {"callback": 1}),
    ("callback", {"callback": lambda step, timestep: None}),
    ("height", {"height": 2**70}),
    ("width", {"width": 10**400}),
    ("width", {"width": 10**6}),
    ("callback_steps", {"callback_steps": 2**70}),
]
EMBEDDINGS: list[tuple[str, dict[str, Any]]] = [
    ("image_embeds", {"image_embeds": torch.cat([NAN, NAN])}),
    ("negative_image_embeds", {"negative_image_embeds": torch.cat([NAN, NAN])}),
    ("image_embeds", {"image_embeds": torch.full((1, DIM), float("inf"))}),
    ("image_embeds", {"image_embeds": torch.zeros(1, DIM).to_sparse()}),
    ("image_embeds", {"image_embeds": torch.nn.Parameter(torch.zeros(1, DIM, device="meta"))}),
    ("image_embeds", {"image_embeds": torch.zeros(1, DIM, dtype=torch.int64)}),
    ("image_embeds", {"image_embeds": torch.zeros(1, DIM, dtype=torch.complex64)}),
    ("image_embeds", {"image_embeds": torch.full((1, DIM), 1e300, dtype=torch.float64)}),
    ("image_embeds", {"image_embeds": torch.zeros(1, 1).expand(10**8, DIM)}),
    ("image_embeds", {"image_embeds": np.full((1, DIM), None)}),
    ("image_embeds", {"image_embeds": np.ma.masked_all((1, DIM))}),
    ("image_embeds", {"image_embeds": np.zeros((1, DIM), [("a", "f4")])}),
    ("image_embeds", {"image_embeds": np.full((1, DIM), np.longdouble("1e4000"))}),
    ("image_embeds", {"image_embeds": "a cat"}),
    ("image_embeds", {"image_embeds": None}),
    ("image_embeds", {"image_embeds": []}),
    ("image_embeds", {"image_embeds": torch.zeros(0, DIM)}),
    ("image_embeds", {"image_embeds": torch.zeros(1, DIM + 1)}),
    ("image_embeds", {"image_embeds": torch.zeros(1, 1, DIM)}),
    ("image_embeds", {"image_embeds": torch.zeros(1, DIM, dtype=torch.int64)}),
    ("image_embeds.*sparse", {"image_embeds": torch.ones(2, DIM).to_sparse()}),
    ("image_embeds.*meta", {"image_embeds": torch.ones(2, DIM, device="meta")}),
    ("image_embeds.*complex", {"image_embeds": torch.ones(2, DIM, dtype=torch.complex64)}),
    ("image_embeds.*object", {"image_embeds": np.full((2, DIM), None)}),
    ("negative_image_embeds", {"negative_image_embeds": torch.zeros(3, DIM)}),
    ("negative_image_embeds", {"negative_image_embeds": None}),
]
