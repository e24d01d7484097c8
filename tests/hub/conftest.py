"""A hub on this machine, and the hub's real library pointed to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllama_mpi.hub import transfer
from tests.hub.small_hub import Hub, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    """A hub that the library, imported afresh, is pointed to by HF_ENDPOINT."""
    before = {name: os.environ.get(name) for name in os.environ if name.startswith(("HF_", "HUGGING"))}
    with serving(Hub()) as hub:
        _forget_library()
        for name in before:
            del os.environ[name]
        os.environ["HF_ENDPOINT"] = hub.url
        os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "0"
        yield hub
    for name in ("HF_ENDPOINT", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if value is not None})
    _forget_library()


def _forget_library() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture
def hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub with nothing on it, an empty disk and no token; nobody waits long."""
    from huggingface_hub import constants

    fresh = Hub(url=served.url)
    for name, value in vars(fresh).items():
        setattr(served, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(transfer, "PAUSES", (0.0, 0.0))
    return served
