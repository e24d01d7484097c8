"""Clusters described in a file: what is read, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllama_mpi.cli import main
from dllama_mpi.errors import UsageError
from dllama_mpi.planning.cluster_file import BOARDS, read_cluster

GOOD = """
[network]
latency_us = 50
bandwidth_mbit = 1000

[[hosts]]
name = "pi"
count = 2
board = "raspberry-pi-5"
memory_gb = 7.5

[[hosts]]
name = "old"
cores = 2
memory_gb = 3
bandwidth_gb_per_s = 5.5
bandwidth_mbit = 100
latency_us = 200
layer_us = 0
"""
HOST = '[[hosts]]\nname = "x"\ncores = 4\nmemory_gb = 8\nbandwidth_gb_per_s = 10\n'
WIRE = "[network]\nlatency_us = 50\nbandwidth_mbit = 1000\n"


def written(folder: Path, text: str) -> str:
    """Write a cluster file; return its path."""
    path = folder / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_hosts_and_links(tmp_path: Path) -> None:
    cluster = read_cluster(written(tmp_path, GOOD))
    assert cluster.network.hosts == ("pi1", "pi2", "old")
    assert [(h.name, h.cores, h.free, h.ranks) for h in cluster.hosts] == [
        ("pi1", 4, 7_500_000_000, 1),
        ("pi2", 4, 7_500_000_000, 1),
        ("old", 2, 3_000_000_000, 1),
    ]
    assert cluster.threads == (4, 4, 2)
    fast, slow = cluster.network.links["pi1", "pi2"], cluster.network.links["old", "pi1"]
    assert fast.seconds(125_000) == pytest.approx(50e-6 + 1e-3)
    assert slow.seconds(125_000) == pytest.approx(200e-6 + 10e-3)  # the slower end of a link decides


def test_speeds(tmp_path: Path) -> None:
    cluster = read_cluster(written(tmp_path, GOOD))
    assert [len(speeds) for speeds in cluster.speeds] == [1, 2, 3]
    pi, _, old = cluster.speeds[-1]
    board = BOARDS["raspberry-pi-5"]
    assert (pi.decode, pi.prefill) == (1e9 * board.bandwidth, 1e9 * board.prefill)
    assert pi.layer_seconds > 0
    assert (old.decode, old.prefill, old.layer_seconds) == (5.5e9, None, 0)


def test_what_a_file_says_goes_before_its_board(tmp_path: Path) -> None:
    text = WIRE + '[[hosts]]\nname = "x"\nboard = "raspberry-pi-4"\nmemory_gb = 2\nbandwidth_gb_per_s = 4\n'
    cluster = read_cluster(written(tmp_path, text))
    assert cluster.speeds[0][0].decode == 4e9
    assert cluster.speeds[0][0].prefill == 1e9 * BOARDS["raspberry-pi-4"].prefill


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_boards_name_their_source(board) -> None:  # type: ignore[no-untyped-def]
    assert board.source.startswith("https://")


MISTAKES = {
    "not TOML": ("hosts = [", "not TOML"),
    "no hosts": (WIRE, "no hosts"),
    "hosts as one table": (WIRE + '[hosts]\nname = "x"', "no hosts"),
    "unknown board": (WIRE + '[[hosts]]\nname = "x"\nboard = "pi-9"\nmemory_gb = 8', "'pi-9' is not known"),
    "too many": (WIRE + HOST + "count = 1000000000", "at most 1024 hosts"),
    "unknown key": (WIRE + HOST + "colour = 3", "colour is not known"),
    "unknown table": (WIRE + HOST + "[power]\nwatt = 5", "power is not known"),
    "no name": (WIRE + HOST.replace('name = "x"\n', ""), "name is missing"),
    "no memory": (WIRE + HOST.replace("memory_gb = 8\n", ""), "memory_gb is missing"),
    "no rate": (WIRE + HOST.replace("bandwidth_gb_per_s = 10\n", ""), "bandwidth_gb_per_s is missing"),
    "no network": (HOST, "latency_us is missing; give it here or under [network]"),
    "negative": (WIRE + HOST.replace("= 8", "= -8"), "memory_gb is -8; it must be above 0"),
    "zero": (WIRE + HOST.replace("= 10", "= 0"), "bandwidth_gb_per_s is 0; it must be above 0"),
    "negative latency": (WIRE.replace("50", "-50") + HOST, "latency_us is -50; it must be at least 0"),
    "not a number": (WIRE + HOST.replace("= 8", '= "8"'), "memory_gb is '8'; it must be a number"),
    "truth": (WIRE + HOST.replace("= 8", "= true"), "memory_gb is True"),
    "NaN": (WIRE + HOST.replace("= 8", "= nan"), "memory_gb is nan"),
    "infinite": (WIRE + HOST.replace("= 8", "= inf"), "memory_gb is inf"),
    "half a core": (WIRE + HOST.replace("cores = 4", "cores = 1.5"), "cores is 1.5; it must be a whole number"),
    "no count": (WIRE + HOST + "count = 0", "count is 0"),
    "a name twice": (WIRE + HOST + HOST, "two hosts are named x"),
    "a number for a name": (WIRE + HOST.replace('"x"', "7"), "name is 7; it must be a text"),
}


@pytest.mark.parametrize(("text", "told"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_status_2(
    text: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_cluster(path)
    assert told in str(caught.value)
    assert path in str(caught.value)
    assert main(["plan", "--random", "tiny", "--hosts", path]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"error: {caught.value}\n"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_cluster(str(tmp_path / "none.toml"))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_cluster(str(binary))
