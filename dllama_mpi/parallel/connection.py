"""TCP connections between the root and every other rank, for the watchdog's messages.

They stand beside MPI because a rank that dies closes its connections at once, whatever its MPI library is doing and
whichever launcher started it, and because nothing here ever waits for a peer that is gone.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import psutil

_HELLO = struct.Struct("<16si")  # the job's key, the rank that calls
_MESSAGE = struct.Struct("<BBHif")  # kind, phase, exit status, step, seconds in the phase
_MOST_UNSENT = 4096  # bytes kept for a peer that takes none; what comes after is dropped
_CONNECT_SECONDS = 1.0
_REACH_SECONDS = 6.0  # to try all addresses


class Kind(IntEnum):
    """What a message says."""

    BEAT = 1  # I live
    GOODBYE = 2  # I leave, all is well
    FAILED = 3  # I end the job, with this exit status


class Phase(IntEnum):
    """What a rank is doing."""

    LOADING = 0
    PREFILL = 1
    DECODE = 2
    IDLE = 3
    LEAVING = 4


class Message(NamedTuple):
    """One message: `step` counts the sender's steps so far, `seconds` how long it has been in `phase`."""

    kind: Kind
    phase: Phase
    status: int
    step: int
    seconds: float


@dataclass(frozen=True)
class Offer:
    """Where the root listens: addresses as (address, prefix length), a port, and the key that callers must know."""

    host: str
    addresses: list[tuple[str, int]]
    port: int
    key: bytes


class TcpConnection:
    """A TCP connection that carries whole messages and never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._unsent = self._partial = b""

    def send(self, message: Message) -> None:
        """Send a message, or keep it for the next call; with too much kept already it is dropped."""
        if len(self._unsent) < _MOST_UNSENT:
            self._unsent += _MESSAGE.pack(*message)
        with contextlib.suppress(OSError):  # the reading side will notice what is wrong
            self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def receive(self) -> tuple[list[Message], bool]:
        """Return the messages that have come, and whether the connection is still open."""
        is_open = True
        try:
            while data := self.socket.recv(4096):
                self._partial += data
            is_open = False
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            is_open = False
        whole = len(self._partial) // _MESSAGE.size * _MESSAGE.size
        taken, self._partial = self._partial[:whole], self._partial[whole:]
        return [Message(Kind(k), Phase(p), *rest) for k, p, *rest in _MESSAGE.iter_unpack(taken)], is_open


def listen(host: str) -> tuple[socket.socket, Offer]:
    """Open a socket for callers on all of this host's addresses.

    Raises:
        OSError: it cannot be opened.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener, Offer(host, _own_addresses(both), listener.getsockname()[1], secrets.token_bytes(16))


def _own_addresses(with_ipv6: bool) -> list[tuple[str, int]]:
    """Return the addresses of interfaces that are up, but for link-local IPv6, with their prefix lengths."""
    interfaces = psutil.net_if_addrs()
    try:
        up = {name for name, about in psutil.net_if_stats().items() if about.isup}
    except OSError:  # the system does not tell, as under QEMU: a caller finds out
        up = set(interfaces)
    found = []
    for name, entries in interfaces.items():
        for entry in entries if name in up else []:
            if entry.family == socket.AF_INET or (entry.family == socket.AF_INET6 and with_ipv6):
                address = ipaddress.ip_address(entry.address.partition("%")[0])
                if not (address.version == 6 and address.is_link_local):
                    found.append((str(address), _prefix(entry.netmask, address.max_prefixlen)))
    return found


def _prefix(mask: str | None, longest: int) -> int:
    try:
        return int(ipaddress.ip_address(mask or "")).bit_count()
    except ValueError:
        return longest


def answer(listener: socket.socket, offer: Offer) -> tuple[int, TcpConnection] | None:
    """Take one caller and return its rank and connection; None for one that does not know the key."""
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        try:
            connection.settimeout(_CONNECT_SECONDS)
            key, rank = _HELLO.unpack(_exactly(connection, _HELLO.size))
            if hmac.compare_digest(key, offer.key):
                connection.sendall(offer.key)
                return rank, TcpConnection(connection)
        except OSError:
            pass
        connection.close()
    return None


def reach(offer: Offer, rank: int, host: str) -> TcpConnection | None:
    """Call the root by the likeliest of its addresses that answers as the root; None if none does."""
    deadline = time.monotonic() + _REACH_SECONDS
    for address, _ in sorted(offer.addresses, key=_distance(offer.host == host)):
        if time.monotonic() > deadline:
            break
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, offer.port), _CONNECT_SECONDS)
            try:
                connection.sendall(_HELLO.pack(offer.key, rank))
                if hmac.compare_digest(_exactly(connection, len(offer.key)), offer.key):
                    return TcpConnection(connection)
            except OSError:
                pass
            connection.close()
    return None


def _distance(same_host: bool) -> Callable[[tuple[str, int]], int]:
    """Return a sort key for the root's addresses: loopback if it is on this host, then those on a shared network."""
    own = [ipaddress.ip_address(address) for address, _ in _own_addresses(True)]

    def key(entry: tuple[str, int]) -> int:
        network = ipaddress.ip_network(f"{entry[0]}/{entry[1]}", strict=False)
        if network.is_loopback:
            return 0 if same_host else 3
        return 1 if any(address in network for address in own) else 2

    return key


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("closed")
        data += part
    return data
