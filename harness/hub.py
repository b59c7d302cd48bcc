"""Repositories of the Hugging Face Hub: which commit a name means, and why the Hub does not give something.

What a name on the Hub holds changes with every push to it, what a commit holds never does. So a run asks once for the
commit, before its key is made, and reads that one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import get_session

from harness.errors import BadInput

__all__ = ["NO_REVISION", "UNREACHABLE", "WELL_KNOWN", "commit_in", "commit_of", "fault", "files_of", "knock"]
__all__ += ["parted", "pinned", "quiet"]

# transformers asks a service to make a pull request with safetensors for a repository that has none, in a thread of its
# own beside the training that is measured. Nobody asked for either.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

# Short names for the corpora of the papers: Hub name, config, split, and whether all of it is downloaded and kept.
WELL_KNOWN = {
    "c4": ("allenai/c4", "en", "train", False),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True),
}
UNREACHABLE = "it cannot be reached, and the cache does not have it"
NO_REVISION = "it has no such branch, tag or commit"
# The first of these that is behind an error says what is wrong.
FAULTS = {
    GatedRepoError: "it is gated: accept its terms on its page, and log in (hf auth login)",
    RevisionNotFoundError: NO_REVISION,
    RepositoryNotFoundError: "there is no such repository, or it is not open to you (hf auth login)",
    LocalEntryNotFoundError: UNREACHABLE,
    ConnectionError: UNREACHABLE,
}
# Of httpx and its successors, which are not imported for their names.
CUT = ("TransportError", "ChunkedEncodingError")


@cache
def knock() -> None:
    """Turn this process to the caches alone if the Hub cannot be reached, as HF_HUB_OFFLINE=1 does.

    The libraries knock again for every file, several times and with pauses, which takes minutes.
    """
    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of the HTTP library, which is another one in every other version
        import datasets

        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


@cache
def commit_of(name: str, revision: str | None, kind: str) -> str | None:
    """The commit that a branch or a tag is now.

    Args:
        name: ``owner/name``.
        revision: A branch, a tag or a commit; None: the newest of ``main``.
        kind: ``model`` or ``dataset``.

    Returns:
        40 hexadecimal digits, the same during the whole process; from the cache if the Hub cannot be reached, and None
        if it is not there, nor to be had for another reason. Reading the repository says which.

    Raises:
        RevisionNotFoundError: The repository has no such revision.
    """
    knock()
    quiet()
    try:
        return HfApi().resolve_revision(name, revision=revision, repo_type=kind).resolved
    except RevisionNotFoundError:
        raise
    except (HfHubHTTPError, RevisionResolutionError, OSError, ValueError):
        return None


def quiet() -> None:
    """Leave it to the one error to say that the Hub cannot be reached; no notices of lm-eval."""
    for name in ("huggingface_hub", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parted(source: str) -> tuple[str, str | None]:
    """Name and revision of ``owner/name:config@revision``; None without one."""
    name, _, revision = source.partition("@")
    return name, revision or None


def pinned(source: str, key: str) -> str:
    """``owner/name:config@commit`` for a data set, see `commit_of`; as it is if the commit is not known.

    Args:
        source: ``owner/name``, with or without config and revision.
        key: Name of the config key that `source` comes from, for the message.

    Raises:
        BadInput: The data set has no such revision.
    """
    name, revision = parted(source)
    repository = WELL_KNOWN[name][0] if name in WELL_KNOWN else name.partition(":")[0]
    try:
        commit = commit_of(repository, revision, "dataset")
    except RevisionNotFoundError as error:
        raise BadInput(f"{key}={source}: the data set on the Hub cannot be read: {NO_REVISION}") from error
    return f"{name}@{commit}" if commit else source


def commit_in(dataset: Any) -> str | None:
    """The commit of a data set that `datasets` has downloaded; None for one that comes from elsewhere."""
    files = getattr(dataset, "cache_files", None)
    folder = Path(files[0]["filename"]).parent.name if files else ""
    return folder if re.fullmatch("[0-9a-f]{40}", folder) else None


def files_of(name: str, revision: str | None) -> Path:
    """The folder in the cache where the files of a model that have been read lie; the name if there is none."""
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else Path(name)


def fault(error: BaseException) -> str | None:
    """What the Hub has to do with an error, in words; None if nothing."""
    chain = list(_causes(error))
    for kind, words in FAULTS.items():
        if any(isinstance(cause, kind) for cause in chain):
            return words
    names = {parent.__name__ for cause in chain for parent in type(cause).__mro__}
    return "the connection to it was lost; the same command continues the download" if names & set(CUT) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
