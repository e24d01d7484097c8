"""Commands in the documents: finding them, and holding their options against the programs they name."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dllama_mpi.cli import COMMANDS, parser
from tests.mpi.launch import ROOT

DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "slurm/README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)
PI_PAGE = ROOT / "docs" / "raspberry-pi.md"  # whose commands run on hosts
SHELLS = ("sh", "console")
LANGUAGES = (*SHELLS, "text", "toml", "python", "yaml", "ini")

# Options of other programs, which the documents give to them, or name.
MPIEXEC = {"-n", "-np", "-f", "-hosts", "-hostfile", "--hostfile", "--host", "--bind-to", "--mca"}
SBATCH = {"--nodes", "--ntasks-per-node", "--time", "--array", "--signal", "--batch", "--cpus-per-task", "--exclusive",
          "--hint", "--mpi", "--bind"}  # fmt: skip
OTHERS = {"--map-by", "--allow-run-as-root", "-K", "--kill-on-bad-exit", "-iface"} | MPIEXEC | SBATCH
_SCRIPTS = {"generate": "generate", "serve": "serve", "batch": "batch", "bench_scaling": "bench"}  # slurm's
_VALUES = {"N": "2", "F": "f16", "I/N": "0/2"}  # of an option whose values are not any text
_OPERATORS = {"|", "||", "&&", ";", "&", ">", ">>", "2>&1"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of its first line, its text."""

    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a document, without its comment."""

    file: Path
    line: int
    text: str

    @property
    def name(self) -> str:
        """Where it is."""
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def blocks(path: Path) -> list[Block]:
    """Return a document's fenced blocks."""
    found, inside, language, begin = [], False, "", 0
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            continue
        if inside:
            indent = len(line) - len(line.lstrip())
            text = "\n".join(each[indent:] for each in lines[begin : number - 1])
            found.append(Block(language, begin + 1, text))
        inside, language, begin = not inside, line.strip()[3:], number
    assert not inside, f"{path}: a fence is not closed"
    return found


def commands(path: Path) -> list[Command]:
    """Return the commands of a document's blocks for the shell; of a `console` those after $."""
    found = []
    for block in blocks(path):
        if block.language not in SHELLS:
            continue
        for number, text in _joined(block.text.split("\n")):
            if block.language == "console":
                if not text.startswith("$ "):
                    continue
                text = text[2:]
            if said := _without_comment(text):
                found.append(Command(path, block.line + number, said))
    return found


def _joined(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield commands with the number of their first line; a backslash or a here-document joins lines."""
    at = 0
    while at < len(lines):
        first, text = at, lines[at]
        while text.endswith("\\"):
            at += 1
            text = text[:-1].rstrip() + " " + lines[at].lstrip()
        if here := re.search(r"<<\s*'?(\w+)'?", text):
            end = lines.index(here[1], at + 1)
            text = "\n".join([text, *lines[at + 1 : end + 1]])
            at = end
        yield first, text
        at += 1


def _without_comment(text: str) -> str:
    if "<<" in text:
        return text
    for match in re.finditer(r"(?:^|\s)#", text):
        before = text[: match.start()]
        with contextlib.suppress(ValueError):  # inside of quotes
            shlex.split(before)
            return before.strip()
    return text.strip()


def spans(path: Path) -> list[str]:
    """Return what stands between backticks in the running text."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", text)]


# ---- holding options against programs


def is_of_the_program(text: str) -> bool:
    """Return whether a text between backticks is a command that can be checked."""
    return text.startswith(("python -m dllama_mpi", "mpiexec ", "mpirun ", "python benchmarks/"))


def check(text: str) -> None:
    """Hold a command's options against the program it starts; of other programs' commands nothing is known.

    Raises:
        AssertionError: an option, a command or a script is not there.
    """
    words = shlex.split(text.partition("<<")[0], comments=True)
    words = words[: next((at for at, word in enumerate(words) if word in _OPERATORS), len(words))]
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    if "dllama_mpi" in words and words[(at := words.index("dllama_mpi")) - 1] == "-m":
        _check_launcher(words[: at - 2])
        parse(words[at + 1 :])
    elif (script := next((word for word in words if word.startswith("benchmarks/")), None)) is not None:
        _check_launcher(words[: words.index(script) - 1])
        _check_script(script, words[words.index(script) + 1 :])
    elif words and words[0] == "sbatch":
        _check_sbatch(words[1:])


_parser = functools.cache(parser)


def parse(given: Sequence[str]) -> None:
    """Have the program's own parser read arguments."""
    words = [_VALUES.get(word, word) for word in given]
    if not words or words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        words.insert(0, "generate")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = _parser().parse_args(words)
    except SystemExit:
        raise AssertionError(f"{shlex.join(given)}: {said.getvalue()}") from None
    if words[0] == "launch":
        parse(args.rest[1:])


def _check_launcher(words: Sequence[str]) -> None:
    if words:
        strange = [word for word in words[1:] if word.startswith("-") and word not in MPIEXEC]
        assert words[0] in ("mpiexec", "mpirun"), words
        assert not strange, f"{words[0]} {strange}"


def _check_script(script: str, words: Sequence[str]) -> None:
    assert (ROOT / script).is_file(), script
    strange = [word for word in words if re.match(r"--?[a-z]", word) and word not in options()]
    assert not strange, f"{script} {strange}"


def _check_sbatch(words: Sequence[str]) -> None:
    at = next(at for at, word in enumerate(words) if word.endswith(".sbatch"))
    assert (ROOT / words[at]).is_file(), words[at]
    strange = [word for word in words[:at] if word.partition("=")[0] not in SBATCH]
    assert not strange, f"sbatch {strange}"
    first = next((i for i, word in enumerate(words) if i > at and word.startswith("-")), len(words))
    needed = ["--input", "IN", "--output", "OUT"] if Path(words[at]).name == "batch.sbatch" else []
    parse([_SCRIPTS[Path(words[at]).stem], *needed, *words[first:]])


@functools.cache
def options() -> frozenset[str]:
    """Return all options of the program's commands and of the scripts in benchmarks/."""
    found = set()
    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= {name for each in sub._actions for name in each.option_strings}
    for script in (ROOT / "benchmarks").glob("*.py"):
        found |= set(re.findall(r'"(--?[a-z][\w-]*)"', script.read_text()))
    return frozenset(found | {"--help", "--version"})


def strange_options(span: str) -> list[str]:
    """Return the options between two backticks that no program has; of other programs' commands nothing is known."""
    first = span.split()[0]
    if not (first.startswith("-") or first in COMMANDS or is_of_the_program(span)):
        return []
    words = re.findall(r"(?:^|[\s\[(])(--?[a-zA-Z][\w-]*)", span)
    return [word for word in words if word not in options() | OTHERS]
