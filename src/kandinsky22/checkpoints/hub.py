"""Location of checkpoint files: a folder, the embedded model, or the Hugging Face Hub. No weights are read here."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from kandinsky22.checkpoints.atomic_files import open_regular_file
from kandinsky22.checkpoints.folder_save import complete_saves
from kandinsky22.checkpoints.load_arguments import check_hub_options, checked_flag
from kandinsky22.errors import CheckpointError, MissingDependencyError, invalid
from kandinsky22.requirements import OLDEST_VERSIONS

EMBEDDED = "embedded"
DISTILLED = "distilled"  # folder of a checkpoint with the adapter for sampling in a few steps, and name of the adapter
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w][\w.-]*)?")
HUB_TIMEOUT = 30.0  # seconds without a response
MAX_CARD_BYTES = 2**20  # the front matter of a model card is at its beginning
EMBEDDED_ADAPTER = f"{EMBEDDED}/{DISTILLED}"
MODEL_NAMES = f"a folder, a Hub id such as 'owner/name', or {EMBEDDED!r}"

SelectFiles: TypeAlias = Callable[[list[str]], Iterable[str]]
"""Function that selects the files to download, from the names of all files of a repository.

`pipelines.component_io.needed_files` selects the files of a pipeline, and `checkpoints.weights.select_weight_files`
those of its weights.
"""


@dataclass(frozen=True)
class CheckpointSource:
    """Name of a checkpoint, with the options that are needed to find its files.

    Attributes:
        name: A folder, "embedded", or a Hub id.
        revision: Branch, tag or commit on the Hub; None means the default branch.
        cache_dir: Folder of the Hub cache; None means the Hub client's default.
        token: Access token of the Hub, True for the stored one, False for none; None means the Hub client's default.
        local_files_only: Whether no network request is made and only cached files are used.
        embedded_subfolder: Folder of the embedded weights: "prior", "decoder", "inpaint" or "control".
        force_download: Whether files are downloaded although they are in the cache.
        checks_digests: Whether interrupted downloads are continued, and files in the cache and new ones are compared
            with the digests of the Hub.
    """

    name: str | os.PathLike[str]
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    embedded_subfolder: str = "decoder"
    force_download: bool = False
    checks_digests: bool = False

    def __post_init__(self) -> None:
        name: Any = self.name
        if not isinstance(name, str | os.PathLike) or not isinstance(os.fspath(name), str):
            raise invalid("pretrained_model_name_or_path", self.name, MODEL_NAMES)
        check_hub_options(self.revision, self.cache_dir, self.token)
        # None is the reference's default for False
        object.__setattr__(self, "local_files_only", checked_flag("local_files_only", self.local_files_only))

    @property
    def hub_options(self) -> dict[str, Any]:
        """Options that find further files of the same checkpoint on the Hub."""
        return {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "local_files_only": self.local_files_only,
        }

    def fetch(self, select_files: SelectFiles) -> Path:
        """Return the checkpoint's folder, after downloading files if it is on the Hub, or completing a save into it.

        Args:
            select_files: Selects the files to download from the names of all files of the repository. It is not
                called for folders and cached files.

        Raises:
            CheckpointError: If neither such a folder nor such a repository (on the Hub or in its cache) exists.
            MissingDependencyError: If the Hub is needed and its client is not installed.
        """
        if self.name == EMBEDDED:
            return embedded_folder(self.embedded_subfolder)
        if os.path.isdir(self.name):
            complete_saves(Path(self.name))  # an interrupted one leaves no model_index.json
            return Path(self.name)
        if os.path.exists(self.name):
            raise CheckpointError(f"{str(self.name)!r} is a file; a model is {MODEL_NAMES}")
        if not HUB_ID.fullmatch(str(self.name)):
            raise CheckpointError(
                f"no model {str(self.name)!r}: no such folder exists, and it is not a Hub id such as 'owner/name'"
            )
        return self._download(select_files)

    def _download(self, select_files: SelectFiles) -> Path:
        """Download the selected files, or take the cached snapshot if the Hub is not reachable."""
        try:
            import huggingface_hub as hub
            from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
        except ImportError as error:
            raise MissingDependencyError(
                f"{self.name} is not a local folder; loading it from the Hub requires huggingface_hub "
                f"{OLDEST_VERSIONS['huggingface_hub']} or newer"
            ) from error
        repository, selected, connection_error = str(self.name), None, None
        if not self.local_files_only:
            try:
                info = hub.HfApi().model_info(repository, revision=self.revision, token=self.token, timeout=HUB_TIMEOUT)
                selected = list(select_files([file.rfilename for file in info.siblings or []]))
            except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
                raise CheckpointError(self._not_found(error)) from error
            except Exception as error:  # offline mode, no connection, server errors: the cache may have the files
                connection_error = error
        if self.checks_digests and connection_error is not None:
            raise CheckpointError(self._not_found(connection_error)) from connection_error
        try:
            if self.checks_digests and selected is not None:
                self._check_files(info.sha, selected)
            folder = hub.snapshot_download(
                repository,
                revision=self.revision,
                cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
                token=self.token,
                # Offline, the cached snapshot is taken as it is; missing files are reported when they are opened.
                # An empty list of patterns would download everything.
                allow_patterns=selected or ["nothing/at/all"],
                local_files_only=selected is None,
                force_download=self.force_download,
            )
        except CheckpointError:
            raise
        except Exception as error:  # the Hub client raises OSError, ValueError and its HTTP library's exceptions
            cause = connection_error or error
            raise CheckpointError(self._not_found(cause)) from cause
        return Path(folder)

    def _check_files(self, commit: str | None, names: Iterable[str]) -> None:
        from kandinsky22.checkpoints.hub_files import download_files

        cache_dir = None if self.cache_dir is None else Path(self.cache_dir)
        download_files(str(self.name), commit, names, cache_dir=cache_dir, token=self.token)

    def _not_found(self, error: Exception) -> str:
        """Message for a checkpoint that is neither a folder nor in reach on the Hub."""
        reason = str(error).strip().split("\n")[0]
        searched = "the local Hub cache" if self.local_files_only else "the Hugging Face Hub"
        revision = f" at revision {self.revision!r}" if self.revision else ""
        return (
            f"no model {str(self.name)!r}: no such folder exists, and {searched} did not provide it{revision} "
            f"({reason})"
        )

    def matching_prior(self, prior: str | os.PathLike[str] | None = None) -> CheckpointSource:
        """Return the source of the prior that belongs to this decoder.

        These are tried in order: `prior:` in the front matter of the model card (a Hub id, or a folder relative to
        the card), a folder `prior` inside or next to this one, a sibling named like this folder with "prior" instead
        of "decoder".

        Args:
            prior: Folder or Hub id of another prior to use; None looks for the matching one.

        Raises:
            InputError: If `prior` is not the name of a model.
            CheckpointError: If no matching prior exists.
        """
        if prior is not None:
            if not isinstance(prior, str | os.PathLike):
                raise invalid("prior", prior, f"{MODEL_NAMES}, or a prior pipeline")
            return replace(self, name=prior, embedded_subfolder="prior", revision=None)
        if self.name == EMBEDDED:
            return replace(self, embedded_subfolder="prior")
        folder = self.fetch(select_files=lambda names: [name for name in names if name == "README.md"])
        if card_prior := _prior_in_card(folder / "README.md"):
            relative = folder / card_prior
            return replace(self, name=relative if os.path.isdir(relative) else card_prior, revision=None)
        if os.path.isdir(self.name):
            folder = Path(os.path.realpath(folder))
            sibling = re.sub(r"(decoder|controlnet).*", "prior", folder.name)
            for candidate in (folder / "prior", folder.parent / "prior", folder.parent / sibling):
                complete_saves(candidate)
                if os.path.isfile(candidate / "model_index.json"):
                    return replace(self, name=candidate)
        raise CheckpointError(
            f"{self.name} does not name the prior that belongs to it; pass prior= (a folder, a Hub id or a prior "
            "pipeline)"
        )


def licence_in_card(card: Path) -> str | None:
    """Return the licence that the front matter of a model card names; None if there is none.

    Args:
        card: Path of the card, `README.md` of a checkpoint.
    """
    line = next((line for line in _front_matter(card) if line.startswith("license:")), "license:")
    return line.removeprefix("license:").split(" #")[0].strip().strip("'\"") or None


def _front_matter(card: Path) -> list[str]:
    """Return the lines of a model card's front matter.

    Lines are read one by one: a pattern over the entire text takes quadratic time for hostile cards.
    """
    try:
        with open_regular_file(card) as file:
            lines = file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace").removeprefix("\ufeff").splitlines()
    except OSError:
        return []
    if not lines or lines[0].rstrip() != "---":
        return []
    end = next((index for index, line in enumerate(lines) if index and line.startswith("---")), None)
    return lines[1:end] if end is not None else []


def _prior_in_card(card: Path) -> str | None:
    """First entry under `prior:` in a model card's front matter; None if there is none."""
    front = _front_matter(card)
    start = next((index for index, line in enumerate(front) if line.startswith("prior:")), None)
    if start is None:
        return None
    values = [front[start].removeprefix("prior:").strip(), *(line.strip() for line in front[start + 1 :])]
    value = next((text for text in values if text and not text.startswith("#")), "")
    if value is not values[0] and not value.startswith("-"):
        return None  # the next key
    value = value.removeprefix("- ").strip().removeprefix("[").strip()
    quote = value[:1] if value[:1] in ("'", '"') else ""
    entry = value[1:].split(quote)[0] if quote else re.split(r"[\s,\]]", value, maxsplit=1)[0]
    return entry or None


