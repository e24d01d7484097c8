"""The energy that a host uses, where it can tell: its processors' packages, or the rails of a Raspberry Pi 5's board.

Disks, network, memory outside of a package and losses of the power supply are not in it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Protocol

_SYSFS = Path("/sys/class/powercap")
_SAMPLE_SECONDS, _IDLE_SECONDS = 0.5, 5.0  # between two readings of power; unasked, until there are no more
_RAIL = re.compile(r"(\w+)_([AV]) (?:current|volt)\(\d+\)=([\d.]+)[AV]")


class Meter(Protocol):
    """Counts a host's energy."""

    def joules(self) -> float:
        """Return the energy used since the meter was made."""


class Packages:
    """What the counters of a host's processor packages tell (RAPL: Intel's and AMD's), which wrap around."""

    def __init__(self, sysfs: Path = _SYSFS) -> None:
        """Find the counters that may be read; usually root alone may. sysfs: the folder of Linux's power zones."""
        self._counters: list[_Counter] = []
        for zone in sorted(sysfs.glob("intel-rapl:*")):
            with contextlib.suppress(OSError, ValueError):
                if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                    self._counters.append(_Counter(zone))

    def __bool__(self) -> bool:
        return bool(self._counters)

    def joules(self) -> float:
        """Return the energy used since the meter was made. To be called before a counter wraps around twice."""
        return sum(counter.read() for counter in self._counters) / 1e6


class _Counter:
    """One package's energy, in microjoules.

    Raises:
        OSError, ValueError: it cannot be read.
    """

    def __init__(self, zone: Path) -> None:
        self._most = int((zone / "max_energy_range_uj").read_text())
        self._file = os.open(zone / "energy_uj", os.O_RDONLY | os.O_CLOEXEC)  # kept: it is read after every step
        self._last, self._sum = self._now(), 0

    def _now(self) -> int:
        return int(os.pread(self._file, 32, 0))

    def read(self) -> int:
        """Return the energy since the counter was found; what it was before, if it cannot be read any more."""
        with contextlib.suppress(OSError, ValueError):
            now = self._now()
            self._sum += now - self._last + (self._most if now < self._last else 0)
            self._last = now
        return self._sum


class Board:
    """What the power controller of a Raspberry Pi 5 tells: currents and voltages of rails, summed up over time.

    A thread reads them every half second while somebody asks for the energy.
    """

    def __init__(self, seconds: float = _SAMPLE_SECONDS) -> None:
        """Look whether there is one. seconds: between two readings."""
        self._seconds = seconds
        self._lock = threading.Lock()
        self._joules, self._power = 0.0, self._watts()  # the latter at `_read`, and taken to last until the next time
        self._read = self._asked = time.monotonic()
        self._runs = False

    def __bool__(self) -> bool:
        return self._power is not None

    def joules(self) -> float:
        """Return the energy used since the meter was made, without times in which nobody asked for it."""
        with self._lock:
            now = self._asked = time.monotonic()
            if not self._runs:
                self._runs, self._read = True, now
                threading.Thread(target=self._sample, name="energy", daemon=True).start()
            return self._joules + self._since(now)

    def _since(self, now: float) -> float:
        return (now - self._read) * (self._power or 0.0)

    def _sample(self) -> None:
        while self._runs:
            watts = self._watts()
            with self._lock:
                now = time.monotonic()
                self._joules += self._since(now)
                self._read, self._power = now, self._power if watts is None else watts
                self._runs = now - self._asked <= _IDLE_SECONDS
            time.sleep(self._seconds)

    @staticmethod
    def _watts() -> float | None:
        """Return the power of all rails now, or None if nothing tells."""
        if shutil.which("vcgencmd") is None:
            return None
        command = ["vcgencmd", "pmic_read_adc"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
            return rails_power(done.stdout)
        return None


def rails_power(text: str) -> float | None:
    """Return the watts that pmic_read_adc's lines, such as " VDD_CORE_A current(7)=0.78A", add up to; None if to none.

    Voltages of what is no rail (the supply) have no current beside them, and do not count.
    """
    found = {(name, kind): float(value) for name, kind, value in _RAIL.findall(text)}
    rails = [name for name, kind in found if kind == "A" and (name, "V") in found]
    return sum(found[name, "A"] * found[name, "V"] for name in rails) if rails else None


@functools.cache
def host_meter() -> Meter | None:
    """Return the meter of this host, the same for all of a process; None if there is none."""
    return Packages() or Board() or None
