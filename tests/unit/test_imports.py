"""The order of the rooms: who may import whom, read from the sources."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path

import pytest

import dllama_mpi

ROOT = Path(dllama_mpi.__file__).parent
PACKAGE = ROOT.name
LEVELS = (
    ("cli",),
    ("batch",),
    ("server", "planning", "doctor"),
    ("engine",),
    ("startup",),
    ("architectures",),
    ("model",),
    ("weights", "text", "hub"),
    ("parallel",),
    ("kernels",),
    ("progress",),
    ("errors", "log"),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ONLY_IN = {"mpi4py": ("parallel",), "numba": ("kernels", "model", "parallel"), "llvmlite": ("kernels", "parallel")}
FREE = (PACKAGE, f"{PACKAGE}.__main__")
"""The modules that may import anything."""


def module_name(path: Path, root: Path = ROOT) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, Path]:
    """Return every module of the package by name."""
    return {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


MODULES = source_files()


def imported(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Return the names of what a module's source imports, wherever in it: modules where known, else as written.

    `from dllama_mpi import x` counts as an import of dllama_mpi.x, so that nothing comes up through the root.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: None if is_package else -1]
            if node.level > 1:
                base = base[: 1 - node.level]
            start = ".".join(base if node.level else [])
            origin = ".".join(filter(None, (start, node.module)))
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                found.add(full if full in known or origin == PACKAGE else origin)
    return found


@functools.cache
def imports_of(module: str) -> set[str]:
    """Return what a module of the package imports."""
    path = MODULES[module]
    return imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", set(MODULES))


def room(module: str) -> str:
    """Return the room of a module of the package."""
    return module.split(".")[1]


def is_allowed(importer: str, target: str) -> bool:
    """Return whether one room may import from another."""
    return importer == target or LEVEL_OF[importer] < LEVEL_OF[target]


GUARDED = [module for module in MODULES if module not in FREE]


@pytest.mark.parametrize("module", GUARDED)
def test_arrows_run_down(module: str) -> None:
    for target in sorted(imports_of(module)):
        if target == f"{PACKAGE}.__version__" or target.split(".")[0] != PACKAGE:
            continue
        assert target in MODULES, f"{module} imports {target}: take it from the module that defines it"
        assert target not in FREE, f"{module} imports {target}"
        assert is_allowed(room(module), room(target)), f"{module} imports {target}: that arrow runs up"


@pytest.mark.parametrize("module", MODULES)
def test_outside_libraries_have_their_rooms(module: str) -> None:
    for target in imports_of(module):
        homes = ONLY_IN.get(target.split(".")[0])
        assert homes is None or (module not in FREE and room(module) in homes), f"{module} imports {target}"


def test_no_circle() -> None:
    graph = {module: imports_of(module) & set(MODULES) - {module} for module in GUARDED}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' > '.join(error.args[1])}")


def test_every_room_has_its_level() -> None:
    assert {room(module) for module in GUARDED} <= set(LEVEL_OF)
    assert {"engine", "model", "weights", "text", "parallel", "kernels", "errors", "log"} <= set(map(room, GUARDED))


def test_weights_text_and_hub_do_not_know_each_other() -> None:
    rooms = ("weights", "text", "hub")
    for first, second in product((*rooms, "errors", "log"), repeat=2):
        assert is_allowed(first, second) is (first == second or (first in rooms and second in ("errors", "log")))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import numpy.linalg as n, os", {"numpy.linalg", "os"}),
        ("from ..model import config, size", {"p.model.config", "p.model"}),
        ("from ..model.config import ModelConfig", {"p.model.config"}),
        ("from .. import errors", {"p.errors"}),
        ("from . import worker", {"p.engine.worker"}),
        ("from .worker import serve", {"p.engine.worker"}),
        ("import p.engine.worker", {"p.engine.worker"}),
        ("def f():\n    if x:\n        from mpi4py import MPI", {"mpi4py"}),
        ("if TYPE_CHECKING:\n    from ..errors import E", {"p.errors"}),
    ],
)
def test_how_imports_are_read(source: str, expected: set[str]) -> None:
    known = {"p", "p.errors", "p.model", "p.model.config", "p.engine", "p.engine.worker"}
    assert imported(source, "p.engine.llm", False, known) == expected


def test_how_a_packages_own_imports_are_read() -> None:
    known = {"p", "p.engine", "p.engine.worker", "p.errors"}
    assert imported("from .worker import serve", "p.engine", True, known) == {"p.engine.worker"}
    assert imported("from ..errors import E", "p.engine", True, known) == {"p.errors"}


def test_names_do_not_come_through_the_root() -> None:
    assert imported(f"from {PACKAGE} import LLM", f"{PACKAGE}.cli.chat", False, set(MODULES)) == {f"{PACKAGE}.LLM"}
    assert imported("from .. import LLM", f"{PACKAGE}.cli.chat", False, set(MODULES)) == {f"{PACKAGE}.LLM"}


@pytest.mark.parametrize("statement", ["import dllama_mpi", "from dllama_mpi import __version__"])
def test_importing_the_package_starts_no_mpi_and_compiles_nothing(statement: str) -> None:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "dllama_mpi" in loaded
    assert not loaded & set(ONLY_IN)


def test_the_package_gives_its_two_classes_when_asked() -> None:
    assert dllama_mpi.LLM.__module__ == "dllama_mpi.engine.llm"
    assert dllama_mpi.SamplingParams.__module__ == "dllama_mpi.engine.request"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dllama_mpi.Nothing
