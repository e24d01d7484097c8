"""What the hub, the network or the disk refuse, each in one line that says what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DllamaError, ModelError


class Refusal(Exception):
    """What is to be said of a model that cannot be downloaded, without its name."""


@contextmanager
def told(name: str, folder: Path) -> Iterator[None]:
    """Have whatever a block meets while it downloads to a folder raised as a ModelError of one line."""
    try:
        yield
    except DllamaError:
        raise
    except Exception as error:  # the hub's library raises errors of several others, and they change
        line = _line(error, folder)
        if line is None:
            raise
        raise ModelError(f"{name}: {line}") from None


def retry_after(headers: Any) -> int | None:
    """Return the seconds that an answer asks to wait: Retry-After, or what is left of a limit's window."""
    value = str(headers.get("retry-after", "")).strip()
    if value.isdecimal():
        return int(value)
    for part in str(headers.get("ratelimit", "")).split(";"):
        key, _, value = part.strip().partition("=")
        if key == "t" and value.isdecimal():
            return int(value)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _line(error: Exception, folder: Path) -> str | None:
    """Return what is to be said; None for a fault of the program."""
    from huggingface_hub import constants, errors

    transport = errors.HfHubHTTPError.__mro__[1]  # the HTTP client's own base class, whichever client it is
    for each in _chain(error):
        if isinstance(each, errors.OfflineModeIsEnabled):
            return (
                f"not in {folder}, and offline mode (HF_HUB_OFFLINE) forbids to download it; unset that, or copy the"
                " folder from a machine that has it"
            )
        if isinstance(each, errors.HfHubHTTPError):
            return _of_status(each, constants.ENDPOINT)
        if isinstance(each, errors.FileMetadataError):
            return f"{constants.ENDPOINT} does not answer as a hub does; check HF_ENDPOINT, and proxies"
        if isinstance(each, errors.HFValidationError):
            return f"no name that the hub can have ({_first(each)})"
        if isinstance(each, Refusal):
            return str(each)
        if isinstance(each, transport):
            what = _first(each) or type(each).__name__
            return (
                f"{constants.ENDPOINT} cannot be reached ({what}); check the network, HF_ENDPOINT and proxies, and"
                " try again: what has come is kept"
            )
        if isinstance(each, OSError) and each.errno is not None:
            return _of_disk(each, folder)
    return _first(error) if type(error).__module__.startswith("huggingface_hub") else None


def _first(error: BaseException) -> str:
    """Return the first line of an error's text."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else ""


def _of_status(error: Any, endpoint: str) -> str:
    from huggingface_hub import errors, get_token

    status, headers = error.response.status_code, error.response.headers
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        then = "see that your token may read gated models" if get_token() else log_in
        return f"gated ({status}): accept its conditions on its page at {endpoint}, and {then}"
    if status == 401 and not get_token():
        return f"the hub has no such public model (401); check the name, or, if it is private, {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such model ({status}), or none that your token may see; check the name"
    if isinstance(error, errors.DisabledRepoError):
        return f"the hub has disabled access to it ({status})"
    if isinstance(error, errors.RevisionNotFoundError | errors.EntryNotFoundError) or status == 404:
        return f"the hub does not have it ({status}: {_first(error)}); download it again to see what is there now"
    if status == 401:
        return f"the hub refuses your token (401); {log_in}, with a valid token"
    if status == 403:
        why = headers.get("x-error-message") or "forbidden"
        return f"the hub refuses it (403: {why}); see that your token may read it"
    if status == 429:
        seconds = retry_after(headers)
        when = f"in {seconds} s" if seconds is not None else "later"
        return f"too many requests (429); try again {when}" + (
            "" if get_token() else f", or {log_in}: that raises the limit"
        )
    if status >= 500:
        return f"{endpoint} is out of order ({status}); try again later: what has come is kept"
    return f"the hub answers {status}: {_first(error)}"


def _of_disk(error: OSError, folder: Path) -> str:
    where = error.filename or folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some room, or set HF_HOME to another disk, and try again: what has come is kept"
        return f"the disk is full ({folder}); {remedy}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where} may not be written ({os.strerror(error.errno)}); set HF_HOME to a folder of your own"
    return f"{where}: {error.strerror or error}"
