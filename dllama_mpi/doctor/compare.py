"""From hosts' answers to what there is to mend, and how both are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import printable
from . import machine, software
from .finding import Finding, Seen
from .reach import Answer


def seen_of(answers: Sequence[Answer]) -> list[Seen]:
    """Return the hosts that have answered. Of the others one line is told: that their names resolve nowhere is not."""
    lost = {a.host.name.rpartition("@")[2] for a in answers if a.report is None}
    found = []
    for answer in answers:
        if answer.report is not None:
            resolves = answer.report.get("resolves") or {}
            known = {name: address for name, address in resolves.items() if name not in lost}
            found.append(Seen(answer.host.name, answer.host.ranks, {**answer.report, "resolves": known}))
    return found


def findings(answers: Sequence[Answer]) -> list[Finding]:
    """Return what there is to mend, errors first, then by host."""
    found = [Finding("error", a.host.name, a.problem, a.remedy) for a in answers if a.report is None]
    seen = seen_of(answers)
    for host in seen:
        for rule in (*software.RULES, *machine.RULES):
            found += rule(host, seen[0])
    found += machine.twins(seen)
    order = {a.host.name: at for at, a in enumerate(answers)}
    return sorted(found, key=lambda each: (each.level != "error", order[each.host]))


def status(found: Sequence[Finding]) -> int:
    """Return the exit status: 1 with an error."""
    return int(any(each.level == "error" for each in found))


def told(answers: Sequence[Answer], found: Sequence[Finding]) -> dict[str, Any]:
    """Return all of it, JSON-ready."""
    return {
        "hosts": [
            {
                "name": a.host.name,
                "ranks": a.host.ranks,
                "problem": a.problem or None,
                "instruction_set": None if a.report is None else machine.isa(Seen(a.host.name, None, a.report)),
                "report": a.report,
            }
            for a in answers
        ],
        "findings": [
            {"level": each.level, "host": each.host, "what": each.what, "remedy": each.remedy} for each in found
        ],
        "errors": sum(each.level == "error" for each in found),
    }


# ---- tables


def tables(answers: Sequence[Answer]) -> list[tuple[list[str], list[list[str]]]]:
    """Return heads and rows of the tables for people: a row a host that has answered; "-" where nothing is known."""
    seen = seen_of(answers)
    kinds = (_software, _machine, _rest)
    found = []
    for kind in kinds:
        rows = [{"host": host.name, **kind(host)} for host in seen]
        if rows:
            found.append((list(rows[0]), [[printable(cell or "-") for cell in row.values()] for row in rows]))
    return found


def _software(host: Seen) -> dict[str, str | None]:
    packages = host.get("packages") or {}
    rest = {name: packages.get(name) for name in packages if name != "dllama_mpi"}
    mpi = host.get("mpi")
    own = None if mpi is None else f"{mpi['kind'] or '?'} {mpi['version'] or ''}".strip()
    version, digest = host.get("package", "version"), host.get("package", "digest")
    return {
        "Python": host.get("python", "version"),
        "dllama_mpi": version and f"{version} {digest[:6]}",
        **rest,
        "MPI": own,
    }


def _machine(host: Seen) -> dict[str, str | None]:
    clocks = host.get("clocks") or {}
    now, most, degrees, bits = clocks.get("now"), clocks.get("most"), host.get("temperature"), host.get("throttled")
    return {
        "hostname": host.get("hostname"),
        "processor": host.get("architecture"),
        "kernels": machine.isa(host),
        "cores": _said(host.get("cores"), "{}"),
        "MHz": None if not now or not most else f"{now:.0f}/{most:.0f}",
        "governor": ",".join(clocks.get("governors", [])),
        "GB free": _gigabytes(host, "free", "total"),
        "swap free": _gigabytes(host, "swap_free", "swap"),
        "huge pages": host.get("huge_pages"),
        "temp C": _said(degrees, "{:.0f}"),
        "throttled": None if bits is None else f"0x{bits:x}",
    }


def _rest(host: Seen) -> dict[str, str | None]:
    link, busiest = host.get("link") or {}, host.get("busiest")
    mbit = "Wi-Fi" if link.get("is_wifi") else _said(link.get("mbit"), "{}")
    return {
        "link": link.get("interface"),
        "Mbit/s": mbit,
        "duplex": link.get("duplex"),
        "clock s": _said(host.get("skew"), "{:+.1f}"),
        "cache GB": _room(host, "weights"),
        "kernels GB": _room(host, "kernels"),
        "load": _said((host.get("load") or [None])[0], "{:.2f}"),
        "busiest": None if not busiest else f"{busiest['name']} {busiest['cores']:.0%}",
    }


def _room(host: Seen, cache: str) -> str | None:
    found = host.get("caches", cache)
    return None if not found else f"{found['free'] / 1e9:.1f}" if found["is_writable"] else "read-only"


def _gigabytes(host: Seen, part: str, whole: str) -> str | None:
    found = host.get("memory")
    return None if not found else f"{found[part] / 1e9:.1f}/{found[whole] / 1e9:.1f}"


def _said(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)
