"""Uploads to the Hub: the arguments that methods for saving and uploading share, and the errors of the Hub's client."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky22.errors import CheckpointError, MissingDependencyError, invalid
from kandinsky22.inputs import validation

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HubUpload:
    """A validated request to upload a folder.

    Attributes:
        repo_id: Repository, such as "owner/name", created if it does not exist.
        commit_message: Message of the commit.
        private: Whether a new repository is private; None for the default of the owner.
        token: Access token of the Hub; None for the stored one.
        create_pr: Whether the commit opens a pull request.
        revision: Branch to write to; None for the default branch.
        subfolder: Folder in the repository; None for its top folder.

    Raises:
        InputError: If an option is invalid.
    """

    repo_id: str
    commit_message: str
    private: bool | None = None
    token: str | bool | None = None
    create_pr: bool = False
    revision: str | None = None
    subfolder: str | None = None

    def __post_init__(self) -> None:
        validation.strict_bool("create_pr", self.create_pr)
        if self.private is not None:
            validation.strict_bool("private", self.private)
        if self.token is not None and not isinstance(self.token, bool | str):
            raise invalid("token", type(self.token), "a string, True, False or None")  # its value may be a secret
        for name in ("commit_message", "revision", "subfolder"):
            value: Any = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise invalid(name, value, "a string or None")

    def run(self, folder: str | os.PathLike[str]) -> str:
        """Upload all files of a folder.

        Args:
            folder: The folder.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            InputError: If the name of the repository is invalid.
            CheckpointError: If the upload fails.
            MissingDependencyError: If huggingface_hub is not installed.
        """
        hub = _hub_client()
        try:
            created = hub.create_repo(self.repo_id, private=self.private, token=self.token, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=created.repo_id,
                folder_path=folder,
                path_in_repo=self.subfolder,
                commit_message=self.commit_message,
                token=self.token,
                create_pr=self.create_pr,
                revision=self.revision,
            )
        except hub.errors.HFValidationError as error:
            raise invalid("repo_id", self.repo_id, "a repository such as 'owner/name'") from error
        except Exception as error:  # the client and its HTTP library raise many types of exceptions
            message = " ".join(str(error).split())
            raise CheckpointError(f"cannot upload to {self.repo_id} on the Hub: {message}") from error
        return str(commit.pr_url if self.create_pr else commit.commit_url)


def requested_upload(owner: str, push_to_hub: Any, options: Mapping[str, Any], folder: Path) -> HubUpload | None:
    """Return the upload that the arguments of a method for saving request.

    Args:
        owner: Class whose object is saved, for the commit and for messages.
        push_to_hub: Whether the folder is uploaded after it was written.
        options: Fields of `HubUpload` by name. `repo_id` is the name of the folder if it is left out. Without an upload
            they have no effect, which is logged as a warning.
        folder: The folder that is written.

    Returns:
        The upload; None if `push_to_hub` is False.

    Raises:
        InputError: If an argument is invalid.
    """
    accepted = [field.name for field in dataclasses.fields(HubUpload)]
    if unknown := sorted(set(options) - set(accepted)):
        raise invalid(
            f"{owner}: arguments", unknown, f"arguments of the method, or of the upload: {', '.join(accepted)}"
        )
    if not validation.strict_bool("push_to_hub", push_to_hub):
        if options:
            logger.warning("%s: %s has no effect without push_to_hub=True", owner, ", ".join(sorted(options)))
        return None
    named = {name: value for name, value in options.items() if value is not None}
    return HubUpload(**{"repo_id": folder.resolve().name, "commit_message": f"Upload {owner}", **named})


def _hub_client() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingDependencyError("push_to_hub needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub
