"""The life of the server on the root: HTTP in a thread of its own, the engine in the main one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from ..errors import ClusterError, UsageError
from .app import build
from .gate import GateOptions
from .metrics import Metrics
from .outbox import EngineLike, EngineLoop
from .protocol import Bounds, bounded_protocol
from .served import Served, State

_SWITCH_SECONDS = 5e-4  # how long HTTP may hold the interpreter while the engine waits for it
_START_SECONDS = 30.0
_BACKLOG = 2048  # connections that wait to be accepted
_FILES = 4096  # that may be open, connections included


@dataclass(frozen=True)
class ServeOptions:
    """How the server listens.

    Attributes:
        header_timeout: seconds for a request's head. idle_timeout: seconds that a connection may stay without one.
        send_timeout: seconds that a client may leave what was sent unread. drain_timeout: seconds that requests have to
            finish when the server ends. connections: at once.
        is_shared: others of this user may listen at the same address (SO_REUSEPORT), see `supervisor`.
    """

    host: str = "127.0.0.1"
    port: int = 9990
    gate: GateOptions = field(default_factory=GateOptions)
    certfile: str | None = None
    keyfile: str | None = None
    header_timeout: float = 15.0
    idle_timeout: float = 75.0
    send_timeout: float = 60.0
    drain_timeout: float = 30.0
    is_shared: bool = False
    connections: int = 2048


class HttpServer:
    """Listens from its making on, a shared one from `start` on; answers 503 and the phase until `serve` is called.

    Raises:
        UsageError: the address or the certificate cannot be used.
    """

    def __init__(self, options: ServeOptions, phase: str = "loading") -> None:
        _check_certificate(options)
        _allow_files()
        self.options = options
        self._socket = bind(options.host, options.port, options.is_shared)
        self.port: int = self._socket.getsockname()[1]
        self._state = State(phase)
        self._metrics = Metrics()
        self._engine: EngineLoop | None = None
        self._server = uvicorn.Server(self._config())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"{'https' if self.options.certfile else 'http'}://{host}:{self.port}"

    def _config(self) -> uvicorn.Config:
        o = self.options
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        return uvicorn.Config(
            build(self._state, self._metrics, o.gate),
            http=bounded_protocol(Bounds(o.header_timeout, o.send_timeout, o.connections)),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=int(o.idle_timeout),
            timeout_graceful_shutdown=int(o.drain_timeout),
            ssl_certfile=o.certfile,
            ssl_keyfile=o.keyfile,
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        if not self._running.wait(_START_SECONDS):
            raise ClusterError(f"the HTTP server has not come up within {_START_SECONDS:g} s")

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._running.set()
            await self._server.serve([self._socket])

        try:
            asyncio.run(serve())
        finally:
            if self._engine is not None:
                self._engine.end()

    def serve(self, engine: EngineLike, served: Served) -> None:
        """Run the engine for all requests until the server has been told to end, and has."""
        assert self._loop is not None
        self._engine = EngineLoop(engine, self._loop, self._metrics.observe)
        self._loop.call_soon_threadsafe(self._set_ready, served, self._engine)
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            with self._signals():
                if not self._thread.is_alive():
                    self._engine.end()
                self._engine.run()
        finally:
            sys.setswitchinterval(before)

    def _set_ready(self, served: Served, engine: EngineLoop) -> None:
        self._state.served, self._state.engine = served, engine
        if self._state.phase == "loading":
            self._state.phase = "ready"

    def _set_draining(self) -> None:
        self._state.phase = "draining"

    def drain(self) -> None:
        """Take no more requests, let those that run finish for some seconds, then end. From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._set_draining)
        self._server.should_exit = True

    def end_now(self) -> None:
        """End without waiting for requests. From any thread."""
        self._server.force_exit = True
        if self._loop is not None and self._engine is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._engine.cancel_all)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Drain at SIGTERM and SIGINT; end at once at a second SIGINT."""

        def handler(number: int, _frame: Any) -> None:
            if number == signal.SIGINT and self._server.should_exit:
                self.end_now()
            self.drain()

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)

    def close(self) -> None:
        """End, if it has not, and wait for that."""
        self.drain()
        if self._thread.is_alive():
            self._server.force_exit = self._engine is None  # nothing can be running
            self._thread.join(self.options.drain_timeout + 5)
        self._socket.close()


def _allow_files() -> None:
    """Let this process have as many files open as there may be connections, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(host: str, port: int, is_shared: bool = False) -> socket.socket:
    """Return a socket at an address; it listens already, unless the address is shared.

    Raises:
        UsageError: the address cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        if not is_shared:
            listener.listen(_BACKLOG)
    except OSError as error:
        said = error.strerror or str(error)
        raise UsageError(f"cannot listen on {host} port {port}: {said}; choose another by --host and --port") from None
    return listener


def _check_certificate(options: ServeOptions) -> None:
    if options.certfile is None:
        if options.keyfile is not None:
            raise UsageError(f"--ssl-keyfile {options.keyfile} needs --ssl-certfile")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.certfile, options.keyfile, lambda: "")
    except (OSError, ValueError) as error:
        key = f" with --ssl-keyfile {options.keyfile}" if options.keyfile else ""
        raise UsageError(f"--ssl-certfile {options.certfile}{key} cannot be used: {error}") from None
