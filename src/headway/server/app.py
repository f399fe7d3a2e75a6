"""The application: endpoints, the gate in front of them, and the engine's start and stop."""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import headway
from headway.server import chat, completions, errors
from headway.server.async_engine import AsyncEngine, Engine
from headway.server.context import ServerContext, ServerSettings
from headway.server.errors import ApiError
from headway.server.generation import CLIENT_GONE, STATUS_KEY, ClientGoneError, respond, unless_gone
from headway.server.logprobs import TokenTexts
from headway.server.metrics import Metrics
from headway.server.protocol import ChatCompletionRequest, CompletionRequest

GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
OPEN_PATHS = frozenset({"/health"})
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The OpenAI-compatible application around an engine. ``app.state.context`` holds its parts.

    The engine's thread starts and stops with the application, once.
    """
    asynchronous = AsyncEngine(engine)
    context = ServerContext(
        engine=asynchronous,
        settings=settings,
        metrics=Metrics(lambda: asynchronous.stats),
        texts=TokenTexts(engine.tokenizer),
        created=int(time.time()),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asynchronous.start()
        yield
        await asynchronous.stop()

    app = FastAPI(title="Headway", version=headway.__version__, lifespan=lifespan)
    app.state.context = context
    errors.install(app)
    _add_generation(app, context)
    _add_information(app, context)
    app.add_middleware(Gate, context=context)
    return app


def _add_generation(app: FastAPI, context: ServerContext) -> None:
    @app.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        arrival = time.perf_counter()

        async def work() -> Response:
            return await respond(context, request, await completions.build(context, body), arrival)

        return await _unless_gone(request, work())

    @app.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Continue a conversation."""
        arrival = time.perf_counter()

        async def work() -> Response:
            return await respond(context, request, await chat.build(context, body), arrival)

        return await _unless_gone(request, work())


async def _unless_gone(request: Request, work: Any) -> Response:
    try:
        response: Response = await unless_gone(request.receive, work)
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)
    return response


def _add_information(app: FastAPI, context: ServerContext) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": context.created,
            "owned_by": "headway",
            "max_model_len": context.engine.engine.max_model_len,
            "vocab_size": context.engine.engine.model_config.vocab_size,
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The served model, under each of its names."""
        return {"object": "list", "data": [card(name) for name in context.model_names]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """One model's card."""
        if name not in context.model_names:
            listed = " or ".join(repr(known) for known in context.model_names)
            message = f"model: {name!r} is not served here; want {listed}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return card(name)

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 when ready, 503 while draining or after the engine has failed for good."""
        if context.engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": context.engine.failure}, 503)
        if context.traffic.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(context.metrics.render(), headers={"content-type": METRICS_TYPE})


class Gate:
    """Asks for the key, refuses work while the server drains, and counts who is inside."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        generates = scope["path"] in GENERATION_PATHS
        refusal = self._refusal(scope, generates)
        app = self._app if refusal is None else refusal.response()
        if not generates:
            await app(scope, receive, send)
            return
        await self._counted(app, scope, receive, send)

    def _refusal(self, scope: Scope, generates: bool) -> ApiError | None:
        if scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            message = "want the header 'Authorization: Bearer KEY' with this server's API key"
            return ApiError(
                401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )
        if generates and self._context.traffic.draining:
            message = "the server is shutting down; send the request to another one"
            return ApiError(
                503, message, code="draining", headers={"retry-after": "5", "connection": "close"}
            )
        return None

    def _has_key(self, scope: Scope) -> bool:
        key = self._context.settings.api_key
        if key is None:
            return True
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), key.encode())

    async def _counted(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500

        async def observing(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._context.traffic.enter()
        try:
            await app(scope, receive, observing)
        finally:
            self._context.traffic.leave()
            outcome = str(scope.get(STATUS_KEY, status))
            self._context.metrics.requests.labels(scope["path"], outcome).inc()
