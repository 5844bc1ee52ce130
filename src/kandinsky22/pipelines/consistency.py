"""Whether the components of a pipeline belong together, by the sizes in their configs.

Components of different checkpoints can have the same classes and still not fit. Some of these pairs fail inside a
network, and others, such as a tokenizer with another vocabulary, give wrong images without an error.

The constructor of a pipeline checks all pairs, and so does every call before a network runs. Assigning one component
does not: two components that belong together are replaced one after the other, and in between they do not fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from kandinsky22.errors import InputError
from kandinsky22.runtime.network_state import unwrapped
from kandinsky22.sampling.presets import PRIOR_PREFIX

# A vocabulary may be padded: the text tower then has more rows than the tokenizer has tokens, up to such a multiple.
VOCABULARY_MULTIPLES = (8, 16, 32, 64, 128, 256)
TEST_ROWS = 1024  # towers with fewer rows are random ones of tests, some of which have more rows than tokens
LEGACY_END_TOKEN = 2  # `eos_token_id` of early CLIP configs, where the tower looks for the highest token instead


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Two components that do not fit.

    Attributes:
        first: Name of one component and its setting, such as "tokenizer.model_max_length".
        first_value: The value of that setting.
        second: Name of the other component and its setting.
        second_value: The value of that setting.
        expected: Relation that the first value must have to the second.
    """

    first: str
    first_value: Any
    second: str
    second_value: Any
    expected: str = "the same value"


def check_consistency(owner: str, components: Mapping[str, Any]) -> None:
    """Check that components fit each other; those that are missing are skipped, and nothing is loaded.

    Args:
        owner: Class name of the pipeline, for messages.
        components: Components by name, those of the prior with or without the prefix.

    Raises:
        InputError: If two do not fit. The message names both, and both values.
    """
    for mismatch in _mismatches(components):
        raise InputError(
            f"{owner}: {mismatch.first}={mismatch.first_value!r} does not fit "
            f"{mismatch.second}={mismatch.second_value!r}: expected {mismatch.expected}; "
            "load both from the same checkpoint"
        )


def _mismatches(components: Mapping[str, Any]) -> Iterator[Mismatch]:
    prefix = PRIOR_PREFIX if PRIOR_PREFIX + "prior" in components else ""
    prior, text, image, tokenizer, processor = (
        _Component(prefix + name, components.get(prefix + name))
        for name in ("prior", "text_encoder", "image_encoder", "tokenizer", "image_processor")
    )
    unet, movq = (_Component(name, components.get(name)) for name in ("unet", "movq"))
    yield from _tokenizer_mismatches(tokenizer, text, prior)
    yield from _equal(text, "projection_dim", prior, "embedding_dim")
    yield from _equal(text, "hidden_size", prior, "embedding_dim")
    yield from _equal(image, "projection_dim", prior, "embedding_dim")
    yield from _equal(image, "projection_dim", text, "projection_dim")
    yield from _processor_mismatches(processor, image)
    yield from _equal(prior, "embedding_dim", unet, "encoder_hid_dim")
    yield from _channel_mismatches(unet, movq)


class _Component:
    """A component, with the settings of its config."""

    def __init__(self, name: str, component: Any) -> None:
        self.name, self.component = name, component
        self.config = getattr(unwrapped(component), "config", None)

    def number(self, setting: str) -> int | None:
        """Return a setting that is an integer, or None."""
        value = getattr(self.config, setting, None)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def path(self, setting: str) -> str:
        return f"{self.name}.config.{setting}"


def _equal(first: _Component, first_setting: str, second: _Component, second_setting: str) -> Iterator[Mismatch]:
    values = first.number(first_setting), second.number(second_setting)
    if None not in values and values[0] != values[1]:
        yield Mismatch(first.path(first_setting), values[0], second.path(second_setting), values[1])


def _tokenizer_mismatches(tokenizer: _Component, text: _Component, prior: _Component) -> Iterator[Mismatch]:
    if tokenizer.component is None:
        return
    limit = getattr(tokenizer.component, "model_max_length", None)
    context, length = text.number("max_position_embeddings"), prior.number("num_embeddings")
    name = f"{tokenizer.name}.model_max_length"
    if isinstance(limit, int | float):
        if length is not None and limit != length:
            yield Mismatch(name, limit, prior.path("num_embeddings"), length)
        if context is not None and limit > context:
            yield Mismatch(name, limit, text.path("max_position_embeddings"), context, "at most that value")
    tokens, rows = _token_count(tokenizer.component), text.number("vocab_size")
    if tokens is not None and rows is not None and not _is_vocabulary(tokens, rows):
        yield Mismatch(f"len({tokenizer.name})", tokens, text.path("vocab_size"), rows)
    end = getattr(tokenizer.component, "eos_token_id", None)
    # The tower pools the hidden state of this token, thus null is refused too.
    expected_end = getattr(text.config, "eos_token_id", end)
    if end is not None and expected_end not in (LEGACY_END_TOKEN, end):
        yield Mismatch(f"{tokenizer.name}.eos_token_id", end, text.path("eos_token_id"), expected_end)


def _token_count(tokenizer: Any) -> int | None:
    try:
        return len(tokenizer)
    except TypeError:
        return None


def _is_vocabulary(tokens: int, rows: int) -> bool:
    """Return whether a tokenizer with so many tokens can belong to a text tower with so many rows."""
    padded = {math.ceil(tokens / multiple) * multiple for multiple in VOCABULARY_MULTIPLES}
    return tokens == rows or (tokens < rows < 2 * tokens and (rows in padded or rows < TEST_ROWS))


def _processor_mismatches(processor: _Component, image: _Component) -> Iterator[Mismatch]:
    side, size = image.number("image_size"), processor_size(processor.component)
    if side is not None and size is not None and size != (side, side):
        setting = "crop_size" if getattr(processor.component, "do_center_crop", True) else "size"
        yield Mismatch(f"{processor.name}.{setting}", size, image.path("image_size"), side, "a square of that side")


def processor_size(processor: Any) -> tuple[int, int] | None:
    """Return height and width of the pixels that an image processor returns; None if they depend on the image.

    Args:
        processor: CLIP image processor, or None.
    """
    crops = getattr(processor, "do_center_crop", None)
    size = getattr(processor, "crop_size" if crops else "size", None)
    if size is None or not (crops or getattr(processor, "do_resize", True)):
        return None
    if isinstance(size, int):
        return size, size
    height, width = (
        size.get(side) if isinstance(size, Mapping) else getattr(size, side, None) for side in ("height", "width")
    )
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _channel_mismatches(unet: _Component, movq: _Component) -> Iterator[Mismatch]:
    """Channels of the latents: of all UNets, those of the mode are checked again by its call."""
    inputs, outputs, latents = unet.number("in_channels"), unet.number("out_channels"), movq.number("latent_channels")
    if latents is None:
        return
    accepted = (latents, 2 * latents, 2 * latents + 1)  # without, with hint, with masked image and mask
    name = movq.path("latent_channels")
    if inputs is not None and inputs not in accepted:
        expected = f"one of {', '.join(map(str, accepted))}"
        yield Mismatch(unet.path("in_channels"), inputs, name, latents, expected)
    if outputs is not None and outputs not in accepted[:2]:
        yield Mismatch(unet.path("out_channels"), outputs, name, latents, f"{accepted[0]} or {accepted[1]}")
