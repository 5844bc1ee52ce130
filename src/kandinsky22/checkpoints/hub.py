"""Where checkpoint files come from: a folder, the embedded model, or the Hugging Face Hub. Nothing is loaded here."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kandinsky22.errors import CheckpointError, InputError, MissingDependencyError

EMBEDDED = "embedded"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A checkpoint's name and how to reach it: a folder, "embedded", or a Hub id with the Hub's usual options.

    `part` names the folder of the embedded weights that is meant: "prior", "decoder", "inpaint" or "control".
    """

    name: str | os.PathLike[str]
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    part: str = "decoder"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str | os.PathLike):
            raise InputError(f"{self.name!r} names no model; a folder, a Hub id or {EMBEDDED!r} is needed")

    def fetch(self, choose: Callable[[list[str]], Iterable[str]]) -> Path:
        """The checkpoint's folder. From the Hub only the files that `choose` picks from the repository are fetched.

        Raises CheckpointError if there is no such folder and no such repository within reach.
        """
        if self.name == EMBEDDED:
            return embedded_folder(self.part)
        if os.path.isdir(self.name):
            return Path(self.name)
        if os.path.exists(self.name):
            raise CheckpointError(f"{self.name} is a file; a model is a folder (or a Hub id, or {EMBEDDED!r})")
        if not HUB_ID.fullmatch(str(self.name)):
            raise CheckpointError(
                f"no model {str(self.name)!r}: there is no such folder, and it is not a Hub id like 'owner/name'"
            )
        return self._download(choose)

    def _download(self, choose: Callable[[list[str]], Iterable[str]]) -> Path:
        try:
            import huggingface_hub as hub
            from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
        except ImportError as error:
            raise MissingDependencyError(f"{self.name} is no folder, and Hub ids need huggingface_hub") from error
        name, wanted, trouble = str(self.name), None, None
        if not self.local_files_only:
            try:
                info = hub.HfApi().model_info(name, revision=self.revision, token=self.token, timeout=30)
                wanted = list(choose([file.rfilename for file in info.siblings or []]))
            except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
                raise CheckpointError(self._unknown(error)) from error
            except Exception as error:  # offline by setting, no connection, a server in trouble: the cache may do
                trouble = error
        try:
            folder = hub.snapshot_download(
                name,
                revision=self.revision,
                cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
                token=self.token,
                # Of a cached copy nothing is asked here: what is missing from it is found missing when it is read.
                allow_patterns=wanted or ["nothing/at/all"],
                local_files_only=wanted is None,
            )
        except Exception as error:  # the Hub client raises OSError, ValueError and its HTTP library's own errors
            raise CheckpointError(self._unknown(trouble or error)) from (trouble or error)
        return Path(folder)

    def _unknown(self, error: Exception) -> str:
        reason = str(error).strip().split("\n")[0]
        where = "the local Hub cache" if self.local_files_only else "the Hugging Face Hub"
        at = f" at revision {self.revision!r}" if self.revision else ""
        return f"no model {str(self.name)!r}: there is no such folder, and {where} did not give it{at} ({reason})"

    def prior(self) -> Source:
        """Where the prior that belongs to this decoder is, for pipelines that need both.

        Looked for: `prior:` in the front matter of the model card (a Hub id or a folder beside the card), a folder
        `prior` inside or beside this one, a sibling named like it with "prior" for "decoder". Raises CheckpointError.
        """
        if self.name == EMBEDDED:
            return replace(self, part="prior")
        folder = self.fetch(lambda names: [name for name in names if name == "README.md"])
        if named := _named_prior(folder / "README.md"):
            beside = folder / named
            return replace(self, name=beside if beside.is_dir() else named, revision=None)
        if os.path.isdir(self.name):
            folder = folder.resolve()
            alike = re.sub(r"(decoder|controlnet).*", "prior", folder.name)
            for candidate in (folder / "prior", folder.parent / "prior", folder.parent / alike):
                if (candidate / "model_index.json").is_file():
                    return replace(self, name=candidate)
        raise CheckpointError(
            f"{self.name} does not say which prior belongs to it; pass prior= (a folder, a Hub id or a prior pipeline)"
        )


def embedded_folder(part: str) -> Path:
    """Folder of the embedded weights, one of `Source.part`; raises CheckpointError if this installation has none."""
    folder = _embedded() / part
    if not folder.is_dir():
        raise CheckpointError(f"this installation has no embedded {part} weights: {folder} does not exist")
    return folder


def _embedded() -> Path:
    return Path(str(importlib.resources.files("kandinsky22"))) / "embedded" / "weights"


def shared_folder(component: Path) -> Path | None:
    """Where a component's files are looked for that its own folder leaves out: within the embedded model, whose
    decoders share what they have in common, the plain decoder's component of that name; None anywhere else."""
    whole = _embedded().resolve()
    return whole / "decoder" / component.name if component.resolve().parent.parent == whole else None


def model_folder(source: Source, subfolder: str | None, choose: Callable[[list[str]], Iterable[str]]) -> Path:
    """Folder of one network or scheduler; `choose` sees and gives file names inside it."""
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    if source.name == EMBEDDED and subfolder and not (embedded_folder(source.part) / subfolder).is_dir():
        source = replace(source, part="prior")

    def inside(names: list[str]) -> list[str]:
        return [prefix + name for name in choose([n[len(prefix) :] for n in names if n.startswith(prefix)])]

    folder = source.fetch(inside)
    if subfolder and not (folder / subfolder).is_dir():
        there = ", ".join(sorted(path.parent.name for path in folder.glob("*/*.json"))) or "no such folders"
        raise CheckpointError(f"no folder {subfolder!r} in {folder}; it has {there}")
    return folder / subfolder if subfolder else folder


def _named_prior(card: Path) -> str | None:
    """The first entry under `prior:` in a model card's front matter."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^prior:\s*(?:-\s+)?\[?\s*['\"]?([^\s'\"\],]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None
