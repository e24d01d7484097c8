"""Parts of a Markdown file that scripts write: between two comments that name them, everything else is by hand."""

from __future__ import annotations

import sys
from pathlib import Path


def _ends(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by a script -->\n", f"<!-- end of {name} -->\n"


def part(text: str, name: str) -> str:
    """Return what stands between a part's comments.

    Raises:
        SystemExit: the comments are not there.
    """
    first, last = _ends(name)
    if text.count(first) != 1 or text.count(last) != 1:
        sys.exit(f"error: the lines {first.strip()!r} and {last.strip()!r} must be there once each")
    return text.partition(first)[2].partition(last)[0]


def replaced(text: str, name: str, new: str) -> str:
    """Return a text with another part between the comments."""
    part(text, name)
    first, last = _ends(name)
    before, _, rest = text.partition(first)
    return f"{before}{first}{new}{last}{rest.partition(last)[2]}"


def write(path: Path, name: str, new: str) -> None:
    """Replace a part of a file."""
    path.write_text(replaced(path.read_text(encoding="utf-8"), name, new), encoding="utf-8")


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table, the first `left` columns to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))
