"""What doctor says of hosts: its rules on made-up reports, exit statuses, tables."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dllama_mpi.doctor import probe
from dllama_mpi.doctor.compare import findings, status, tables, told
from dllama_mpi.doctor.finding import Seen
from dllama_mpi.doctor.hostfile import Host
from dllama_mpi.doctor.machine import isa
from dllama_mpi.doctor.reach import Answer
from dllama_mpi.doctor.software import least_versions, numbers
from dllama_mpi.kernels import runtime

# ---- what is compared

PIP = "on pi2 run /env/bin/python -m pip install"
CLOCKS = {"now": 1500.0, "allowed": 2400.0, "most": 2400.0, "governors": ["performance"], "driver": "cpufreq-dt"}
LINK = {"interface": "eth0", "mbit": 1000, "duplex": "full", "is_wifi": False}
CACHE = {"path": "/home/me/.cache/dllama_mpi", "free": 50e9, "is_writable": True}
MEMORY = {"total": 8e9, "free": 6e9, "swap": 2e9, "swap_free": 2e9}
GOVERNOR = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
CORE = "a core: if it may end, on pi2 run kill 7"
MPICH = {"kind": "MPICH", "version": "4.3.1", "mpiexec": "/env/bin/mpiexec", "said": "", "packages": {"mpich": "4.3.1"}}


def report(name: str = "pi2", **changes: Any) -> dict[str, Any]:
    """Return the report of a host with which nothing is wrong, but for the changes; a dict's are changes of a part."""
    whole: dict[str, Any] = {
        "hostname": name,
        "boot": f"boot of {name}",
        "user": "me",
        "python": {"version": "3.11.2", "path": "/env/bin/python", "bits": 64},
        "packages": {
            "dllama_mpi": "0.1.0", "numpy": "2.2.0", "numba": "0.61.0", "llvmlite": "0.44.0", "mpi4py": "4.0.1",
            "tokenizers": "0.21.0", "safetensors": "0.5.0",
        },
        "package": {"path": "/env/site-packages/dllama_mpi", "version": "0.1.0", "digest": "0123456789ab"},
        "mpi": MPICH,
        "architecture": "aarch64",
        "flags": ["asimd", "asimddp"],
        "cores": 4,
        "clocks": CLOCKS,
        "memory": MEMORY,
        "caches": {"weights": CACHE, "kernels": CACHE},
        "resolves": {"pi1": "10.0.0.1", "pi2": "10.0.0.2"},
        "temperature": 55.0,
        "throttled": 0,
        "huge_pages": "madvise",
        "load": [0.1, 0.1, 0.1],
        "busiest": {"pid": 7, "name": "sshd", "user": "root", "cores": 0.02},
        "link": LINK,
        "skew": 0.0,
    }  # fmt: skip
    for key, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(whole[key], dict)
        whole[key] = {**whole[key], **value} if is_part else value
    return whole


def answers(first: dict[str, Any], second: dict[str, Any], ranks: int | None = 1) -> list[Answer]:
    """Return two hosts' answers."""
    return [Answer(Host("pi1", 1), report("pi1", **first)), Answer(Host("pi2", ranks), report("pi2", **second))]


def libraries(**changes: str | None) -> dict[str, Any]:
    """Return changes of libraries."""
    return {"packages": changes}