def embedded_folder(subfolder: str) -> Path:
    """Return a folder of the embedded weights.

    Args:
        subfolder: "prior", "decoder", "inpaint" or "control".

    Raises:
        CheckpointError: If this installation does not have these weights.
    """
    folder = _embedded_weights() / subfolder
    if not folder.is_dir():
        raise CheckpointError(f"this installation has no embedded {subfolder} weights: {folder} does not exist")
    return folder


def embedded_fallback_folder(component_folder: Path) -> Path | None:
    """Return the folder with the shards that a component of the embedded model shares with the decoder's component.

    Args:
        component_folder: Folder of a component, such as ".../inpaint/unet".

    Returns:
        The folder of the decoder's component of the same name; None outside the embedded model.
    """
    weights = Path(os.path.realpath(_embedded_weights()))  # unlike Path.resolve, survives loops of links
    is_embedded = Path(os.path.realpath(component_folder)).parent.parent == weights
    return weights / "decoder" / component_folder.name if is_embedded else None


def _embedded_weights() -> Path:
    return Path(str(importlib.resources.files("kandinsky22"))) / "embedded" / "weights"


def model_folder(source: CheckpointSource, subfolder: str | None, select_files: SelectFiles) -> Path:
    """Return the folder of one network or scheduler.

    Args:
        source: The checkpoint.
        subfolder: Folder within the checkpoint, such as "unet"; None means the checkpoint's folder itself.
        select_files: Selects the files to download, from names relative to the subfolder.

    Raises:
        CheckpointError: If the checkpoint does not exist, or does not have the subfolder.
    """
    if subfolder is not None and not isinstance(subfolder, str):
        raise invalid("subfolder", subfolder, "the name of a folder in the checkpoint, or None")
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    if source.name == EMBEDDED and subfolder and not (embedded_folder(source.embedded_subfolder) / subfolder).is_dir():
        source = replace(source, embedded_subfolder="prior")

    def select_in_subfolder(names: list[str]) -> list[str]:
        relative_names = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        return [prefix + name for name in select_files(relative_names)]

    folder = source.fetch(select_in_subfolder)
    if subfolder and not os.path.isdir(folder / subfolder):
        subfolders = ", ".join(sorted({path.parent.name for path in folder.glob("*/*.json")})) or "none"
        raise CheckpointError(f"no folder {subfolder!r} in {folder}; its component folders: {subfolders}")
    return folder / subfolder if subfolder else folder
