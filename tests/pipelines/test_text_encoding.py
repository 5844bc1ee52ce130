"""Encoding of texts: attachments to towers always act, and the cache keeps neither networks nor tensors of callers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipelines.tiny import DIM, difference, load_quietly, seeded

from kandinsky22 import InputError, KandinskyV22PriorPipeline
from kandinsky22.pipelines import embedding_cache
from kandinsky22.runtime.lazy_component import LazyComponent


def draw(pipe: Any, prompt: str = "a cat", **options: Any) -> torch.Tensor:
    """Return the image embedding of a prompt."""
    return pipe(prompt, num_inference_steps=2, generator=seeded(1), **options).image_embeds


# Attachments to towers


class Attachment:
    """Something attached to a tower, which counts its runs."""

    def __init__(self, tower: Any) -> None:
        self.tower, self.runs = tower, 0

    def note(self, *_: Any) -> None:
        self.runs += 1

    def attach(self) -> Callable[[], Any]:
        """Attach it, and return the function that removes it."""
        raise NotImplementedError


class Hook(Attachment):
    def attach(self) -> Callable[[], Any]:
        def zero(module: Any, inputs: Any, output: Any) -> Any:
            self.note()
            output.text_embeds.zero_()
            return output

        return self.tower.register_forward_hook(zero).remove


class InnerHook(Attachment):
    def attach(self) -> Callable[[], Any]:
        layer = self.tower.text_projection

        def zero(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            self.note()
            return torch.zeros_like(output)

        return layer.register_forward_hook(zero).remove


class Forward(Attachment):
    def attach(self) -> Callable[[], Any]:
        original = self.tower.forward

        def forward(*inputs: Any, **options: Any) -> Any:
            self.note()
            output = original(*inputs, **options)
            output.text_embeds.zero_()
            return output

        self.tower.forward = forward
        return lambda: self.tower.__dict__.pop("forward")


class GlobalHook(Attachment):
    def attach(self) -> Callable[[], Any]:
        from torch.nn.modules import module as torch_module

        def zero(module: Any, inputs: Any, output: Any) -> Any:
            if module is not self.tower:
                return None
            self.note()
            output.text_embeds.zero_()
            return output

        return torch_module.register_module_forward_hook(zero).remove


class CompiledForm(Attachment):
    def attach(self) -> Callable[[], Any]:
        def form(*inputs: Any, **options: Any) -> Any:
            self.note()
            output = type(self.tower).forward(self.tower, *inputs, **options)
            output.text_embeds.zero_()
            return output

        self.tower._compiled_call_impl = form
        return lambda: setattr(self.tower, "_compiled_call_impl", None)


@pytest.mark.parametrize("kind", [Hook, InnerHook, Forward, GlobalHook, CompiledForm])
def test_attachments_run_in_every_call_and_leave_nothing(kind: Any, prior: KandinskyV22PriorPipeline) -> None:
    first, second = draw(prior), draw(prior, "a red cat")
    attachment = kind(prior.text_encoder)
    remove = attachment.attach()
    changed = draw(prior)
    assert attachment.runs == 1
    assert difference(changed, first) > 1e-3
    assert torch.equal(draw(prior), changed)
    assert attachment.runs == 2
    draw(prior, "a dog")
    remove()
    assert torch.equal(draw(prior), first)
    assert torch.equal(draw(prior, "a red cat"), second)
    dog = draw(prior, "a dog")
    assert torch.equal(draw(KandinskyV22PriorPipeline(**prior.components), "a dog"), dog)
    assert attachment.runs == 3


@pytest.mark.parametrize("method", ["enable_low_memory", "enable_sequential_cpu_offload"])
def test_offloading_is_no_attachment(method: str, prior: KandinskyV22PriorPipeline) -> None:
    getattr(prior, method)(**({} if method == "enable_low_memory" else {"device": "cpu"}))
    assert not embedding_cache.has_attachments(prior.text_encoder)
    prior.text_encoder.register_forward_pre_hook(lambda *_: None)
    assert embedding_cache.has_attachments(prior.text_encoder)


def test_attachments_to_the_image_encoder_run_too(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path))
    monkeypatch.setattr(embedding_cache, "MIN_ENCODER_BYTES", 0)
    stored = load_quietly(KandinskyV22PriorPipeline, checkpoints / "prior").get_zero_embed()
    pipe = load_quietly(KandinskyV22PriorPipeline, checkpoints / "prior")
    runs: list[int] = []

    def double(module: Any, inputs: Any, output: Any) -> Any:
        runs.append(1)
        output.image_embeds.mul_(2)
        return output

    handle = pipe.image_encoder.register_forward_hook(double)
    for _ in range(2):
        assert torch.equal(pipe.get_zero_embed(), 2 * stored)
    assert len(runs) == 2
    handle.remove()
    assert torch.equal(pipe.get_zero_embed(), stored)
    assert len(runs) == 2


def test_hooks_of_all_modules_run_in_an_image_encoder_that_is_not_loaded(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.modules import module as torch_module

    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path))
    monkeypatch.setattr(embedding_cache, "MIN_ENCODER_BYTES", 0)
    stored = load_quietly(KandinskyV22PriorPipeline, checkpoints / "prior").get_zero_embed()
    pipe = load_quietly(KandinskyV22PriorPipeline, checkpoints / "prior")
    lazy = pipe.components["image_encoder"]
    assert isinstance(lazy, LazyComponent)

    def double(module: Any, inputs: Any, output: Any) -> Any:
        if type(module) is lazy.component_class:
            output.image_embeds.mul_(2)
        return output

    handle = torch_module.register_module_forward_hook(double)
    try:
        assert torch.equal(pipe.get_zero_embed(), 2 * stored)
    finally:
        handle.remove()
    assert torch.equal(load_quietly(KandinskyV22PriorPipeline, checkpoints / "prior").get_zero_embed(), stored)


# Memory


@pytest.mark.parametrize("how", ["assigned None", "deleted", "replaced"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_removed_networks_leave_memory(how: str, offloaded: bool, prior: KandinskyV22PriorPipeline) -> None:
    if offloaded:
        prior.enable_low_memory()
    draw(prior)
    replacement = copy.deepcopy(prior.text_encoder)
    network = weakref.ref(prior.text_encoder)
    if how == "deleted":
        del prior.text_encoder
    else:
        prior.text_encoder = None if how == "assigned None" else replacement
    gc.collect()
    assert network() is None
    if how == "replaced":
        assert draw(prior).shape == (1, DIM)
        return
    with pytest.raises(InputError, match="constructed without text_encoder"):
        draw(prior)


def test_caches_are_neither_copied_nor_pickled(prior: KandinskyV22PriorPipeline) -> None:
    first = draw(prior)
    for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert other._text_encodings is not prior._text_encodings
        assert not other._text_encodings._results
        assert difference(draw(other), first) < 1e-5


# Public methods


def test_encoded_texts_belong_to_the_caller(prior: KandinskyV22PriorPipeline) -> None:
    for options in ({}, {"prompt_weights": True}):
        expected = prior.encode_text(["a cat"], **options)
        kept = {name: tensor.clone() for name, tensor in vars(expected).items()}
        for tensor in vars(expected).values():
            tensor.zero_()
        again = vars(prior.encode_text(["a cat"], **options))
        assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
    assert torch.equal(prior.encode_text("a cat").prompt_embeds, kept["prompt_embeds"])


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.encode_text([]), r"texts=\[\] is invalid"),
        (lambda pipe: pipe.encode_text([3]), r"texts\[0\]=3 is invalid"),
        (lambda pipe: pipe.encode_text(None), "texts=None is invalid"),
        (lambda pipe: pipe.encode_text(["\ud800"]), r"texts\[0\]="),
        (lambda pipe: pipe.encode_text(["a cat"], prompt_weights=1), "prompt_weights=1 is invalid"),
        (lambda pipe: pipe.encode_text(["(a cat"], prompt_weights=True), "texts="),
        (lambda pipe: pipe.encode_prompts([], [""], 1, guided=True), r"prompt=\[\] is invalid"),
        (lambda pipe: pipe.encode_prompts(["a"], ["b", "c"], 1, guided=True), r"len\(negative\)=2 is invalid"),
        (lambda pipe: pipe.encode_prompts(["a"], [""], 0, guided=True), "copies=0 is invalid"),
        (lambda pipe: pipe.encode_pixels([1]), r"pixels=\[1\] is invalid"),
        (lambda pipe: pipe.encode_picture(torch.zeros(3)), "picture="),
    ],
)
def test_invalid_arguments_of_encoders(prior: KandinskyV22PriorPipeline, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        call(prior)


def test_single_texts_are_whole_texts(prior: KandinskyV22PriorPipeline) -> None:
    together = prior.encode_prompts(["a cat"], [""], 2, guided=True)
    assert together["prompt_embeds"].shape == (4, DIM)
    apart = prior.encode_prompts("a cat", "", 2, guided=True)
    assert all(torch.equal(apart[name], tensor) for name, tensor in together.items())


def test_encoders_that_are_missing_are_named(prior: KandinskyV22PriorPipeline) -> None:
    prior.text_encoder = prior.image_encoder = None
    for call, name in (
        (lambda: prior.encode_text("a cat"), "text_encoder"),
        (lambda: prior.encode_prompts("a cat", "", 1, guided=False), "text_encoder"),
        (lambda: prior.encode_pixels(torch.zeros(1, 3, 8, 8)), "image_encoder"),
    ):
        with pytest.raises(InputError, match=f"constructed without {name}"):
            call()  # type: ignore[no-untyped-call]


# Weights of interpolations


@pytest.mark.parametrize(
    "kind", [Fraction, np.longdouble, np.float32, np.float16, float], ids=lambda kind: kind.__name__
)
def test_weights_are_numbers_of_any_kind(kind: Any, prior: KandinskyV22PriorPipeline) -> None:
    def mix(*weights: Any) -> torch.Tensor:
        options: dict[str, Any] = {"num_inference_steps": 2, "generator": seeded(0)}
        return prior.interpolate(["a cat", "red"], list(weights), **options).image_embeds

    result = mix(kind(1) / 4, kind(3) / 4)
    assert result.dtype == prior.prior.dtype
    assert torch.equal(result, mix(0.25, 0.75))


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize(
    ("dtype", "weight"),
    [
        (torch.float32, 10**300),
        (torch.float32, 1e39),
        (torch.float32, Fraction(10**400)),
        (torch.float32, -1e300),
        (torch.float16, 70_000),
        (torch.bfloat16, 1e39),
    ],
    ids=lambda value: f"{value:.0e}" if isinstance(value, int | float) else type(value).__name__,
)
def test_weights_are_finite_in_the_priors_type(
    dtype: torch.dtype, weight: Any, prior: KandinskyV22PriorPipeline
) -> None:
    prior.to(dtype)
    with pytest.raises(InputError, match=r"^weights\[1\]="):
        prior.interpolate(["a cat", torch.zeros(DIM)], [1.0, weight], num_inference_steps=2)
