"""Memory of one training step at published size, counted on the meta device, as a Markdown table.

No weights are needed and nothing is computed: every operation runs on tensors without values, and the bytes of all
tensors that are alive are added up, forwards and backwards. Products compute in bfloat16 and norms in float32, as under
autocast on CUDA; attention keeps no matrix of scores, as torch's fused kernels. The context of CUDA (about half a
gigabyte), the allocator's fragmentation and workspaces of libraries come on top.

    python -m benchmarks.training_memory
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kandinsky22.models import PriorTransformer, UNet2DConditionModel
from kandinsky22.training.finetuning import lora
from kandinsky22.training.finetuning.networks import trainable_entirely

GIGABYTE = 2**30
LATENT_FACTOR = 8
PRIOR_TOKENS = 77
LOW = ("linear", "conv2d")  # computed in bfloat16 under autocast
HIGH = ("group_norm", "layer_norm")  # computed in float32 under autocast


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    stage: str
    rank: int | None = None
    bf16: bool = True
    checkpointing: bool = False
    batch: int = 1
    resolution: int = 512
    adam_bytes: int = 8  # both moments, per trained element
    ema: bool = False
    targets: tuple[str, ...] = ("attention",)  # layers that get adapters
    teacher: bool = False  # a frozen network of its own


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


class Tracker(TorchDispatchMode):
    """Counts the bytes of tensors that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Attention(torch.autograd.Function):
    """Stands for torch's fused attention: keeps queries, keys, values, the output and a number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def computed_in(function: Any, dtype: torch.dtype) -> Any:
    """The function with its arguments in another type."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(
            *(cast(arg, dtype) for arg in args), **{name: cast(value, dtype) for name, value in kwargs.items()}
        )

    return run


@contextmanager
def cuda_operations(bf16: bool) -> Iterator[None]:
    """Types of products and norms as under autocast on CUDA, which does not act on the meta device; fused attention.

    The functions themselves are replaced: modes are off inside of the backward pass, where gradient checkpointing
    computes blocks again.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return Attention.apply(query, key, value)

    low, high = (torch.bfloat16, torch.float32) if bf16 else (torch.float32, torch.float32)
    replaced = {name: computed_in(getattr(F, name), low) for name in LOW}
    replaced |= {name: computed_in(getattr(F, name), high) for name in HIGH}
    replaced |= {"scaled_dot_product_attention": computed_in(attention, low)}
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(F, name, function))
        # adapters store no copies of their inputs, as under autocast
        stack.enter_context(mock.patch.object(lora, "autocasts", lambda device: bf16))
        yield


def build(case: Case) -> nn.Module:
    """The network on the meta device, with its adapters: frozen weights in the type that products compute in."""
    with torch.device("meta"):
        network: Any = (UNet2DConditionModel if case.stage == "decoder" else PriorTransformer)()
    if case.rank is None:
        trainable_entirely(network)
    else:
        network.to(torch.bfloat16 if case.bf16 else torch.float32)
        lora.add_adapters(network, case.rank, None, case.targets, seed=0)
    if case.checkpointing:
        network.enable_gradient_checkpointing()
    network.train()
    return network


def loss(network: Any, case: Case) -> Tensor:
    size = case.resolution // LATENT_FACTOR
    if case.stage == "decoder":
        embeds = torch.empty(case.batch, network.config.encoder_hid_dim, device="meta")
        latents = torch.empty(case.batch, 4, size, size, device="meta")
        timesteps = torch.zeros(case.batch, device="meta")
        out = network(latents, timesteps, added_cond_kwargs={"image_embeds": embeds}, return_dict=False)[0]
    else:
        width = network.config.embedding_dim
        embeds, text = (torch.empty(case.batch, width, device="meta") for _ in range(2))
        hidden = torch.empty(case.batch, PRIOR_TOKENS, width, device="meta")
        mask = torch.ones(case.batch, PRIOR_TOKENS, device="meta", dtype=torch.bool)
        timesteps = torch.zeros(case.batch, device="meta")
        out = network(embeds, timesteps, text, hidden, mask, return_dict=False)[0]
    return out.float().square().mean()


def measure(case: Case) -> Memory:
    """Count the bytes of one step."""
    network = build(case)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    tracker = Tracker()
    tracker.ignore(iter(network.parameters()))

    def count_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        tracker.gradients += parameter.grad.untyped_storage().nbytes()

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(count_gradient)
    with cuda_operations(case.bf16), tracker:
        loss(network, case).backward()
    elements = sum(parameter.numel() for parameter in trained)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    average = 4 * elements if case.ema else 0
    if case.teacher:
        stored += sum(parameter.numel() for parameter in network.parameters()) * (2 if case.bf16 else 4)
    gradients = 4 * elements
    # What is alive at the peak besides gradients; the optimizer's step has all gradients and no activations.
    activations = max(tracker.peak - tracker.gradients_at_peak, 0)
    at_peak = max(tracker.peak, gradients)
    return Memory(stored + average, at_peak - activations, case.adam_bytes * elements, activations)


LORA = {"stage": "decoder", "rank": 16}
DISTILLED = {"stage": "decoder", "checkpointing": True, "targets": ("attention", "blocks"), "ema": True}
PRIOR = {"stage": "prior", "batch": 16}
CASES: list[Case] = [
    Case("decoder, LoRA, float32", **LORA, bf16=False),
    Case("decoder, LoRA, bf16", **LORA),
    Case("decoder, LoRA, bf16, gradient checkpointing", **LORA, checkpointing=True),
    Case("decoder, LoRA, bf16, gradient checkpointing, batch 4", **LORA, checkpointing=True, batch=4),
    Case("decoder, LoRA, bf16, gradient checkpointing, 768 pixels", **LORA, checkpointing=True, resolution=768),
    Case("decoder, LoRA of rank 64, bf16, gradient checkpointing", stage="decoder", rank=64, checkpointing=True),
    Case("decoder, full, float32", stage="decoder", bf16=False),
    Case("decoder, full, bf16", stage="decoder"),
    Case("decoder, full, bf16, gradient checkpointing", stage="decoder", checkpointing=True),
    Case("decoder, full, bf16, gradient checkpointing, 8-bit Adam", stage="decoder", checkpointing=True, adam_bytes=2),
    Case("decoder, full, bf16, gradient checkpointing, EMA", stage="decoder", checkpointing=True, ema=True),
    Case("prior, LoRA, bf16, batch 16", **PRIOR, rank=16),
    Case("prior, LoRA, bf16, gradient checkpointing, batch 16", **PRIOR, rank=16, checkpointing=True),
    Case("prior, full, bf16, batch 16", **PRIOR),
    Case("prior, full, bf16, gradient checkpointing, 8-bit Adam, batch 16", **PRIOR, checkpointing=True, adam_bytes=2),
    Case("distill: decoder, LoRA of rank 64, bf16, gradient checkpointing, batch 4", **DISTILLED, rank=64, batch=4),
    Case("distill: decoder, full, bf16, gradient checkpointing, 8-bit Adam", **DISTILLED, adam_bytes=2, teacher=True),
]


def table(cases: list[Case], show: Callable[[str], None]) -> None:
    show("| Training | Weights | Gradients | Optimizer | Activations | Together |")
    show("|---|--:|--:|--:|--:|--:|")
    for case in cases:
        memory = measure(case)
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        show(f"| {case.name} | {' | '.join(f'{part / GIGABYTE:.1f}' for part in parts)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    table(CASES, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
