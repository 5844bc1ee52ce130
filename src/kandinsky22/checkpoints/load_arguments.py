"""Arguments of `from_pretrained` that code written for the reference passes.

Some act here as they do there, some have no effect because nothing here depends on them, and some ask for something
that does not exist here. Unknown ones are ignored with a warning, as in the reference.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from kandinsky22.errors import InputError, describe, invalid

logger = logging.getLogger(__name__)

MAX_VARIANT = 64  # characters

# How files are read, or which runtime reads them: nothing here depends on them.
WITHOUT_EFFECT = frozenset(
    {
        "_commit_hash",
        "_from_auto",
        "_from_pipeline",
        "add_watermarker",
        "disable_mmap",
        "flashpack_kwargs",
        "load_connected_pipeline",
        "local_dir",
        "local_dir_use_symlinks",
        "low_cpu_mem_usage",
        "max_memory",
        "mirror",
        "offload_buffers",
        "offload_folder",
        "offload_state_dict",
        "parallel_config",
        "provider",
        "provider_options",
        "proxies",
        "requires_aesthetics_score",
        "requires_safety_checker",
        "resume_download",
        "return_cached_folder",
        "sess_options",
        "trust_remote_code",
        "use_flashpack",
        "use_onnx",
        "user_agent",
    }
)
# Components of other pipelines. Leaving one out, which Kandinsky 2.2 does not have, changes nothing.
OTHER_COMPONENTS = frozenset(
    {
        "controlnet",
        "feature_extractor",
        "image_encoder",
        "safety_checker",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "transformer",
        "vae",
        "vqvae",
    }
)
# Arguments that cannot act, and must not be ignored: what to do instead.
UNAVAILABLE = {
    "custom_pipeline": "pipelines made of code in a repository are not run; construct the class itself",
    "custom_revision": "pipelines made of code in a repository are not run; construct the class itself",
    "quantization_config": "call quantize() of the pipeline instead",
    "dduf_file": "unpack the file into a folder and load that",
}


@dataclasses.dataclass(frozen=True)
class LoadArguments:
    """The arguments of one call of `from_pretrained` that are not parameters of its own.

    Attributes:
        dtype: Type of the networks under the newer name of `torch_dtype`; None if it was not passed.
        token: Access token of the Hub under its older name `use_auth_token`; None if it was not passed.
        force_download: Whether files are downloaded although they are cached.
        device_map: Where the networks are put after loading; None leaves them on the CPU.
        output_loading_info: Whether names of missing and unexpected tensors are returned too.
        ignore_mismatched_sizes: Whether tensors of another shape are initialised instead of refused.
        others: All other arguments.
    """

    dtype: Any = None
    token: str | bool | None = None
    force_download: bool = False
    device_map: Any = None
    output_loading_info: bool = False
    ignore_mismatched_sizes: bool = False
    others: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, owner: str, options: Mapping[str, Any]) -> LoadArguments:
        """Return the arguments in a call's options.

        Args:
            owner: Class name that is loaded, for messages.
            options: Arguments by name.

        Raises:
            InputError: If an argument asks for something that does not exist here, or a flag is not a bool.
        """
        known: dict[str, Any] = {}
        others = dict(options)
        for name in ("force_download", "output_loading_info", "ignore_mismatched_sizes"):
            if (value := others.pop(name, None)) is not None:
                known[name] = checked_flag(name, value)
        for name, advice in UNAVAILABLE.items():
            if (value := others.pop(name, None)) is not None:
                raise invalid(name, value, "None", advice)
        known |= {name: others.pop(name, None) for name in ("dtype", "device_map")}
        known["token"] = others.pop("use_auth_token", None)
        for name in sorted(WITHOUT_EFFECT & others.keys()):
            value = others.pop(name)
            logger.debug("%s.from_pretrained: %s=%s has no effect", owner, name, describe(value))
        return cls(**known, others=others)

    def select(self, owner: str, names: Collection[str]) -> dict[str, Any]:
        """Return those of the other arguments that have these names, and say that the remaining ones are ignored.

        Args:
            owner: Class name that is loaded, for messages.
            names: Names that the class knows.
        """
        for name in sorted(self.others.keys() - set(names)):
            value = self.others[name]
            if value is None and name in OTHER_COMPONENTS:
                logger.debug("%s.from_pretrained: %s=None has no effect", owner, name)
            else:
                logger.warning(
                    "%s.from_pretrained: the argument %s is not known and is ignored: expected one of %s",
                    owner,
                    describe(name),
                    ", ".join(sorted(names)),
                )
        return {name: value for name, value in self.others.items() if name in names}

    def dtype_or(self, torch_dtype: Any) -> Any:
        """Return the requested type, under either of its two names.

        Args:
            torch_dtype: The value of the older name; None if it was not passed.

        Raises:
            InputError: If both were passed with different values.
        """
        if self.dtype is None or torch_dtype is None:
            return torch_dtype if self.dtype is None else self.dtype
        if not _is_equal(self.dtype, torch_dtype):
            raise InputError(f"dtype={describe(self.dtype)} contradicts torch_dtype={describe(torch_dtype)}: pass one")
        return self.dtype


def _is_equal(first: Any, second: Any) -> bool:
    try:
        return first is second or bool(first == second)
    except Exception:  # arrays, for example, have no single truth value
        return False


def checked_flag(name: str, value: Any) -> bool:
    """Return a flag; None counts as False, as in the reference.

    Args:
        name: Name of the argument, for messages.
        value: Its value.

    Raises:
        InputError: If the value is anything except True, False and None.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    raise invalid(name, value, "True or False")


def check_variant_name(variant: Any) -> None:
    """Check that a variant is None, or a part of file names.

    Args:
        variant: The argument.

    Raises:
        InputError: If it is anything else.
    """
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(rf"[\w-]{{1,{MAX_VARIANT}}}", variant)):
        expected = f"1 to {MAX_VARIANT} letters, digits, - and _, because it is part of a file name, or None"
        raise invalid("variant", variant, expected)


def check_use_safetensors(value: Any) -> None:
    """Check that the argument `use_safetensors` is a bool or None.

    Args:
        value: The argument.

    Raises:
        InputError: If it is anything else.
    """
    if value is not None and not isinstance(value, bool):
        raise invalid("use_safetensors", value, "True, False or None")


def check_hub_options(revision: Any, cache_dir: Any, token: Any) -> None:
    """Check that these are options of the Hub.

    Args:
        revision: A string or None.
        cache_dir: A path or None.
        token: A string, a bool or None.

    Raises:
        InputError: If one of them is anything else.
    """
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise invalid("revision", revision, "the name of a branch, a tag or a commit, or None")
    if cache_dir is not None and not isinstance(cache_dir, str | os.PathLike):
        raise invalid("cache_dir", cache_dir, "a folder, or None")
    if token is not None and not isinstance(token, str | bool):
        raise invalid("token", type(token), "a string, True, False or None")  # a token is never printed
