"""Hugging Face repositories on this disk: one commit's folder, with the files that are wanted. Knows no file format.

What keeps a file from being here is told in one line: what it is, of which repository, and what to do about it.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["model", "dataset"]
TOKEN = "make a token at https://huggingface.co/settings/tokens and set HF_TOKEN to it, or run `hf auth login`"


class Asked(NamedTuple):
    """What the hub, or its cache, was asked for."""

    repository: str
    revision: str | None = None
    """Commit, tag or branch; None: main."""
    kind: Kind = "model"
    choice: str = "as the revision"
    """How a user names another revision."""

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"


def snapshot(
    repository: str,
    *patterns: str,
    revision: str | None = None,
    kind: Kind = "model",
    choice: str = "as the revision",
) -> Path:
    """The cached folder of a repository's commit (its name is the commit), files that fit `patterns` downloaded.

    Offline, or where the hub cannot be reached, it is what the cache holds. Raises ValueError, one line that says what
    to do: a gated, private or unknown repository, no such revision, not cached and not to be reached, a full disk.
    `choice` is how that line names another revision, as `with --revision`.
    """
    from huggingface_hub import snapshot_download

    asked = Asked(repository, revision, kind, choice)
    if (here := cached(asked)) and all((here / name).is_file() for name in patterns):
        # A commit never changes: what is here needs no hub, which may be slow to say that it is not there.
        return here
    try:
        return Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        # The hub, the transports beneath it and the disk fail in their own ways.
        reason = explained(error, asked) or f"cannot download {repository}: {first_line(error)}"
        raise ValueError(reason) from error


def explained(error: BaseException, asked: Asked) -> str | None:
    """What the hub had against it, in one line, found in an error or its causes; None where it was not the hub."""
    return next((line for cause in _causes(error) if (line := _line(cause, asked))), None)


def cached(asked: Asked) -> Path | None:
    """The folder of the commit `asked.revision` in the local cache, or None where it is not there. Asks no one."""
    if asked.revision is None or not (folder := _home(asked) / "snapshots" / asked.revision).is_dir():
        return None
    return folder


def unreached(asked: Asked) -> str | None:
    """Why a file that is not in the cache cannot be asked for, in one line; None where the hub answers."""
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(asked.repository, repo_type=asked.kind, revision=asked.revision)
    except Exception as error:
        return explained(error, asked) or absent(asked, error)
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, the last first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException, asked: Asked) -> str | None:
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"{asked.repository!r} is no Hugging Face repository name: {first_line(error)}"
    if isinstance(error, errors.GatedRepoError):
        return _gated(asked)
    if isinstance(error, errors.RepositoryNotFoundError):
        return _unknown(asked)
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{asked.repository} has no revision {asked.revision!r}: name one of {asked.page}/commits/main "
            f"{asked.choice}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return absent(asked, error)
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"the Hugging Face hub does not accept your token, which may have expired: {TOKEN}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: {asked.repository} does not fit into {_cache()}: free some space, or set HF_HOME to a "
            "folder on a larger disk"
        )
    return None


def _gated(asked: Asked) -> str:
    if not _has_token():
        return f"{asked.repository} is gated and no token was found: accept its terms at {asked.page}, then {TOKEN}"
    return (
        f"{asked.repository} is gated and your token has no access to it: accept its terms at {asked.page} with the "
        "token's account; a fine-grained token also needs the right to read public gated repositories"
    )


def _unknown(asked: Asked) -> str:
    private = "set HF_TOKEN to a token that may read it" if _has_token() else f"no token was found, {TOKEN}"
    return (
        f"there is no Hugging Face repository {asked.repository}, or it is private: check the name at {asked.page}; "
        f"if it is private, {private}"
    )


def absent(asked: Asked, error: BaseException, lacking: str = "a file") -> str:
    """The cache lacks files and nothing could be downloaded: which of the two can be helped and how, in one line.

    `lacking` names the files where the commit is here and a part of it is not.
    """
    commits, wanted = _commits(asked), asked.revision or "main"
    here = asked.repository
    other = ""
    if wanted in [*commits, *commits.values()]:
        here = f"{lacking} of {here} at {wanted}"
    elif commits:
        here = f"revision {wanted} of {here}"
        shown = ", ".join(commit + (f" ({name})" if name else "") for commit, name in commits.items())
        other = f", or name a cached commit {asked.choice}: {shown}"
    if _offline():
        why = "HF_HUB_OFFLINE is set: run the same command once without it"
    else:
        why = f"the Hugging Face hub cannot be reached ({_reason(error)}): run the same command once with a network"
    return f"{here} is not in the local cache ({_cache()}) and {why}{other}"


def _reason(error: BaseException) -> str:
    """What the first of all causes says."""
    *_, root = _causes(error)
    return first_line(root)


def _commits(asked: Asked) -> dict[str, str]:
    """The commits in the local cache, each with the branch or tag that it is here; empty where it has none."""
    home = _home(asked)
    refs = (file for file in sorted((home / "refs").rglob("*")) if file.is_file())
    names = {file.read_text().strip(): str(file.relative_to(home / "refs")) for file in refs}
    return {folder.name: names.get(folder.name, "") for folder in sorted((home / "snapshots").glob("*"))}


def _home(asked: Asked) -> Path:
    return _cache() / f"{asked.kind}s--{asked.repository.replace('/', '--')}"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
