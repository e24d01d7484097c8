"""Messages typed on a terminal: editing, history, several lines, pasting.

Keys come through standard input, which under mpiexec is a pipe: mpiexec passes on each key at once while its terminal
is in raw mode. The prompt is drawn onto that terminal itself. It stays in raw mode as long as the conversation, so that
Ctrl-C is a key like any other, and never a signal to mpiexec, which would end the job.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.data_structures import Size
from prompt_toolkit.filters import is_searching
from prompt_toolkit.input import Input
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from .history import History, history_file
from .screen import Screen
from .terminal import set_modes

LEAVING = "(Ctrl-D or /quit leaves)"
_CTRL_C = b"\x03"
_PASTES_MARKED, _PASTES_BARE = "\x1b[?2004h", "\x1b[?2004l"
# Puts a terminal back when this process was killed, unless somebody else has changed it meanwhile.
_GUARD = r"""
saved=$(stty -g <"$0") || exit
echo
read -r _
ours=$(stty -g <"$0")
read -r _ && exit
[ "$(stty -g <"$0")" = "$ours" ] || exit
stty "$saved" <"$0"
printf '\033[?2004l\033[?25h\n' >"$0"
"""


class LineEditor:
    """Asks for messages. A context manager: it restores the terminal, however this process ends.

    Args:
        screen: it must have a terminal that standard input comes from.
        interrupt: called when Ctrl-C is typed while an answer comes.
        commands: words that Tab completes.
    """

    KEYS = (
        "Enter sends; Alt-Enter, or \\ before Enter, begins another line; arrows edit, and fetch earlier messages;"
        " Ctrl-C stops an answer or clears the line; Ctrl-D leaves"
    )

    def __init__(self, screen: Screen, interrupt: Callable[[], None], commands: Sequence[str]) -> None:
        self._screen, self._interrupt = screen, interrupt
        self._commands = commands
        self._is_asking = self._is_interrupted = False
        self._pending = b""

    def __enter__(self) -> LineEditor:
        device = self._screen.device
        self._saved: list[Any] | None = termios.tcgetattr(device)
        self._guard = _start_guard(os.ttyname(device))
        set_modes(device, _raw(termios.tcgetattr(device)))
        _tell(self._guard)
        atexit.register(self._restore)
        self._screen.draw(_PASTES_MARKED)
        self._keys = _Keys(0)
        self._session = _session(self._keys, _output(device), self._commands)
        if self._screen.has_colours:
            self._session.style = Style.from_dict({"prompt": "ansigreen bold"})
        else:
            self._session.color_depth = ColorDepth.DEPTH_1_BIT
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._saved is not None:
            saved, self._saved = self._saved, None
            with contextlib.suppress(OSError, termios.error):
                self._screen.draw(_PASTES_BARE)
                set_modes(self._screen.device, saved)
            _tell(self._guard)
            if self._guard is not None:
                self._guard.communicate()
        atexit.unregister(self._restore)

    def read_line(self, prompt: str) -> str | None:
        """Return the next message, or None at the end of input. Ctrl-C begins it anew."""
        self._keys.push(self._pending)
        self._pending = b""
        self._is_asking = True
        try:
            while True:
                try:
                    return str(self._session.prompt(prompt, set_exception_handler=False))
                except KeyboardInterrupt:
                    self._screen.draw(self._screen.dim(LEAVING) + "\n")
                except EOFError:
                    return None
        finally:
            self._is_asking = False

    def interrupted(self) -> None:
        """End the answer, if one comes: at a signal. While a message is typed, the editor has the signal itself."""
        if not self._is_asking:
            self._is_interrupted = True
            self._interrupt()

    def poll(self) -> None:
        """Interrupt again if Ctrl-C was typed before the answer had begun."""
        if self._is_interrupted:
            self._interrupt()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While an answer comes: take keys, for the next message, and interrupt at Ctrl-C, which drops those before."""
        self._is_interrupted = False
        read_end, write_end = os.pipe()
        listener = threading.Thread(target=self._listen, args=(read_end,), daemon=True)
        listener.start()
        try:
            yield
        finally:
            os.write(write_end, b"\0")
            listener.join()
            os.close(read_end)
            os.close(write_end)

    def _listen(self, over: int) -> None:
        while over not in select.select([0, over], [], [])[0]:
            data = os.read(0, 4096)
            if not data:  # the next message finds the end, too
                return
            self._pending += data
            if _CTRL_C in data:
                self._pending = data.rpartition(_CTRL_C)[2]
                self.interrupted()


class _Stream(io.TextIOBase):
    """Standard input as prompt_toolkit wants it: what comes through mpiexec are a terminal's keys, too."""

    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return True


class _Keys(Vt100Input):
    """Keys from a file descriptor. The terminal is in raw mode all the time, which `LineEditor` sees to."""

    def __init__(self, number: int) -> None:
        super().__init__(cast(TextIO, _Stream(number)))
        self.stdin_reader = PosixStdinReader(number, errors="replace")

    def raw_mode(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def cooked_mode(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def push(self, data: bytes) -> None:
        """Have keys come before those that are not read yet."""
        if data:
            self.vt100_parser.feed(data.decode("utf-8", "replace"))
            store_typeahead(self, self.flush_keys())


class _Drawing(Vt100_Output):
    """A terminal that marks pastes all the time, also while an answer comes."""

    def enable_bracketed_paste(self) -> None:
        pass

    def disable_bracketed_paste(self) -> None:
        pass


def _output(device: int) -> Output:
    def size() -> Size:
        columns, rows = os.get_terminal_size(device)
        return Size(rows=rows or 24, columns=columns or 80)

    file = open(os.dup(device), "w", encoding="utf-8", errors="replace")  # noqa: SIM115  # as long as the process
    # Questions where the cursor is would be answered into whatever reads the terminal by then.
    return _Drawing(file, size, term=os.environ.get("TERM"), enable_cpr=False, enable_bell=False)


def _session(keys: Input, output: Output, commands: Sequence[str]) -> PromptSession[str]:
    return PromptSession(
        input=keys,
        output=output,
        history=History(history_file()),
        multiline=True,
        prompt_continuation=lambda width, _line, _wrapped: " " * width,
        key_bindings=bindings(),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
    )


def bindings() -> KeyBindings:
    r"""Return what keys do beside the usual: Enter sends, or goes on after a \; Alt-Enter begins another line."""
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _raw(modes: list[Any]) -> list[Any]:
    """Return a terminal's modes with which every key comes as it is, at once. What is written is treated as before."""
    modes[0] &= ~(termios.IXON | termios.IXOFF | termios.ICRNL | termios.INLCR | termios.IGNCR)
    modes[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
    return modes


def _start_guard(device: str) -> subprocess.Popen[bytes] | None:
    """Start what restores a terminal if this process ends without; a launcher that kills ranks does not know of it."""
    try:
        guard = subprocess.Popen(
            ["sh", "-c", _GUARD, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:  # no shell
        return None
    assert guard.stdout is not None
    guard.stdout.readline()  # it knows the modes
    return guard


def _tell(guard: subprocess.Popen[bytes] | None) -> None:
    """Have the guard take its next step."""
    if guard is not None:
        assert guard.stdin is not None
        with contextlib.suppress(OSError):
            guard.stdin.write(b"\n")
            guard.stdin.flush()
