"""What was typed into conversations, kept for the next one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory

MOST_BYTES = 1 << 20  # of the file at the start of a conversation; beyond it the older half is dropped


def history_file() -> Path:
    """Return where messages are kept: in the user's folder of state."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "dllama_mpi" / "chat_history"


class History(FileHistory):
    """Messages in a file that its owner alone may read; without a place for one they are kept for this conversation."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
                os.fchmod(file.fileno(), 0o600)
                data = file.read()
            if len(data) > MOST_BYTES:
                self._keep(path, data[data.find(b"\n# ", -MOST_BYTES // 2) :])

    @staticmethod
    def _keep(path: Path, data: bytes) -> None:
        new = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

    def load_history_strings(self) -> Iterable[str]:
        """Return the messages, the newest first."""
        with contextlib.suppress(OSError):
            return super().load_history_strings()
        return ()

    def store_string(self, string: str) -> None:
        """Append a message."""
        with contextlib.suppress(OSError):  # a full disk ends no conversation
            super().store_string(string)