CASES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {}, []),
    # what ranks must have alike
    ({}, libraries(numba="0.61.2"), [f"advice: pi2: numba 0.61.2, pi1 has 0.61.0: {PIP} numba==0.61.0"]),
    ({}, libraries(numba="0.60.0"), [f"error: pi2: numba 0.60.0, 0.61 is needed: {PIP} numba==0.61.0"]),
    ({}, libraries(numba="0.62.0", llvmlite="0.45.0"), [
        f"advice: pi2: numba 0.62.0, pi1 has 0.61.0: {PIP} numba==0.61.0"
    ]),
    ({}, libraries(llvmlite="0.45.0"), [f"advice: pi2: llvmlite 0.45.0, pi1 has 0.44.0: {PIP} llvmlite==0.44.0"]),
    ({}, libraries(numba=None, llvmlite=None), [f"error: pi2: numba is missing: {PIP} numba==0.61.0"]),
    (libraries(mpi4py="3.1"), libraries(mpi4py="3.1"), [
        "error: pi1: mpi4py 3.1, 4.0 is needed: on pi1 run /env/bin/python -m pip install 'mpi4py>=4.0'",
        f"error: pi2: mpi4py 3.1, 4.0 is needed: {PIP} 'mpi4py>=4.0'",
    ]),
    ({}, libraries(numpy="1.26.4"), [
        "error: pi2: numpy 1.26.4, pi1 has 2.2.0, and numpy 1 cannot read arrays that numpy 2 sends:"
        f" {PIP} numpy==2.2.0"
    ]),
    ({}, libraries(numpy="2.1.0"), [f"advice: pi2: numpy 2.1.0, pi1 has 2.2.0: {PIP} numpy==2.2.0"]),
    ({}, {"package": None}, [f"error: pi2: dllama_mpi is not installed: {PIP} dllama-mpi==0.1.0"]),
    ({}, {"package": {"version": "0.2.0"}}, [f"error: pi2: dllama_mpi 0.2.0, pi1 has 0.1.0: {PIP} dllama-mpi==0.1.0"]),
    ({}, {"package": {"digest": "ffff"}}, [
        "error: pi2: dllama_mpi 0.1.0, but other sources (ffff) than pi1 (0123456789ab): on pi1 run"
        " rsync -a --delete /env/site-packages/dllama_mpi/ pi2:/env/site-packages/dllama_mpi/"
    ]),
    ({}, {"package": {"path": "/src/dllama_mpi"}}, [
        "advice: pi2: dllama_mpi lies in /src/dllama_mpi, on pi1 in /env/site-packages/dllama_mpi:"
        f" put it at the same path, or install it on both ({PIP} dllama-mpi)"
    ]),
    ({}, {"python": {"version": "3.9.2"}}, [
        "error: pi2: Python 3.9.2, 3.10 is needed: install python3.10 or newer, or name it by --python"
    ]),
    ({}, {"python": {"version": "3.13.1"}}, [
        "advice: pi2: Python 3.13.1, pi1 has 3.11.2 (such ranks work together, but get other versions of libraries):"
        " make its environment anew with python3.11"
    ]),
    ({}, {"python": {"version": "3.11.9"}}, []),
    ({}, {"python": {"bits": 32}}, [
        "error: pi2: a 32-bit Python, for which there is no Numba: install a 64-bit system"
    ]),
    ({}, {"mpi": None}, [f"error: pi2: no MPI: {PIP} 'dllama-mpi[mpich]'"]),
    ({}, {"mpi": {"kind": None}}, [f"error: pi2: /env/bin/mpiexec is of no known MPI: {PIP} 'dllama-mpi[mpich]'"]),
    ({}, {"mpi": {"kind": "Open MPI", "version": "5.0.8"}}, [
        f"error: pi2: Open MPI 5.0.8 (/env/bin/mpiexec), pi1 has MPICH 4.3.1: {PIP} mpich==4.3.1"
    ]),
    ({}, {"mpi": {"version": "4.2.0"}}, [
        f"advice: pi2: MPICH 4.2.0 (/env/bin/mpiexec), pi1 has MPICH 4.3.1: {PIP} mpich==4.3.1"
    ]),
    ({"mpi": {**MPICH, "packages": {}}}, {"mpi": {"version": "3.4"}}, [
        "error: pi2: MPICH 3.4 (/env/bin/mpiexec), pi1 has MPICH 4.3.1: install MPICH 4.3.1, as on pi1"
    ]),
    # machines
    ({}, {"cores": 8}, [
        "advice: pi2: aarch64 neondot, 8 cores; pi1 has aarch64 neondot, 4 cores:"
        " run with --split auto, which shares out weights by speed"
    ]),
    ({}, {"flags": ["asimd"]}, [
        "advice: pi2: aarch64 neon, 4 cores; pi1 has aarch64 neondot, 4 cores:"
        " run with --split auto, which shares out weights by speed"
    ]),
    ({}, {"flags": None, "clocks": None, "memory": None, "caches": None, "link": None, "busiest": None}, []),
    ({}, {"clocks": {"governors": ["ondemand"]}}, [f"advice: pi2: governor ondemand: on pi2 run {GOVERNOR}"]),
    ({}, {"clocks": {"governors": ["powersave"], "driver": "intel_pstate"}}, []),
    ({}, {"clocks": {"allowed": 1500.0}}, [
        "advice: pi2: clock limited to 1500 MHz of 2400: on pi2 run"
        " echo 2400000 | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_max_freq"
    ]),
    ({}, {"memory": {"free": 0.3e9}}, [
        "advice: pi2: 0.30 GB of 8.00 GB memory free: end what takes it: on pi2 run ps aux --sort=-rss | head"
    ]),
    ({}, {"memory": {"swap_free": 1e9}}, [
        "advice: pi2: 1.00 GB lie in swap: on pi2 run sudo swapoff -a && sudo swapon -a, with memory free"
    ]),
    ({}, {"caches": {"weights": {**CACHE, "is_writable": False}}}, [
        f"advice: pi2: {CACHE['path']} cannot be written by me, so that weights are received anew at every start:"
        f" on pi2 run sudo mkdir -p {CACHE['path']} && sudo chown -R me {CACHE['path']}"
    ]),
    ({}, {"caches": {"kernels": {**CACHE, "path": "/k", "free": 1e9}}}, [
        "advice: pi2: 1.00 GB free for /k: make room, or on pi2 run /env/bin/python -m dllama_mpi cache clear"
    ]),
    ({}, {"temperature": 84.6}, ["advice: pi2: 85 degrees Celsius: cool it: a fan or heat sink"]),
    ({}, {"throttled": 0x50005}, [
        "advice: pi2: undervoltage, throttled now: use the maker's power supply and a short cable"
    ]),
    ({}, {"throttled": 0x80000}, [
        "advice: pi2: at its limit of temperature since its start: cool it: a fan or heat sink"
    ]),
    ({}, {"huge_pages": "never"}, [
        "advice: pi2: transparent huge pages are off; weights are read slower: on pi2 run"
        " echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    ]),
    ({}, {"busiest": {"cores": 0.9, "name": "chromium", "user": "kid"}}, [
        f"advice: pi2: chromium of kid (process 7) takes 90% of {CORE}"
    ]),
    ({}, {"load": [3.0, 1.0, 1.0]}, ["advice: pi2: load 3.00 on 4 cores: on pi2 look with top what runs"]),
    ({}, {"link": {"is_wifi": True, "interface": "wlan0", "mbit": None}}, [
        "advice: pi2: wlan0 is Wi-Fi, whose latency each layer pays for twice: use a cable"
    ]),
    ({}, {"link": {"duplex": "half", "mbit": 100}}, [
        "advice: pi2: eth0 is half duplex: on pi2 run sudo ethtool -s eth0 autoneg on; else change cable or switch port"
    ]),
    ({}, {"link": {"mbit": 100}}, [
        "advice: pi2: eth0 runs at 100 Mbit/s: use a gigabit switch and cables of category 5e or better"
    ]),
    ({}, {"skew": -3600.0}, [
        "advice: pi2: its clock is 3600 s behind this host's: on pi2 run sudo timedatectl set-ntp true"
    ]),
    ({}, {"skew": 1.0}, []),
    ({}, {"resolves": {"pi1": None}}, [
        "error: pi2: cannot resolve pi1: add a line ADDRESS pi1 to /etc/hosts on pi2"
    ]),
    ({"resolves": {"pi2": None}}, {}, [
        "advice: pi1: cannot resolve pi2: add a line ADDRESS pi2 to /etc/hosts on pi1"
    ]),
    ({}, {"resolves": {"pi1": "127.0.1.1"}}, [
        "error: pi2: takes pi1 for itself (127.0.1.1): correct pi1 in /etc/hosts on pi2"
    ]),
    ({}, {"hostname": "pi1"}, [
        "error: pi2: is named pi1 like pi1: their ranks take each other for neighbours and share cores:"
        " on pi2 run sudo hostnamectl set-hostname NAME, a name of its own"
    ]),
    ({}, {"hostname": "pi1", "boot": "boot of pi1"}, [
        "advice: pi2: is the same machine as pi1: keep one of the names"
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "expected"), CASES)
def test_what_there_is_to_mend(first: dict[str, Any], second: dict[str, Any], expected: list[str]) -> None:
    found = findings(answers(first, second))
    assert [str(each) for each in found] == expected
    assert status(found) == any(line.startswith("error") for line in expected)


def test_more_ranks_than_cores() -> None:
    (found,) = findings(answers({}, {}, ranks=8))
    assert str(found) == "advice: pi2: 8 ranks on 4 cores: give it 4 at most; one with all is fastest"


def test_open_mpi_needs_no_names() -> None:
    open_mpi = {"kind": "Open MPI", "version": "5.0.8"}
    (found,) = findings(answers({"mpi": open_mpi}, {"mpi": open_mpi, "resolves": {"pi1": None}}))
    assert found.level == "advice"


def test_errors_come_first_then_hosts_in_order() -> None:
    lost = Answer(Host("pi3"), None, "no such name", "correct it")
    own = report("pi1", throttled=1, resolves={"pi1": "10.0.0.1", "pi3": None})
    found = findings([Answer(Host("pi1"), own), *answers({}, libraries(numpy=None, numba="0.61.1"))[1:], lost])
    assert [(each.level, each.host) for each in found] == [
        ("error", "pi2"),
        ("error", "pi3"),
        ("advice", "pi1"),
        ("advice", "pi2"),
    ]


def test_a_host_of_which_nothing_is_known_is_no_crash() -> None:
    """Whatever could not be found out is None, and that by itself is no advice."""
    nothing = dict.fromkeys(report()) | {"resolves": {}}
    for order in ([nothing, report("pi1")], [report("pi1"), nothing]):
        both = [Answer(Host(f"pi{at}"), each) for at, each in enumerate(order)]
        missing = {each.what.split()[0] for each in findings(both)}
        assert missing >= {"dllama_mpi", "numpy", "mpi4py", "no"}
        assert len(tables(both)) == 3


def test_tables_and_json_have_every_host() -> None:
    given = [*answers({}, {}), Answer(Host("pi3"), None, "no such name", "correct it")]
    for head, rows in tables(given):
        assert [row[0] for row in rows] == ["pi1", "pi2"]
        assert {len(row) for row in rows} == {len(head)}
    whole = json.loads(json.dumps(told(given, findings(given))))
    assert [host["problem"] for host in whole["hosts"]] == [None, None, "no such name"]
    assert whole["hosts"][0]["instruction_set"] == "neondot"
    assert whole["findings"] == [{"level": "error", "host": "pi3", "what": "no such name", "remedy": "correct it"}]
    assert whole["errors"] == 1


def test_instruction_sets_are_those_of_the_kernels() -> None:
    told_by_linux = Seen("here", None, {"flags": probe.flags()})
    if told_by_linux.get("flags") is None:
        pytest.skip("the system shows no flags of its processor")
    assert isa(told_by_linux) == runtime.host_isas()[0]


def test_least_versions_are_those_of_the_package() -> None:
    assert set(least_versions()) == {"numpy", "numba", "mpi4py", "tokenizers", "safetensors"}
    assert numbers(least_versions()["numba"]) >= (0, 61)
    assert numbers("1.10.0rc1") == (1, 10, 0)
