"""A Raspberry Pi's Python on an x86_64 computer: emulated by QEMU, in a folder of its own; nothing of the host changes.

usage: emulated.py setup                       fetch Debian's Python for ARM, QEMU and this project's libraries
       emulated.py python BOARD                print the path of the emulated python
       emulated.py run BOARD ARGS...           run `python ARGS`, for example: run pi4 -m pytest tests/unit/test_mlp.py
       emulated.py mpiexec BOARD,... ARGS...   run `python ARGS` as one job, a rank for each board; "here": this Python
       emulated.py check [ARGS...]             run all of test_aarch64.py, with arguments for pytest

BOARD: pi4 (Cortex-A72) or pi5 (Cortex-A76, which has dot products). Needs Linux on x86_64, apt-get, dpkg-deb, Debian's
archive keyring and pip; neither root nor binfmt_misc. All of it (500 MB, 180 MB to fetch) lies in
~/.cache/dllama_mpi-aarch64, or in the folder that DLLAMA_MPI_AARCH64 names; "mpiexec" needs MPICH beside this Python.

QEMU runs code of the instruction sets of the board's core and no other, so a kernel with an instruction that the core
lacks dies as it would there. It tells nothing of speed, nor of memory that other cores see in another order. Python and
compiling take about ten times as long as on the host.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

BOARDS = {"pi4": "cortex-a72", "pi5": "cortex-a76"}
HERE = "here"
RELEASE, MINOR = "trixie", (3, 13)  # of Debian, and its Python's version
VARIABLE = "DLLAMA_MPI_AARCH64"
WHOLE = "DLLAMA_MPI_AARCH64_CHECK"  # has the tests that take long run, too
_PROJECT = Path(__file__).resolve().parents[2]
_ARCHIVE = "http://deb.debian.org/debian"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_DEBIAN = [f"python{MINOR[0]}.{MINOR[1]}", "libgomp1", "libstdc++6"]
_TESTS = ["pytest>=8.0", "hypothesis>=6.100", "gguf>=0.19"]  # what the project's tests need besides
_GLIBC = 41  # of that release: 2.41
# MPICH between ranks of one host would read another process's memory by a call that QEMU does not pass on.
ENVIRONMENT = {"MPIR_CVAR_CH4_CMA_ENABLE": "0"}


class UnavailableError(Exception):
    """The emulation cannot be had here; says why."""


def folder() -> Path:
    """Return the folder in which everything lies."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "dllama_mpi-aarch64").expanduser().absolute()


def python(board: str) -> Path:
    """Return the path of the emulated python of a board, whether or not it is there yet."""
    return folder() / "environment" / "bin" / f"python-{board}"


def mpi_version() -> str:
    """Return the version of MPICH beside this Python: all ranks of a job need the same.

    Raises:
        UnavailableError: there is none.
    """
    try:
        return importlib.metadata.version("mpich")
    except importlib.metadata.PackageNotFoundError:
        raise UnavailableError("no MPICH beside this Python: pip install 'dllama-mpi[mpich]'") from None


