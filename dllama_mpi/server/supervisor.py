"""Starts the job again when it ends badly, and answers HTTP while there is none.

Not an MPI process: what starts ranks is its child. The job's root shares the port (SO_REUSEPORT): as soon as it listens
itself, the stand-in here closes; when its line breaks, the next stand-in, which holds the port already, begins.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import UsageError
from ..log import say
from .link import DRAIN, END, LISTENING, READY
from .run import HttpServer, ServeOptions, bind

STEADY_SECONDS = 600.0  # a job that has been ready for so long starts the count of restarts anew
LONGEST_PAUSE = 30.0  # seconds before a restart; the first is after 1, each later one after twice as long
GRACE_SECONDS = 30.0  # for a launcher to end, once its ranks have or should have
_LAST_WORDS_SECONDS = 1.0
_MISTAKE = 2  # the exit status of a user's mistake


class Job:
    """One run of the launcher: `put` gets (job, what, value) as it gets on, from threads.

    What: "said" (a word of `link`), "gone" (the root's line has ended), "ended" (with the exit status).

    Raises:
        UsageError: the launcher cannot be started.
    """

    def __init__(self, command: Sequence[str], path: Path, put: Callable[[Any], None]) -> None:
        self._put, self._path = put, str(path)
        self._line: socket.socket | None = None
        self.ready_since: float | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self._path)
        self._listener.listen(1)
        try:
            # A session of its own: Ctrl-C at a terminal comes to the supervisor alone.
            self._process = subprocess.Popen(
                [*command, "--supervised", self._path], stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            self._listener.close()
            raise UsageError(f"--launch: {command[0]} cannot be started: {error.strerror}") from None
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def _follow(self) -> None:
        self._line, _ = self._listener.accept()
        with contextlib.suppress(OSError):
            while word := self._line.recv(1):
                self._put((self, "said", word))
        self._put((self, "gone", None))

    def _wait(self) -> None:
        status = self._process.wait()
        with socket.socket(socket.AF_UNIX) as own, contextlib.suppress(OSError):
            own.connect(self._path)  # in case that the root never has: `_follow` waits for it
        self._follower.join(_LAST_WORDS_SECONDS)  # what it said comes before its end
        self._put((self, "ended", 128 - status if status < 0 else status))

    def tell(self, word: bytes) -> None:
        """Say something to the root."""
        with contextlib.suppress(OSError):
            if self._line is not None:
                self._line.sendall(word)

    def terminate(self) -> None:
        """Have the launcher end all ranks."""
        self._process.terminate()

    def kill(self) -> None:
        """End the launcher, if it has not."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End what is left of it: a root whose line closes drains."""
        self.kill()
        self._listener.close()
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)
            self._line.close()


class Supervisor:
    """Runs a command as a job, again and again if need be.

    Args:
        command: what starts all ranks, to which `--port` and `--supervised` are added.
        most: how many times in a row it is started again.

    Raises:
        UsageError: the address or the certificate cannot be used.
    """

    def __init__(self, command: Sequence[str], options: ServeOptions, most: int) -> None:
        with bind(options.host, options.port) as free:  # nobody else's, although the port is going to be shared
            port = free.getsockname()[1]
        self._options = replace(options, port=port, is_shared=True)
        self._command, self._most = [*command, "--port", str(port)], most
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._signals = 0
        self._deadline: float | None = None
        self._stand_in, self._stands_in = HttpServer(self._options, "loading"), False

    def run(self) -> int:
        """Return the exit status: the job's last one; 0 where a signal came while no job served."""

        def handler(number: int, _frame: Any) -> None:
            self._signals += 1
            self._events.put((None, "signal", number))

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tempfile.TemporaryDirectory(prefix="dllama-mpi-") as folder:
                return self._jobs(Path(folder))
        finally:
            self._stand_in.close()
            for number, action in before.items():
                signal.signal(number, action)

    def _jobs(self, folder: Path) -> int:
        restarts = 0
        for number in itertools.count():
            self._step_in()
            job = Job(self._command, folder / str(number), self._events.put)
            try:
                status = self._follow(job)
            finally:
                job.close()
            if self._signals:
                return status if job.ready_since is not None else 0
            if status == 0 or (status == _MISTAKE and job.ready_since is None):
                return status
            if job.ready_since is not None and time.monotonic() - job.ready_since >= STEADY_SECONDS:
                restarts = 0
            if restarts >= self._most:
                say(f"the job has ended with status {status}, after {restarts} restarts (--restart {self._most})")
                return status
            pause = min(LONGEST_PAUSE, 2.0**restarts)
            restarts += 1
            say(f"the job has ended with status {status}; restart {restarts} of {self._most} in {pause:g} s")
            if self._is_told_within(pause):
                return 0
        raise AssertionError

    def _follow(self, job: Job) -> int:
        """Return a job's exit status when it has ended."""
        self._deadline = None
        while True:
            source, what, value = self._event()
            if what == "late":
                job.kill()
                self._deadline = None
            elif what == "signal":
                self._deadline = time.monotonic() + GRACE_SECONDS + self._options.drain_timeout
                self._end(job, value)
            elif source is not job:
                continue
            elif what == "ended":
                break
            elif what == "gone":
                self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS
                if not self._signals:
                    self._step_in()
            elif value == LISTENING:
                self._step_back()
            elif value == READY:
                job.ready_since = time.monotonic()
        if not self._signals:
            self._step_in()
        return int(value)

    def _event(self) -> Any:
        """Return the next event, or "late" when the deadline has passed."""
        end = self._deadline
        try:
            return self._events.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except Empty:
            return None, "late", None

    def _end(self, job: Job, number: int) -> None:
        if job.ready_since is None:
            job.terminate()
        else:
            job.tell(END if number == signal.SIGINT and self._signals > 1 else DRAIN)

    def _is_told_within(self, seconds: float) -> bool:
        """Wait; return whether a signal has come."""
        self._deadline = time.monotonic() + seconds
        while not self._signals and self._event()[1] != "late":
            pass
        return bool(self._signals)

    def _step_in(self) -> None:
        """Answer requests here."""
        if not self._stands_in:
            self._stand_in.start()
            self._stands_in = True

    def _step_back(self) -> None:
        """Leave requests to the job; hold the port for the next time."""
        self._stand_in.close()
        self._stand_in, self._stands_in = HttpServer(self._options, "restarting"), False
