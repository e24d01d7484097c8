"""List or clear the weights that each host keeps of what it received from rank 0."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from .options import add_cache_option, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("action", choices=("list", "clear"), help="clear removes what no job is using")
    add_cache_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print every host's entries, or what was removed, on rank 0's stdout; one rank of a host looks."""
    from ..parallel.group import connect

    group = connect()
    from ..weights.cache import WeightCache, folder_of

    args = group.broadcast(args)
    found: list[dict[str, Any]] = []
    with group.together():
        folder = folder_of(args.cache_dir)
        if folder is not None and group.rank == group.local_ranks[0]:
            cache = WeightCache(folder)
            if args.action == "list":
                found = [_record(group.host, entry, False) for entry in cache.entries()]
            else:
                gone, kept = cache.clear()
                found = [_record(group.host, entry, entry in gone) for entry in [*gone, *kept]]
    records = [record for host in group.allgather(found) for record in host]
    if group.is_root:
        print(json.dumps({"entries": records}) if args.json else _text(records, args.action), flush=True)
    return 0


def _record(host: str, entry: Any, removed: bool) -> dict[str, Any]:
    return {
        "host": host,
        "model": entry.model,
        "weights": entry.weights,
        "slice": entry.about,
        "bytes": entry.size,
        "last_used": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.used)),
        "in_use": entry.in_use,
        "removed": removed,
        "path": str(entry.path),
    }


def _text(records: list[dict[str, Any]], action: str) -> str:
    if not records:
        return "no weights are kept"
    head = ["host", "model", "weights", "slice", "MB", "last used", "state"]
    rows = [_row(record, action) for record in records]
    counted = [r["bytes"] for r in records if action == "list" or r["removed"]]
    done = "kept" if action == "list" else "removed"
    return f"{table(head, rows)}\n{len(counted)} {done}, {sum(counted) / 1e6:,.1f} MB"


def _row(record: dict[str, Any], action: str) -> list[str]:
    what = [record["model"] or "(unfinished or damaged)", record["weights"] or "-", record["slice"] or "-"]
    return [record["host"], *what, f"{record['bytes'] / 1e6:,.1f}", record["last_used"], _state(record, action)]


def _state(record: dict[str, Any], action: str) -> str:
    if record["removed"]:
        return "removed"
    return "in use" if record["in_use"] else "-" if action == "list" else "kept"