def requirements() -> list[str]:
    """Return what pip is to install: the project's dependencies (but for other Pythons), this MPICH, what tests need.

    Raises:
        UnavailableError: no MPICH beside this Python.
    """
    text = (_PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    named = re.findall(r'"([^"]+)"', listed.group(1))
    return [*(name for name in named if ";" not in name), f"mpich=={mpi_version()}", *_TESTS]


def setup() -> None:
    """Fetch and unpack everything that is not there yet.

    Raises:
        UnavailableError: this computer cannot do that, or the archives are out of reach.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise UnavailableError(f"emulation is for Linux on x86_64, this is {platform.system()} on {platform.machine()}")
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing or not _KEYRING.exists():
        raise UnavailableError(f"emulation needs Debian's {' and '.join(missing or [str(_KEYRING)])}")
    root, wanted = folder(), requirements()
    root.mkdir(parents=True, exist_ok=True)
    stamp, recipe = root / "ready", hashlib.sha256(repr((wanted, RELEASE, _wrapper(""))).encode()).hexdigest()
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text(encoding="ascii") == recipe:
            return
        stamp.unlink(missing_ok=True)
        if not (root / "system" / RELEASE).exists():
            _fetch_system(root)
        _fetch_libraries(root, wanted)
        for board in BOARDS:
            python(board).write_text(_wrapper(board), encoding="utf-8")
            python(board).chmod(0o755)
        _check_call([str(python("pi4")), "-c", "import numpy, mpi4py, llvmlite.binding"])
        stamp.write_text(recipe, encoding="ascii")


def _check_call(command: Sequence[str], **options: str | Path | dict[str, str]) -> None:
    """Run a command.

    Raises:
        UnavailableError: it failed; with the last line it has said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UnavailableError(f"{command[0]} failed: {said[-1] if said else f'status {done.returncode}'}")


def _fetch_system(root: Path) -> None:
    """Unpack Debian's Python for ARM into `system`, and QEMU for this host beside it, by an apt of its own."""
    apt = root / "apt"
    for old in (apt, root / "system"):
        shutil.rmtree(old, ignore_errors=True)
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources").write_text(f"deb [signed-by={_KEYRING}] {_ARCHIVE} {RELEASE} main\n", encoding="ascii")
    lines = [
        'APT::Architecture "arm64";',
        'APT::Architectures { "arm64"; "amd64"; };',
        'APT::Sandbox::User "";',
        'Acquire::Languages "none";',
        f'Dir::State "{apt}/state";',
        f'Dir::State::status "{apt}/status";',
        f'Dir::Cache "{apt}/cache";',
        f'Dir::Etc::sourcelist "{apt}/sources";',
        'Dir::Etc::sourceparts "-";',
    ]
    (apt / "configuration").write_text("\n".join(lines) + "\n", encoding="utf-8")
    env = {**os.environ, "APT_CONFIG": str(apt / "configuration")}
    _check_call(["apt-get", "-qq", "update", "--error-on=any"], env=env)
    _check_call(
        ["apt-get", "-qq", "install", "-y", "--download-only", "--no-install-recommends", *_DEBIAN, "qemu-user:amd64"],
        env=env,
    )
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        is_qemu = package.name.startswith("qemu-user_")
        _check_call(["dpkg-deb", "-x", str(package), str(apt / "qemu" if is_qemu else root / "system")])
    if not (root / "system" / "lib").exists():  # which another package of Debian's brings
        (root / "system" / "lib").symlink_to("usr/lib")
    shutil.copy2(apt / "qemu" / "usr" / "bin" / "qemu-aarch64", root / "qemu-aarch64")
    shutil.rmtree(apt)
    (root / "system" / RELEASE).touch()


def _fetch_libraries(root: Path, wanted: Sequence[str]) -> None:
    """Unpack wheels for ARM into `environment`, which is a virtual environment of the emulated Python."""
    for old in ("wheels", "environment"):
        shutil.rmtree(root / old, ignore_errors=True)
    number = "".join(map(str, MINOR))
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, _GLIBC + 1))]
    _check_call(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary=:all:"),
            *(word for name in platforms for word in ("--platform", name)),
            *("--python-version", ".".join(map(str, MINOR)), "--implementation", "cp"),
            *(word for abi in (f"cp{number}", "abi3", "none") for word in ("--abi", abi)),
            *("-d", str(root / "wheels"), *wanted),
        ]
    )
    environment = root / "environment"
    packages = environment / "lib" / f"python{MINOR[0]}.{MINOR[1]}" / "site-packages"
    places = {"data": environment, "scripts": environment / "bin", "purelib": packages, "platlib": packages}
    for wheel in sorted((root / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                top, _, rest = entry.filename.partition("/")
                kind, _, inside = rest.partition("/")
                if entry.is_dir():
                    continue
                place = places[kind] / inside if top.endswith(".data") else packages / entry.filename
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(archive.read(entry))
                place.chmod(0o755 if entry.external_attr >> 16 & 0o111 else 0o644)
    shutil.rmtree(root / "wheels")
    (environment / "bin").mkdir(exist_ok=True)
    home = root / "system" / "usr" / "bin"
    (environment / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n", encoding="utf-8")


def _wrapper(board: str) -> str:
    """Return the script that stands for a board's python: what it starts as `sys.executable` comes back to it."""
    root, exported = folder(), "\n".join(f"export {name}={value}" for name, value in ENVIRONMENT.items())
    program = root / "system" / "usr" / "bin" / f"python{MINOR[0]}.{MINOR[1]}"
    return f"""#!/bin/sh
unset LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME
{exported}
exec '{root}/qemu-aarch64' -cpu {BOARDS.get(board)} -L '{root}/system' -0 "$0" '{program}' "$@"
"""


def mpiexec_line(boards: Sequence[str], args: Sequence[str]) -> list[str]:
    """Return the line that starts one job, a rank for each board in this order ("here": this Python).

    Raises:
        UnavailableError: no MPICH beside this Python.
    """
    mpi_version()
    line = [str(Path(sys.executable).with_name("mpiexec"))]
    for i, board in enumerate(boards):
        program = sys.executable if board == HERE else str(python(board))
        line += [*([":"] if i else []), "-n", "1", program, *args]
    return line


def main() -> int:
    """Do what the command line says; a program that is to run takes this one's place."""
    command, args = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(_PROJECT)}
    boards = args[0].split(",") if args and command in ("python", "run", "mpiexec") else []
    known = [*BOARDS, HERE] if command == "mpiexec" else list(BOARDS)
    if command not in ("setup", "check") and (not boards or (command != "mpiexec" and len(boards) > 1)):
        print(__doc__, file=sys.stderr)
        return 2
    if unknown := [board for board in boards if board not in known]:
        print(f"error: {unknown[0]}: there are {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        setup()
        if command in ("setup", "python"):
            print(python(boards[0]) if boards else folder())
            return 0
        line = [str(python(boards[0])), *args[1:]] if command == "run" else []
        if command == "mpiexec":
            line = mpiexec_line(boards, args[1:])
        elif command == "check":
            env[WHOLE] = "1"
            tests = str(_PROJECT / "tests" / "hosts" / "test_aarch64.py")
            line = [sys.executable, "-m", "pytest", "-m", "slow", "-p", "no:xdist", tests, *args]
    except UnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _become(line, env)


def _become(line: list[str], env: dict[str, str]) -> NoReturn:
    os.execve(line[0], line, env)


if __name__ == "__main__":
    sys.exit(main())
