"""The routes. Enters: an engine, the model's name, a key; leaves: the FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from microlm.core.errors import UserError
from microlm.engine import Engine, EngineService
from microlm.engine.prompts import Prompt, check_window, encode_prompt
from microlm.serve import errors
from microlm.serve.answer import Answer, Job
from microlm.serve.errors import ApiError
from microlm.serve.gate import Gate, Limits
from microlm.serve.shapes import Envelope
from microlm.serve.wire import ChatRequest, CompletionRequest, Request

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


class Desk:
    """What the routes share: the engine behind its service, and the model's card."""

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        self.engine = engine
        self.name = name
        self.limits = limits
        self.card = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "microlm",
            "max_model_len": engine.max_seq_len,
        }
        self._service: EngineService | None = None

    @property
    def service(self) -> EngineService:
        """The running engine."""
        if self._service is None:
            raise ApiError(503, "the server is not ready", "not_ready", headers={"Retry-After": "1"})
        return self._service

    def require_engine(self) -> None:
        """Refuse at once what nobody would answer."""
        if failure := self.service.failure:
            raise errors.unavailable(failure)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """The service runs as long as the application."""
        self._service = EngineService(self.engine, self.limits.max_queue)
        try:
            yield
        finally:
            service, self._service = self._service, None
            await asyncio.to_thread(service.close)

    def require_model(self, name: str) -> None:
        """Refuse a model that is not served here."""
        if name != self.name:
            message = f"the model '{errors.printable(name)}' does not exist here; see /v1/models"
            raise ApiError(404, message, "model_not_found", "model")

    async def encode(self, prompt: Prompt, param: str) -> list[int]:
        """The prompt's ids; one that is empty, wrong or leaves no room for an answer is refused."""
        try:
            ids = await asyncio.to_thread(
                encode_prompt, self.engine.tokenizer, prompt, self.engine.config.vocab_size
            )
        except UserError as e:
            raise ApiError(400, str(e), "invalid_value", param) from None
        try:
            check_window(len(ids), self.engine.max_seq_len)
        except UserError as e:
            raise ApiError(400, str(e), "context_length_exceeded", param) from None
        return ids

    def jobs(self, request: Request, prompts: list[list[int]], default_tokens: int | None) -> list[Job]:
        """Every choice of every prompt; without a limit an answer may fill the window."""
        window = self.engine.max_seq_len
        return [Job(p, s) for p in prompts for s in request.sampling(default_tokens or window - len(p))]

    def answer(self, request: Request, jobs: list[Job], chat: bool) -> Answer:
        """The response that runs these jobs."""
        return Answer(
            self.service, Envelope(self.name, chat, request.include_usage), jobs, bool(request.stream)
        )


def create_app(engine: Engine, name: str, api_key: str | None, limits: Limits | None = None) -> FastAPI:
    """The application that serves `engine` as `name`; with a key, every route but /health asks for it."""
    limits = limits or Limits()
    desk = Desk(engine, name, limits)
    app = FastAPI(
        title="MicroLM",
        docs_url=None,
        redoc_url=None,
        lifespan=desk.lifespan,
        telemetry=NO_TELEMETRY,
        redirect_slashes=False,
    )
    app.add_middleware(Gate, api_key=api_key, limits=limits)
    errors.install(app)
    _add_models(app, desk)
    _add_generation(app, desk)
    return app


def _add_models(app: FastAPI, desk: Desk) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Ready to answer, or why not: a supervisor restarts what has failed."""
        if failure := desk.service.failure:
            return JSONResponse({"status": "failed", "error": failure}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served models."""
        return {"object": "list", "data": [desk.card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One served model."""
        desk.require_model(name)
        return desk.card


def _add_generation(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat(body: ChatRequest) -> Response:
        """Answer a conversation."""
        desk.require_engine()
        desk.require_model(body.model)
        ids = await desk.encode(body.conversation, "messages")
        return desk.answer(body, desk.jobs(body, [ids], None), chat=True)

    @app.post("/v1/completions", response_class=JSONResponse)
    async def complete(body: CompletionRequest) -> Response:
        """Continue one prompt or several."""
        desk.require_engine()
        desk.require_model(body.model)
        if not 0 < len(body.prompts) * body.choices <= desk.limits.max_choices:
            raise ApiError(
                400, f"1 to {desk.limits.max_choices} answers a request", "invalid_value", "prompt"
            )
        prompts = [await desk.encode(p, "prompt") for p in body.prompts]
        return desk.answer(body, desk.jobs(body, prompts, COMPLETION_TOKENS), chat=False)
