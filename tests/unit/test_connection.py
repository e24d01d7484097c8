"""How ranks find each other's addresses."""

from __future__ import annotations

from typing import NoReturn

import psutil
import pytest

from dllama_mpi.parallel import connection


def test_addresses_where_the_system_does_not_tell_which_interfaces_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise OSError(25, "Inappropriate ioctl for device")

    told = connection._own_addresses(False)
    assert ("127.0.0.1", 8) in told
    monkeypatch.setattr(psutil, "net_if_stats", refuse)
    assert set(connection._own_addresses(False)) >= set(told)
