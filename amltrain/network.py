"""The HuggingFace Hub's client: time limits, what its answers mean, and whether a download is what the Hub named."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from amltrain.errors import UserError, first_line
from amltrain.files import hash_once

SILENCE = 20.0
"""Seconds that a connection may stay silent, for every request; the client's own limit is none for most of them."""
GIVE_UP = 3
"""Requests in a row without an answer in time, after which the client's further tries fail at once."""
_unanswered: list[BaseException] = []


def limit_waiting() -> None:
    """Give every request of this process's Hub client a time limit. A later call forgets earlier failures only."""
    _unanswered.clear()
    if hasattr(huggingface_hub, "set_client_factory"):  # from version 1 on
        from huggingface_hub.utils import _http

        if getattr(_http._GLOBAL_CLIENT_FACTORY, "limited", False):
            return
        sound = _http._GLOBAL_CLIENT_FACTORY

        def limited() -> Any:
            client = sound()
            client.send = _limited(client.send)  # type: ignore[method-assign]
            return client

        limited.limited = True  # type: ignore[attr-defined]
        huggingface_hub.set_client_factory(limited)
        return
    import requests

    class Limited(requests.Session):
        def request(self, *arguments: Any, **keywords: Any) -> requests.Response:  # type: ignore[override]
            if keywords.get("timeout") is None:
                keywords["timeout"] = SILENCE
            return super().request(*arguments, **keywords)

    huggingface_hub.configure_http_backend(Limited)


def _limited(send: Callable[..., Any]) -> Callable[..., Any]:
    """Limit a client's `send`: each request by itself, and all of them when the Hub has gone silent."""

    def send_limited(request: Any, **keywords: Any) -> Any:
        if len(_unanswered) >= GIVE_UP:
            raise _unanswered[-1]
        limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        request.extensions["timeout"] = {name: SILENCE if s is None else s for name, s in limits.items()}
        try:
            answer = send(request, **keywords)
        except Exception as error:
            if "Timeout" in type(error).__name__:
                _unanswered.append(error)
            raise
        _unanswered.clear()
        return answer

    return send_limited


def failure_reason(error: BaseException, repo: str, *, writing: bool = False) -> str:
    """Describe a failure of the Hub in one phrase, with what to do; the client wraps its causes several times."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    response = next((r for c in chain if (r := getattr(c, "response", None)) is not None), None)
    status, headers = getattr(response, "status_code", None), getattr(response, "headers", {})
    names = " ".join(type(c).__name__ for c in chain)
    if "Gated" in names:
        return f"{repo} is gated: ask for access on its page on the Hub, then log in with `hf auth login`"
    if "RevisionNotFound" in names:
        return f"{repo} has no such branch, tag or commit; look at its page on the Hub"
    if status == 401 and not writing:
        return f"there is no {repo}, or it is private: correct the name, or log in with `hf auth login`"
    if status == 401:
        return "the Hub does not know the token; log in with `hf auth login`, or set HF_TOKEN to one that may write"
    if status == 403:
        return f"the token may not {'write to' if writing else 'read'} {repo}; use one that may"
    if status == 404:
        return f"there is no {repo}, or one of its files is gone; correct the name, or look at its page on the Hub"
    if status == 429:
        pause = headers.get("Retry-After", "")
        return f"the Hub asks to slow down (429); try again {f'in {pause} s' if pause.isdigit() else 'later'}"
    if status is not None and status >= 500:
        return f"the Hub answered {status}; try again later"
    if "Timeout" in names or any("timed out" in str(c) for c in chain):
        return "the Hub did not answer in time; check the network and try again"
    if re.search(r"Connect|Protocol|Network|ReadError|WriteError|IncompleteRead", names):
        return f"the connection to the Hub failed ({first_line(chain[-1])}); check the network and try again"
    return first_line(error)


def download_model(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download the files of a repository "user/name" or "user/name@REVISION", or find them in the cache.

    patterns: of the files' names. Raises UserError.
    """
    folder = _snapshot(source, revision, patterns)
    check_download(folder)
    return folder


class AbsentError(UserError):
    """A repository that is not there, or does not have what was asked for."""


def download(source: str, patterns: Sequence[str], wanted: str, absent: str, folder: Path | None = None) -> Path:
    """Download files of a repository "user/name" or "user/name@REVISION", whose contents the caller checks.

    wanted: the file or folder of it to return, absent: what is said where the repository has none. folder: to download
    to; None = the cache. Raises UserError, AbsentError where there is nothing to download.
    """
    path = _snapshot(source, None, patterns, folder) / wanted
    if not path.exists():
        raise AbsentError(absent)
    return path


def _snapshot(source: str, revision: str | None, patterns: Sequence[str], folder: Path | None = None) -> Path:
    limit_waiting()
    repo, _, named = source.partition("@")
    wanted, kept = revision or named or None, list(patterns)
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=wanted, allow_patterns=kept, local_dir=folder))
    except HFValidationError as error:
        raise UserError(f"{source} is neither a folder here nor a Hub repository (user/name)") from error
    except LocalEntryNotFoundError as error:
        why = "" if _offline() else f" ({failure_reason(error, repo)})"
        raise UserError(
            f"no folder {source} here, and no Hub repository of that name in the cache while the Hub is out of reach"
            f"{why}; check the name, the network and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # of requests or httpx, depending on huggingface_hub's version
        absent = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
        raise (AbsentError if absent else UserError)(
            f"no folder {source} here, and the Hub repository of that name could not be read: "
            f"{failure_reason(error, repo)}"
        ) from error


def _offline() -> bool:
    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def check_download(folder: Path) -> None:
    """Compare files of the Hub's cache with the hashes that the Hub named, which are the names of its blobs.

    Large files have a SHA-256, small ones git's SHA-1. Raises UserError. Nothing is compared where the cache has no
    links to blobs (Windows without the right to make them).
    """
    for path in sorted(folder.iterdir()):
        if not path.is_symlink() or not path.is_file():
            continue
        name = path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", name):
            same = hash_once(path) == name
        elif re.fullmatch(r"[0-9a-f]{40}", name):
            content = path.read_bytes()
            same = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == name
        else:
            continue
        if not same:
            raise UserError(
                f"{path.name} of {folder} is not the file that the Hub named (it was cut off or changed on the way or "
                f"here); remove {path.resolve()} and run again"
            )
