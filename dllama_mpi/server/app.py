"""The application: one table of routes, which the OpenAPI document is made of, too."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route as Path_
from starlette.types import ASGIApp

from .. import __version__
from . import responses, status
from .anthropic_schema import CountBody, MessagesBody
from .chat import chat
from .cluster import ClusterView, cluster
from .completions import completions
from .embeddings import embeddings
from .errors import ApiError
from .gate import Gate, GateOptions
from .http import Call, Context, JSONAnswer, Route, endpoint
from .messages import count_tokens, messages
from .metrics import Metrics
from .responses_schema import ResponsesBody
from .schema import ChatBody, CompletionBody, DetokenizeBody, EmbeddingsBody, TemplateBody, TokenizeBody
from .served import State

PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def _page(request: Request) -> Response:
    """Give a file of the page."""
    return FileResponse(PAGE / (request.url.path.strip("/") or "index.html"), headers=_PAGE_HEADERS)


async def openapi(call: Call) -> Response:
    """Describe all routes."""
    return JSONAnswer(document())


ROUTES: tuple[Route, ...] = (
    Route("POST", "/v1/chat/completions", chat, "Answer a conversation", ChatBody),
    Route("POST", "/v1/completions", completions, "Continue texts", CompletionBody),
    Route("POST", "/v1/embeddings", embeddings, "Turn texts into vectors", EmbeddingsBody),
    Route("POST", "/v1/messages", messages, "Answer a conversation as Anthropic's API does", MessagesBody),
    Route("POST", "/v1/messages/count_tokens", count_tokens, "Count the tokens of a conversation", CountBody),
    Route("POST", "/v1/responses", responses.create, "Make a response", ResponsesBody),
    Route("GET", "/v1/responses/{id}", responses.retrieve, "Give a response that was remembered"),
    Route("DELETE", "/v1/responses/{id}", responses.delete, "Forget a response"),
    Route("GET", "/v1/models", status.models, "List what is served"),
    Route("GET", "/v1/models/{name:path}", status.model, "Describe one model"),
    Route("GET", "/health", status.health, "Say whether all ranks are ready", is_open=True),
    Route("GET", "/metrics", status.metrics, "Give figures to Prometheus"),
    Route("POST", "/tokenize", status.tokenize, "Turn a text or messages into tokens", TokenizeBody),
    Route("POST", "/detokenize", status.detokenize, "Turn tokens into text", DetokenizeBody),
    Route("POST", "/apply-template", status.apply_template, "Render messages as the model reads them", TemplateBody),
    Route("GET", "/props", status.props, "Tell the server's properties"),
    Route("GET", "/slots", status.slots, "List the requests that are unfinished"),
    Route("GET", "/cluster", cluster, "Tell what ranks and the engine are doing"),
    Route("GET", "/openapi.json", openapi, "Describe all routes", is_open=True),
)


def fields_of(models: list[type[BaseModel]]) -> frozenset[str]:
    """Return the names of all fields of models and of what they hold."""
    _, found = models_json_schema([(model, "validation") for model in models], ref_template="{model}")
    return frozenset(name for each in found.get("$defs", {}).values() for name in each.get("properties", {}))


def build(state: State, metrics: Metrics, options: GateOptions) -> ASGIApp:
    """Return the application."""
    context = Context(state, metrics, responses.Store(), ClusterView())
    fields = fields_of([route.body for route in ROUTES if route.body is not None])
    paths = [Path_(route.path, endpoint(route, context, fields), methods=[route.method]) for route in ROUTES]
    paths += [Path_(path, _page, methods=["GET"]) for path in sorted(page_paths())]
    app: ASGIApp = Starlette(routes=paths, exception_handlers={HTTPException: _not_found})
    opened = frozenset(route.path for route in ROUTES if route.is_open) | page_paths()
    gate = Gate(app, _with_open(options, opened), metrics.answered)
    if not options.origins:
        return gate
    return CORSMiddleware(gate, allow_origins=options.origins, allow_methods=["*"], allow_headers=["*"])


def page_paths() -> frozenset[str]:
    """Return the paths of the page's files: whoever has no key may see it, and give one there."""
    return frozenset({"/", *(f"/{each.name}" for each in PAGE.iterdir())})


def _with_open(options: GateOptions, paths: frozenset[str]) -> GateOptions:
    return replace(options, open_paths=options.open_paths | paths)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    said = {404: f"there is no route {path[:200]}", 405: f"{path[:200]} does not take {request.method}"}
    found = ApiError(error.status_code, said.get(error.status_code, error.detail))
    return JSONAnswer(found.body(path), found.status, dict(error.headers or {}))


def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    models = list({route.body: None for route in ROUTES if route.body is not None})
    refs, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for route in ROUTES:
        operation: dict[str, Any] = {
            "summary": route.summary,
            "operationId": route.handler.__name__,
            "responses": {"200": {"description": "OK"}, "default": {"$ref": "#/components/responses/Error"}},
        }
        if route.body is not None:
            schema = refs[(route.body, "validation")]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        names = [each.removesuffix(":path") for each in re.findall(r"{([^}]*)}", route.path)]
        if names:
            operation["parameters"] = [
                {"name": each, "in": "path", "required": True, "schema": {"type": "string"}} for each in names
            ]
        if not route.is_open:
            operation["security"] = [{}, {"key": []}]
        paths.setdefault(route.path.replace(":path", ""), {})[route.method.lower()] = operation
    error = {"description": "Error", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dllama_mpi", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "responses": {"Error": error},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
