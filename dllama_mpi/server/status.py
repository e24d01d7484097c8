"""Routes that tell of the server and the model, and those that turn text into tokens and back."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response

from .. import __version__
from .errors import ApiError
from .http import Call, JSONAnswer
from .metrics import plain
from .schema import DetokenizeBody, TemplateBody, TokenizeBody


async def health(call: Call) -> Response:
    """Say whether all ranks are ready: 200, else 503."""
    state = call.context.state
    try:
        state.ready()
    except ApiError as error:
        return JSONAnswer(error.openai() | {"status": state.phase}, error.status, error.headers)
    return JSONAnswer({"status": "ok"})


async def metrics(call: Call) -> Response:
    """Give figures to Prometheus."""
    state = call.context.state
    engine, ranks = state.engine, []
    if state.phase == "ready":
        ranks = await call.context.cluster.sums(*state.ready())
    text = call.context.metrics.text(engine.engine.snapshot() if engine is not None else None, ranks)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(call: Call, name: str) -> dict[str, Any]:
    served = call.served
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "dllama_mpi",
        "root": served.names[0],
        "max_model_len": served.context,
        "meta": {"n_vocab": served.vocab_size, "n_ctx": served.context, **served.details.get("model", {})},
        "embeddings": {"pooling": served.pooling, "normalised": True, "dimensions": served.hidden_size},
    }


async def models(call: Call) -> Response:
    """List what is served: one model under each of its names."""
    return JSONAnswer({"object": "list", "data": [_model(call, name) for name in call.served.names if name != "*"]})


async def model(call: Call) -> Response:
    """Describe one model."""
    name = call.request.path_params["name"]
    call.served.check_name(name)
    return JSONAnswer(_model(call, name))


async def props(call: Call) -> Response:
    """Tell the server's properties, as llama.cpp's server does."""
    served, engine = call.context.state.ready()
    d = served.defaults
    settings = {
        "n_ctx": served.context,
        "params": {
            "temperature": d.temperature,
            "top_k": d.top_k,
            "top_p": d.top_p,
            "min_p": d.min_p,
            "repeat_penalty": d.repeat_penalty,
            "presence_penalty": d.presence_penalty,
            "frequency_penalty": d.frequency_penalty,
            "max_tokens": d.max_tokens,
            "stop": list(d.stop),
        },
    }
    return JSONAnswer(
        {
            "default_generation_settings": settings,
            "total_slots": served.details.get("max_batch", 1),
            "model_path": served.details.get("model_path", served.names[0]),
            "model_alias": served.names[0],
            "chat_template": served.template.sources["default"] if served.template is not None else None,
            "build_info": f"dllama_mpi {__version__}",
            "tool_style": served.tool_style,
            "thinks": served.thinks,
            "cluster": served.details.get("cluster", {}),
            "engine": plain(engine.engine.snapshot()),
        }
    )


async def slots(call: Call) -> Response:
    """List the requests that are unfinished."""
    _, engine = call.context.state.ready()
    return JSONAnswer(
        [
            {
                "id": task.id,
                "is_processing": True,
                "n_prompt_tokens": task.prompt_tokens,
                "n_decoded": task.output_tokens,
                "started": task.started,
            }
            for task in engine.tasks
        ]
    )


async def tokenize(call: Call) -> Response:
    """Turn a text, or messages as the chat template renders them, into tokens."""
    body: TokenizeBody = call.body
    served = call.served
    text = body.content if body.content is not None else body.prompt

    def encode() -> list[int]:
        if body.messages is not None:
            return served.count(served.render(body.messages, body.tools), "messages")
        assert text is not None
        return served.count(text, "content", body.add_special)

    if body.messages is None and text is None:
        raise ApiError(400, "content: give a text, or messages", param="content")
    ids = await asyncio.to_thread(encode)
    tokens: list[Any] = [*ids]
    if body.with_pieces:
        tokens = [{"id": id, "piece": served.tokenizer.token_text(id)} for id in ids]
    return JSONAnswer({"tokens": tokens, "count": len(ids), "max_model_len": served.context})


async def detokenize(call: Call) -> Response:
    """Turn tokens into text."""
    body: DetokenizeBody = call.body
    served = call.served
    wrong = next((id for id in body.tokens if id >= served.vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"tokens: {wrong} is out of range 0 to {served.vocab_size - 1}", param="tokens")
    text = await asyncio.to_thread(served.tokenizer.decode, body.tokens, False)
    return JSONAnswer({"content": text, "prompt": text})


async def apply_template(call: Call) -> Response:
    """Render messages as the model reads them."""
    body: TemplateBody = call.body
    variables = dict(body.chat_template_kwargs or {})
    for name in ("messages", "tools", "add_generation_prompt"):
        variables.pop(name, None)

    def render() -> str:
        return call.served.render(body.messages, body.tools, body.add_generation_prompt, **variables)

    return JSONAnswer({"prompt": await asyncio.to_thread(render)})
