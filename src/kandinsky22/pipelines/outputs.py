"""Results of pipelines, and the decorator of their calls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast, overload

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from kandinsky22.errors import NotFiniteError
from kandinsky22.outputs import Output
from kandinsky22.runtime.calls import running_call

P = ParamSpec("P")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclasses.dataclass
class ImagePipelineOutput(Output):
    """Generated images.

    Attributes:
        images: By `output_type`: a list of PIL images ("pil"), an array (batch, height, width, 3) in [0, 1] ("np"), a
            tensor (batch, 3, height, width) ("pt"), or latents (batch, 4, height / 8, width / 8) ("latent").
    """

    images: list[Image] | np.ndarray[Any, Any] | Tensor


@dataclasses.dataclass
class KandinskyPriorPipelineOutput(Output):
    """Image embeddings of the prior.

    Attributes:
        image_embeds: Image embeddings, (batch, embedding_dim), a tensor ("pt") or an array ("np").
        negative_image_embeds: Their negatives for classifier-free guidance of the decoder, same shape.
    """

    image_embeds: Tensor | np.ndarray[Any, Any]
    negative_image_embeds: Tensor | np.ndarray[Any, Any]


def finite_result(name: str, values: Tensor) -> Tensor:
    """Return a result without NaN and infinity: such a result would be a black image without an explanation.

    Args:
        name: Name of the result, for the message.
        values: Values, (batch, ...).

    Raises:
        NotFiniteError: If a batch item holds NaN or infinity.
    """
    finite = values.flatten(1).isfinite().all(dim=1)
    if bool(finite.all()):
        return values
    count = int(finite.logical_not().sum())
    advice = "check the weights, guidance_scale and the settings of the scheduler"
    if values.dtype == torch.float16:
        advice = "float16 overflows in this network: load it with torch_dtype=torch.bfloat16 or torch.float32"
    raise NotFiniteError(f"{name}: {count} of {len(values)} are not finite (NaN or infinity); {advice}")


class _BoundCall(Protocol[P, Result_co]):
    @overload
    def __call__(self, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Any, ...]: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result_co: ...


class _PipelineCall(Protocol[P, Result_co]):
    def __get__(self, instance: object, owner: Any = None) -> _BoundCall[P, Result_co]: ...
    @overload
    def __call__(self, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Any, ...]: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result_co: ...


def pipeline_call(
    method: Callable[Concatenate[Any, P], Result | tuple[Any, ...]],
) -> _PipelineCall[P, Result]:
    """Run a pipeline's `__call__` as a call (`runtime.calls`) and without gradients, typed by `return_dict`.

    Type checkers see the output class, or a tuple where `return_dict=False` is passed.

    Args:
        method: The method. It returns its output class, or a tuple if `return_dict` is False.

    Returns:
        The method under `running_call` and `torch.no_grad`.
    """

    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> Result | tuple[Any, ...]:
        with running_call(self), torch.no_grad():
            return method(self, *args, **kwargs)

    return cast("_PipelineCall[P, Result]", call)
