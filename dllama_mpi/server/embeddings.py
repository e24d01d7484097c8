"""Embeddings: the final hidden states of texts, their mean or the last, of length 1."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.responses import Response

from ..engine.request import Request, SamplingParams, unit
from ..errors import QueueFull, RequestError
from .errors import ApiError, unavailable
from .http import Call, JSONAnswer, unless_gone
from .outbox import EngineLoop
from .schema import EmbeddingsBody
from .served import Served

_AT_ONCE = 16  # inputs of a call that are in the engine


def prepare(served: Served, body: EmbeddingsBody) -> list[tuple[int, ...]]:
    """Return the token ids of every input.

    Raises:
        ApiError: naming the field that is wrong.
    """
    served.check_name(body.model)
    if body.dimensions is not None and body.dimensions != served.hidden_size:
        said = f"dimensions is {body.dimensions}; the model's embeddings have {served.hidden_size}, and cannot be cut"
        raise ApiError(400, said, param="dimensions")
    many = len(body.inputs) > 1
    return [tuple(served.encode(each, f"input.{i}" if many else "input")) for i, each in enumerate(body.inputs)]


async def embeddings(call: Call) -> Response:
    """Embed texts."""
    body: EmbeddingsBody = call.body
    served, engine = call.context.state.ready()
    prompts = await asyncio.to_thread(prepare, served, body)

    async def collect() -> list[np.ndarray]:
        return [hidden async for hidden in _embedded(engine, prompts, body.pooling or served.pooling)]

    found = await unless_gone(call.request, collect())
    write = _base64 if body.encoding_format == "base64" else _floats
    tokens = sum(map(len, prompts))
    data: list[Any] = [{"object": "embedding", "index": i, "embedding": write(each)} for i, each in enumerate(found)]
    return JSONAnswer(
        {
            "object": "list",
            "data": data,
            "model": body.model or served.names[0],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _embedded(engine: EngineLoop, prompts: list[tuple[int, ...]], pooling: str) -> AsyncIterator[np.ndarray]:
    """Yield each prompt's embedding (hidden,) float32, in their order."""
    for first in range(0, len(prompts), _AT_ONCE):
        part = prompts[first : first + _AT_ONCE]
        try:
            outbox = engine.submit([Request(ids, SamplingParams(), pooling=pooling) for ids in part])
        except QueueFull as error:
            raise unavailable(str(error)) from None
        except RequestError as error:
            raise ApiError(400, str(error), param="input") from None
        found: dict[int, np.ndarray] = {}
        try:
            async for index, output in outbox:
                if output.finish_reason == "abort":
                    raise unavailable("the request was ended: the server is shutting down")
                if output.hidden is not None:
                    found[index] = unit(output.hidden)
        finally:
            engine.release(outbox)
        for index in range(len(part)):
            yield found[index]


def _floats(vector: np.ndarray) -> Any:
    return vector.tolist()


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
