"""Read the small files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllama_mpi.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file.

    Raises:
        ModelError: the file is not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{path} cannot be read: {what}; download it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, not a JSON object; download it again")
    return found


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; give a readable UTF-8 file") from None
