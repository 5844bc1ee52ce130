"""Tensors that callbacks return, in all ten classes: cast to the working dtype, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.calls import CLASSES, two_step_call
from tests.pipelines.tiny import DIM, difference, seeded

from kandinsky22 import InputError


def names_of(pipe: Any) -> list[str]:
    return list(getattr(pipe, "decoder_pipe", pipe)._callback_tensor_inputs)


def run(pipe: Any, name: str, change: Callable[[str, torch.Tensor], Any], **more: Any) -> torch.Tensor:
    """Return the first result of a call in which each step changes all tensors that callbacks receive."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: change(name, tensor) for name, tensor in tensors.items()}

    options = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": names_of(pipe), **more}
    out = pipe(**two_step_call(name), generator=seeded(1), **options)
    return next(iter(vars(out).values()))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the reference deprecates the legacy callbacks
@pytest.mark.parametrize("name", CLASSES)
def test_callbacks_get_the_references_steps(
    name: str, make_pipeline: Callable[..., Any], reference: Callable[[str], Any]
) -> None:
    """All kinds of callbacks that the reference has are compared."""
    logs: list[list[tuple[Any, ...]]] = []
    theirs = reference(name)
    accepted = inspect.signature(type(theirs).__call__).parameters
    for pipe in (make_pipeline(name), theirs):
        log: list[tuple[Any, ...]] = []

        def watcher(kind: str, log: list[tuple[Any, ...]] = log) -> Callable[..., Any]:
            def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                log.append((kind, step, int(timestep), tensors["latents"].clone()))
                return tensors

            return on_step_end

        def legacy(step: int, timestep: Any, latents: torch.Tensor, log: list[tuple[Any, ...]] = log) -> None:
            log.append(("callback", step, int(timestep), latents.clone()))

        options: dict[str, Any] = {"callback": legacy, "callback_steps": 2, "height": 32, "width": 32}
        options |= {kind: watcher(kind) for kind in ("callback_on_step_end", "prior_callback_on_step_end")}
        accepted_options = {key: value for key, value in options.items() if key in accepted or "kwargs" in accepted}
        if not name.endswith("Combined"):
            accepted_options.pop("prior_callback_on_step_end", None)
        pipe(**two_step_call(name), generator=seeded(1), **accepted_options)
        logs.append(log)
    assert [entry[:3] for entry in logs[0]] == [entry[:3] for entry in logs[1]]
    assert logs[0] or name == "PriorEmb2Emb"  # the reference has no callbacks there
    for (*_, mine), (*_, other) in zip(*logs, strict=True):
        assert difference(mine, other) < 1e-3


@pytest.mark.parametrize("name", CLASSES)
def test_callback_results_are_cast(name: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    same = run(pipe, name, lambda _, tensor: tensor)
    assert difference(run(pipe, name, lambda _, tensor: tensor.double()), same) < 1e-4
    assert (
        difference(
            run(pipe, name, lambda _, tensor: tensor.clone().requires_grad_(tensor.dtype.is_floating_point)), same
        )
        < 1e-4
    )


WRONG: dict[str, Callable[[torch.Tensor], Any]] = {
    "an array": lambda tensor: tensor.numpy(),
    "a number": lambda tensor: 3,
    "too many rows": lambda tensor: torch.cat([tensor] * 3),
    "half of the rows": lambda tensor: tensor[len(tensor) // 2 :] if len(tensor) > 1 else tensor[:0],
    "too few numbers": lambda tensor: tensor[..., :-1],
    "complex numbers": lambda tensor: tensor.to(torch.complex64),
}


@pytest.mark.parametrize("name", CLASSES)
def test_invalid_callback_results_are_refused_by_name(name: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    for changed in names_of(pipe):
        for wrong in WRONG.values():
            message = rf"^callback_on_step_end\(...\)\['{changed}'\]=.* is invalid: expected a real tensor of shape"
            with pytest.raises(InputError, match=message):
                run(pipe, name, lambda each, tensor: wrong(tensor) if each == changed else tensor)  # noqa: B023


@pytest.mark.parametrize("name", CLASSES)
def test_callbacks_may_drop_negative_rows_when_guidance_ends(name: str, make_pipeline: Callable[..., Any]) -> None:
    """Callbacks written for the reference do so, because its network would otherwise get too many rows."""
    pipe, results = make_pipeline(name), []
    for halve in (False, True):

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Any, halve: bool = halve) -> dict[str, Any]:
            pipe._guidance_scale = 1.0
            return {key: value[-1:] for key, value in tensors.items()} if halve else {}

        names = [each for each in names_of(pipe) if each != "negative_image_embeds"]
        options = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": names}
        results.append(next(iter(vars(pipe(**two_step_call(name), generator=seeded(1), **options)).values())))
    assert torch.equal(*results)


def test_callbacks_cannot_add_missing_tensors(decoder: Any) -> None:
    call = {"image_embeds": torch.ones(1, DIM), "negative_image_embeds": None, "guidance_scale": 1.0}
    with pytest.raises(InputError, match=r"\['negative_image_embeds'\]=.*this call has no such tensor"):
        decoder(
            **call,
            num_inference_steps=2,
            callback_on_step_end=lambda *_: {"negative_image_embeds": torch.ones(1, DIM)},
        )


@pytest.mark.parametrize("name", CLASSES)
def test_guidance_cannot_return_after_negative_rows_were_dropped(name: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    kept = [each for each in names_of(pipe) if each not in ("latents", "negative_image_embeds")]
    call = {**two_step_call(name), "num_inference_steps": 4}

    def run_with(scales: list[float], dropped: list[str]) -> Any:
        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            pipe._guidance_scale = scales[min(step, len(scales) - 1)]
            return {key: tensors[key][-1:] for key in dropped} if step == 0 else {}

        options = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": kept}
        return next(iter(vars(pipe(**call, generator=seeded(1), **options)).values()))

    for dropped in ([each] for each in kept):
        expected = f"^guidance_scale was set above 1 by a callback.*a callback has replaced {dropped[0]} by"
        with pytest.raises(InputError, match=expected):
            run_with([0.0, 4.0], dropped)
    with pytest.raises(InputError, match=f"a callback has replaced {', '.join(kept)} by"):
        run_with([0.0, 0.0, 4.0], kept)
    assert torch.isfinite(torch.as_tensor(run_with([0.0, 4.0], []))).all()
