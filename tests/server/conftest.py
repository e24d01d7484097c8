"""What tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.running import Server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """Return OpenAI's client of the module's own server."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found
