"""A cluster described in a TOML file, to plan for computers that are not at hand.

    [network]                    # of every host that does not say otherwise
    latency_us = 60
    bandwidth_mbit = 940

    [[hosts]]
    name = "pi"                  # pi1 to pi4
    count = 4
    board = "raspberry-pi-5"     # cores and rates of `BOARDS`, or say them:
    cores = 4
    memory_gb = 7.5              # free for the program
    bandwidth_gb_per_s = 9.9     # at which decode reads weights
    prefill_gmac_per_s = 43.6    # without it no prefill is predicted
    layer_us = 50                # what a layer costs a token besides reading weights
    latency_us = 60
    bandwidth_mbit = 940

Each host runs one rank on all its cores.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..parallel.network import LinkCurve, Network
from .costs import AllReduces, Cluster, Host, Speeds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LAYER_US = 50.0  # where the file says nothing: an assumption, more than it is on a fast processor


@dataclass(frozen=True)
class Board:
    """A computer whose figures are published.

    Attributes:
        bandwidth: GB/s of weights in decode. prefill: GMAC/s. source: where the figures come from.
    """

    cores: int
    bandwidth: float
    prefill: float
    source: str


# TinyLlama-1.1B in Q8_0 with llamafile 0.7: prompt and generated tokens a second, times the 0.969 G multiply-adds of
# its layers and the 1.10 GB of its weights. Generation is published in whole tokens: 9 and 3.
_TINYLLAMA = "https://justine.lol/matmul/ (TinyLlama-1.1B q8_0, llamafile 0.7: prompt {} and eval {} tokens/s)"
BOARDS = {
    "raspberry-pi-5": Board(4, 9.9, 43.6, _TINYLLAMA.format(45, 9)),
    "raspberry-pi-4": Board(4, 3.3, 9.7, _TINYLLAMA.format(10, 3)),
}

_NUMBERS = {
    "memory_gb", "bandwidth_gb_per_s", "prefill_gmac_per_s", "layer_us", "latency_us", "bandwidth_mbit",
}  # fmt: skip
_WHOLE = {"count", "cores"}
_MOST_HOSTS = 1024  # more than any model can be cut into parts
_MAY_BE_ZERO = {"layer_us", "latency_us"}
_NETWORK = {"latency_us", "bandwidth_mbit"}


def read_cluster(path: str) -> Cluster:
    """Return the cluster that a file describes; see the module for its format.

    Raises:
        UsageError: it cannot be read, is not TOML, or says something that cannot be; one line that names the place.
    """
    try:
        described = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--hosts {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--hosts {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--hosts {path}: not TOML: {str(error).splitlines()[0]}") from None
    return _cluster(described, path)


def _cluster(described: dict[str, Any], path: str) -> Cluster:
    _known(described, {"network", "hosts"}, path)
    network, entries = described.get("network", {}), described.get("hosts", [])
    if not isinstance(network, dict):
        raise UsageError(f"--hosts {path}: network is not a table; write [network]")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"--hosts {path}: no hosts; give at least one [[hosts]] table")
    _checked(network, _NETWORK, f"{path}: [network]")
    hosts: list[Host] = []
    speeds: list[Speeds] = []
    wires: list[tuple[float, float]] = []  # latency, bytes a second
    for number, entry in enumerate(entries, 1):
        where = f"{path}: [[hosts]] {number}"
        _checked(entry, _NUMBERS | _WHOLE | {"name", "board"}, where)
        filled = {**network, **_of_board(entry, where), **entry}
        for name in ("name", "cores", "memory_gb", "bandwidth_gb_per_s", "latency_us", "bandwidth_mbit"):
            if name not in filled:
                raise UsageError(f"--hosts {where}: {name} is missing" + _hint(name))
        count = filled.get("count", 1)
        if len(hosts) + count > _MOST_HOSTS:
            raise UsageError(f"--hosts {where}: count is {count}; a cluster has at most {_MOST_HOSTS} hosts in all")
        for i in range(count):
            name = f"{filled['name']}{i + 1}" if count > 1 else filled["name"]
            read = 1e9 * filled["bandwidth_gb_per_s"]
            hosts.append(Host(name, 1, filled["cores"], None, int(1e9 * filled["memory_gb"]), read))
            speeds.append(_speeds(filled))
            wires.append((1e-6 * filled["latency_us"], 125e3 * filled["bandwidth_mbit"]))
    names = [host.name for host in hosts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--hosts {path}: two hosts are named {twice}; give each a name of its own")
    return _joined(hosts, speeds, wires)


def _joined(hosts: list[Host], speeds: list[Speeds], wires: list[tuple[float, float]]) -> Cluster:
    links = {}
    for a, b in combinations(range(len(hosts)), 2):
        first, second = sorted((hosts[a].name, hosts[b].name))
        links[first, second] = LinkCurve.of(max(wires[a][0], wires[b][0]), min(wires[a][1], wires[b][1]))
    network = Network(tuple(host.name for host in hosts), links)
    counts = tuple(tuple(speeds[:count]) for count in range(1, len(hosts) + 1))
    return Cluster(tuple(hosts), tuple(host.cores for host in hosts), network, counts, AllReduces(network))


def _speeds(filled: dict[str, Any]) -> Speeds:
    prefill, layer = filled.get("prefill_gmac_per_s"), 1e-6 * filled.get("layer_us", _LAYER_US)
    return Speeds(1e9 * filled["bandwidth_gb_per_s"], None if prefill is None else 1e9 * prefill, layer_seconds=layer)


def _of_board(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Return what an entry's board says; nothing without one."""
    name = entry.get("board")
    if name is None:
        return {}
    if name not in BOARDS:
        raise UsageError(f"--hosts {where}: board {name!r} is not known; known are {', '.join(BOARDS)}")
    board = BOARDS[name]
    return {"cores": board.cores, "bandwidth_gb_per_s": board.bandwidth, "prefill_gmac_per_s": board.prefill}


def _hint(name: str) -> str:
    if name in _NETWORK:
        return "; give it here or under [network]"
    return "; give it or a board" if name in ("cores", "bandwidth_gb_per_s") else ""


def _known(table: dict[str, Any], keys: set[str], where: str) -> None:
    unknown = next((key for key in table if key not in keys), None)
    if unknown is not None:
        raise UsageError(f"--hosts {where}: {unknown} is not known; known are {', '.join(sorted(keys))}")


def _checked(table: dict[str, Any], keys: set[str], where: str) -> None:
    """Check that a table has no other keys, and that its values can be."""
    _known(table, keys, where)
    for key, value in table.items():
        if key in ("name", "board"):
            if not isinstance(value, str) or not value:
                raise UsageError(f"--hosts {where}: {key} is {value!r}; it must be a text")
            continue
        if isinstance(value, bool) or not isinstance(value, int if key in _WHOLE else (int, float)):
            raise UsageError(f"--hosts {where}: {key} is {value!r}; it must be a {'whole ' * (key in _WHOLE)}number")
        may_be_zero = key in _MAY_BE_ZERO
        if not (value > 0 or (may_be_zero and value == 0)) or value == float("inf"):
            least = "at least 0" if may_be_zero else "above 0"
            raise UsageError(f"--hosts {where}: {key} is {value}; it must be {least}")
