"""A vLLM look-alike over HTTP.

Rules:
    1. The headers of a stream leave before anything is computed; a whole answer's leave with its body.
    2. A client that goes away frees its request in the engine at once.
    3. Errors have vLLM's bodies; faults are injected before a request is looked at.
    4. One object owns everything: `SimulatorServer` starts it, stops it, or drops dead with it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from http import HTTPStatus
from typing import Any, Protocol

import orjson
import xxhash
from aiohttp import web

from tokenway.simulator.engine.engine import Engine, Rejection
from tokenway.simulator.server.dialects import (
    BadRequestError,
    Chat,
    Completions,
    Dialect,
    Messages,
    Responses,
    prompt_ids,
    usage,
)
from tokenway.simulator.server.driver import EngineDriver, Generation, Publisher, Served
from tokenway.simulator.server.faults import FaultBoard, FaultKind, parse_fault
from tokenway.simulator.server.metrics import EngineMetrics
from tokenway.simulator.server.pooling import POOLED, Pooled
from tokenway.simulator.server.settings import ServerSettings
from tokenway.simulator.server.stored import RUNNING, Stored, StoredResponses, input_items, items_of
from tokenway.simulator.server.text import Output, TokenArray, encode, generate
from tokenway.simulator.server.tokenizer import BpeTokenizer

VERSION = "0.32.0"
IDLE_TIMEOUT_S = 5.0  # vLLM's VLLM_HTTP_TIMEOUT_KEEP_ALIVE
MAX_BODY_BYTES = 64 << 20  # above any prompt that fits a model; vLLM itself has no limit
MAX_SERVED_RECORDS = 10_000  # what /sim/state remembers
_AUDIO_TOKENS = 1_500  # Whisper's positions for 30 s, what one request of it has at most
_AUDIO_BYTES_PER_S = 16_000
_BUSY_MESSAGES = {
    Rejection.QUEUED_REQUESTS: "The engine is currently busy. Please try again later.",
    Rejection.QUEUED_TOKENS: "The engine is over its prefill token backlog limit. Please try again later.",
}


class ApiError(Exception):
    """An answer in vLLM's error shape."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param

    def response(self) -> web.Response:
        """The HTTP form."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return json_response({"error": error}, self.status)


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def decode_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: 400 in vLLM's words.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            json.loads(raw)
            message, position = "Invalid encoding", 0
        except json.JSONDecodeError as error:
            message, position = error.msg, error.pos
        except UnicodeDecodeError as error:
            message, position = error.reason, error.start
        detail = {
            "type": "json_invalid",
            "loc": f"body.{position}",
            "msg": "JSON decode error",
            "input": "<dict of 0 items>",
            "ctx": {"error": message},
        }
        raise ApiError(400, "Bad Request", f"1 validation error:\n  {detail}", f"body.{position}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "Bad Request", "1 validation error:\n  the body must be an object", "body")
    return value


class EventStream:
    """The body of one streamed answer.

    Chunks are framed here and handed to the transport directly: a step may have a hundred of them, and a
    coroutine per chunk would cost more than the chunk. The transport's buffer is bounded by the output.
    """

    def __init__(self, request: web.Request, keep_alive_s: float | None, reset_after: int | None) -> None:
        self._request = request
        self._keep_alive_s = keep_alive_s
        self._reset_after = reset_after
        self._tokens = 0
        self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})

    async def open(self, request_id: str | None) -> None:
        """Send the headers."""
        if request_id is not None:
            self._response.headers["X-Request-Id"] = request_id
        self._response.enable_chunked_encoding()
        await self._response.prepare(self._request)

    def write(self, data: bytes) -> None:
        """Send one chunk if there is anything in it and anybody to read it."""
        transport = self._request.transport
        if data and transport is not None and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def write_token(self, data: bytes) -> None:
        """Send one token's chunk, or reset the connection if a fault says so."""
        if self._tokens == self._reset_after:
            _reset(self._request)
        else:
            self._tokens += 1
            self.write(data)

    async def finish(self, done: asyncio.Future[None]) -> web.StreamResponse:
        """Wait for the end, commenting until the first token if asked to, and end the body."""
        while self._keep_alive_s is not None and not self._tokens and not done.done():
            await asyncio.wait((done,), timeout=self._keep_alive_s)
            if not self._tokens:
                self.write(b": keep-alive\n\n")
        await done
        with suppress(ConnectionResetError):
            await self._response.write_eof()
        return self._response


class SimulatorServer:
    """One simulated replica: engine, HTTP server and cache events.

    Raises:
        ValueError: The tokenizer of the settings cannot be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.engine = Engine(settings.profile)
        self.faults = FaultBoard()
        self.served: deque[Served] = deque(maxlen=MAX_SERVED_RECORDS)
        self.metrics = EngineMetrics(self.engine, settings.models[0], settings.engine_id)
        self._tokenizer = None if settings.tokenizer is None else BpeTokenizer(settings.tokenizer)
        self._driver: EngineDriver | None = None
        self._publisher: _RunningPublisher | None = None
        self._runner: web.AppRunner | None = None
        self.responses = StoredResponses()
        self._background: set[asyncio.Task[None]] = set()
        self.http_requests = 0
        self._numbers = itertools.count()
        self._started_s = int(time.time())
        self.port = settings.port

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        return f"http://{self.settings.host}:{self.port}"

    @property
    def driver(self) -> EngineDriver:
        """The running driver.

        Raises:
            RuntimeError: The server is not started.
        """
        if self._driver is None:
            raise RuntimeError("the server is not started")
        return self._driver

    async def start(self) -> None:
        """Open all sockets and start stepping; afterwards `port` is real.

        Raises:
            OSError: An address cannot be bound.
        """
        settings = self.settings
        if settings.kv_events is not None:
            # Only a replica that publishes needs ZeroMQ and msgspec.
            from tokenway.simulator.server.kv_events import KvEventPublisher

            publisher = KvEventPublisher(settings.kv_events, settings.profile.block_size, settings.engine_id)
            publisher.start()
            self._publisher = publisher
        self._driver = EngineDriver(self.engine, self.metrics, settings.time_scale, self._publisher)
        self._driver.start()
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
        app.on_response_prepare.append(_name_server)
        app.add_routes(self._routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=IDLE_TIMEOUT_S,
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, settings.host, settings.port, backlog=1024).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """End all generations with the finish reason `abort`, then close; as vLLM does on SIGTERM."""
        self.driver.abort_all()
        await asyncio.sleep(0)  # lets handlers write their last bytes
        await self._close()

    async def kill(self) -> None:
        """Reset every connection and close, as if the process had died."""
        if self._runner is not None and self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
        await self._close()

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        await self.driver.stop()
        if self._publisher is not None:
            await self._publisher.stop()

    def _routes(self) -> list[web.RouteDef]:
        def generation(dialect: type[Dialect]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._counted(request, dialect)

            return handle

        def pooling(api: Pooled) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._counted(request, api)

            return handle

        async def audio(request: web.Request) -> web.StreamResponse:
            return await self._counted(request, None)

        return [
            web.post("/v1/chat/completions", generation(Chat)),
            web.post("/v1/completions", generation(Completions)),
            web.post("/v1/responses", generation(Responses)),
            web.post("/v1/messages", generation(Messages)),
            *(web.post(path, pooling(api)) for path, api in POOLED.items()),
            web.post("/v1/messages/count_tokens", self._count_tokens),
            web.post("/v1/audio/transcriptions", audio),
            web.post("/v1/audio/translations", audio),
            web.get("/v1/responses/{id}", self._retrieve),
            web.delete("/v1/responses/{id}", self._delete),
            web.post("/v1/responses/{id}/cancel", self._cancel),
            web.get("/v1/responses/{id}/input_items", self._input_items),
            web.get("/health", self._health),
            web.route("*", "/ping", self._health),
            web.get("/v1/models", self._models),
            web.get("/version", self._version),
            web.get("/load", self._load),
            web.get("/metrics", self._metrics),
            web.get("/kv_event_sources", self._kv_event_sources),
            web.post("/tokenize", self._tokenize),
            web.post("/detokenize", self._detokenize),
            web.post("/sleep", self._sleep),
            web.post("/wake_up", self._wake_up),
            web.get("/is_sleeping", self._is_sleeping),
            web.post("/pause", self._pause),
            web.post("/resume", self._resume),
            web.get("/is_paused", self._is_paused),
            web.post("/reset_prefix_cache", self._reset_prefix_cache),
            web.post("/sim/fault", self._set_fault),
            web.get("/sim/state", self._state),
        ]

    async def _counted(
        self, request: web.Request, dialect: type[Dialect] | Pooled | None
    ) -> web.StreamResponse:
        """Answer a generation, what is pooled, or audio if it is None: counted in `/load`, faults first."""
        self.http_requests += 1
        try:
            fault = self.faults.take()
            match fault and fault.kind:
                case FaultKind.STATUS:
                    status = self.faults.fault.status
                    raise ApiError(status, HTTPStatus(status).phrase, "Injected fault.")
                case FaultKind.RESET_BEFORE:
                    _reset(request)
                    return web.Response()
                case FaultKind.HANG:
                    await asyncio.Event().wait()
            if dialect is None:
                return await self._transcribe(request)
            if isinstance(dialect, Pooled):
                return await self._pool(request, dialect)
            return await self._generate(request, dialect, fault.chunks if fault else None)
        finally:
            self.http_requests -= 1

    async def _generate(
        self, request: web.Request, dialect: type[Dialect], reset_after: int | None
    ) -> web.StreamResponse:
        asked = decode_object(await request.read())
        model = self._model(asked)
        body = self._continued(asked) if dialect is Responses else asked
        prompt = self._prompt(dialect, body)
        max_tokens = self._bound_output(len(prompt), dialect.max_tokens(body), dialect.default_max_tokens)
        number = next(self._numbers)
        request_id = request.headers.get("X-Request-Id")
        suffix = request_id or xxhash.xxh3_64_hexdigest(f"{self._started_s}-{self.port}-{number}".encode())
        generation = Generation(
            self._record(request, model, number, len(prompt)),
            prompt,
            self._say(dialect, prompt, max_tokens, body.get("ignore_eos") is True),
            asyncio.get_running_loop().create_future(),
            _text_field(body, "cache_salt"),
            request.headers.get("X-Session-ID") or _text_field(body, "session_id"),
        )
        reply = dialect(dialect.id_prefix + suffix, int(time.time()), generation, body)
        echo = (request_id or suffix) if self.settings.request_id_headers else None
        self._submit(generation)
        if isinstance(reply, Responses) and body.get("background") is True:
            stored = self._keep(body, asked, reply.pending("queued"))
            if stored is None:
                raise BadRequestError("background can only be used when `store` is true", "background")
            stored.generation = generation
            task = asyncio.create_task(self._finish_in_background(stored, reply, generation))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
            return json_response(reply.pending("queued"))
        try:
            if body.get("stream") is True:
                stream = EventStream(request, self.settings.sse_keep_alive_s, reset_after)
                return await self._stream(stream, reply, generation, echo)
            await generation.done
        finally:
            self.driver.abort(generation)
            if isinstance(reply, Responses) and generation.served.finish_reason in ("stop", "length"):
                self._keep(body, asked, reply.whole())
        response = json_response(reply.whole())
        if echo is not None:
            response.headers["X-Request-Id"] = echo
        return response

    async def _stream(
        self, stream: EventStream, reply: Dialect, generation: Generation, echo: str | None
    ) -> web.StreamResponse:
        def emit(word: bytes, finish_reason: str | None) -> None:
            stream.write_token(reply.token(word, finish_reason))
            if finish_reason is not None:
                stream.write(reply.closing())

        # No token can overtake the headers: sending those never suspends, it fills the transport's buffer.
        generation.on_token = emit
        await stream.open(echo)
        stream.write(reply.opening())
        return await stream.finish(generation.done)

    async def _pool(self, request: web.Request, api: Pooled) -> web.StreamResponse:
        body = decode_object(await request.read())
        model = self._model(body)
        prompts = api.prompts(body)
        loop = asyncio.get_running_loop()
        generations: list[Generation] = []
        try:
            for prompt in prompts:
                self._bound_output(len(prompt), 1, 1)
                record = self._record(request, model, next(self._numbers), len(prompt))
                generation = Generation(record, prompt, generate(prompt, 1, True), loop.create_future())
                self._submit(generation)
                generations.append(generation)
            await asyncio.gather(*(generation.done for generation in generations))
        finally:
            for generation in generations:
                self.driver.abort(generation)
        num_tokens = sum(generation.served.prompt_tokens for generation in generations)
        counts = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
        return json_response(
            {
                "id": f"{api.id_prefix}{generations[0].served.id}",
                "created": int(time.time()),
                "model": model,
                **api.results(body, prompts),
                "usage": {**usage(generations[0].served), **counts},
            }
        )

    async def _transcribe(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        model = self._model({"model": form.get("model")})
        upload = form.get("file")
        if not isinstance(upload, web.FileField):
            raise BadRequestError("file must be an audio file", "file")
        audio = upload.file.read()
        prompt = encode(audio[: 4 * _AUDIO_TOKENS])
        record = self._record(request, model, next(self._numbers), len(prompt))
        done = asyncio.get_running_loop().create_future()
        generation = Generation(record, prompt, generate(prompt, 16, True), done)
        self._submit(generation)
        try:
            await generation.done
        finally:
            self.driver.abort(generation)
        seconds = len(audio) // _AUDIO_BYTES_PER_S + 1
        if str(form.get("stream")).lower() != "true":
            return json_response({"text": generation.text, "usage": {"type": "duration", "seconds": seconds}})
        kind = request.path.rpartition("/")[2].removesuffix("s")
        delta = {"content": generation.text, "reasoning_content": None}
        chunk = {"id": f"trsc-{record.id}", "object": f"{kind}.chunk", "created": int(time.time())}
        choices = [{"delta": delta, "finish_reason": "stop", "stop_reason": None}]
        stream = EventStream(request, None, None)
        await stream.open(None)
        stream.write(
            b"data: " + orjson.dumps({**chunk, "model": model, "choices": choices}) + b"\n\ndata: [DONE]\n\n"
        )
        return await stream.finish(generation.done)

    def _continued(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a new response with the conversation that it builds on before its input."""
        previous = body.get("previous_response_id")
        if previous is None:
            return body
        return {**body, "input": [*self._stored(previous).conversation(), *items_of(body.get("input"))]}

    def _stored(self, response_id: Any) -> Stored:
        if not isinstance(response_id, str) or not response_id.startswith("resp_"):
            message = f"Invalid 'response_id': '{response_id}'. Expected an ID that begins with 'resp'."
            raise ApiError(400, "invalid_request_error", message, "response_id")
        stored = self.responses.get(response_id)
        if stored is None:
            message = f"Response with id '{response_id}' not found."
            raise ApiError(404, "invalid_request_error", message, "response_id")
        return stored

    def _keep(self, body: dict[str, Any], asked: dict[str, Any], response: dict[str, Any]) -> Stored | None:
        if asked.get("store") is False:
            return None
        stored = Stored(response, items_of(body.get("input")), items_of(asked.get("input")))
        self.responses.add(stored)
        return stored

    async def _finish_in_background(self, stored: Stored, reply: Responses, generation: Generation) -> None:
        stored.response = reply.pending("in_progress")
        await generation.done
        stored.generation = None
        if stored.response["status"] != "cancelled":
            stored.response = reply.whole()

    async def _retrieve(self, request: web.Request) -> web.Response:
        return json_response(self._stored(request.match_info["id"]).response)

    async def _input_items(self, request: web.Request) -> web.Response:
        return json_response(input_items(self._stored(request.match_info["id"])))

    async def _delete(self, request: web.Request) -> web.Response:
        response_id = request.match_info["id"]
        self._stored(response_id)
        self.responses.remove(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def _cancel(self, request: web.Request) -> web.Response:
        stored = self._stored(request.match_info["id"])
        if stored.generation is None or stored.response["status"] not in RUNNING:
            raise ApiError(
                400, "invalid_request_error", "Cannot cancel a synchronous response.", "response_id"
            )
        stored.response = {**stored.response, "status": "cancelled"}
        self.driver.abort(stored.generation)
        return json_response(stored.response)

    def _prompt(self, dialect: type[Dialect], body: dict[str, Any]) -> TokenArray:
        """Token ids of the prompt, shape (n,), n > 0."""
        if self._tokenizer is not None and dialect is Completions:
            given = body.get("prompt")
            if isinstance(given, list) and len(given) == 1:
                given = given[0]
            if isinstance(given, str) and given:
                return self._tokenizer.encode(given)
        return dialect.prompt(body)

    def _say(self, dialect: type[Dialect], prompt: TokenArray, max_tokens: int, ignore_eos: bool) -> Output:
        words = self._tokenizer.words if self._tokenizer is not None and dialect is Completions else None
        return generate(prompt, max_tokens, ignore_eos, words)

    def _model(self, body: dict[str, Any]) -> str:
        model = body.get("model")
        if model is None:
            return self.settings.models[0]
        if model not in self.settings.models:
            aliases = ", ".join(self.settings.models)
            raise ApiError(
                404,
                "NotFoundError",
                f"The model `{model}` does not exist. Valid aliases: {aliases}.",
                "model",
            )
        return str(model)

    def _bound_output(self, prompt_tokens: int, max_tokens: int | None, default: int) -> int:
        limit = self.settings.max_model_len
        message = f"This model's maximum context length is {limit} tokens. However, "
        hint = f"(parameter=input_tokens, value={prompt_tokens})"
        if prompt_tokens >= limit:
            message += (
                f"your prompt contains {prompt_tokens} input tokens, which exceeds this limit even without "
                f"any output tokens. Please reduce the length of the input prompt. {hint}"
            )
        elif max_tokens is not None and prompt_tokens + max_tokens > limit:
            message += (
                f"you requested {max_tokens} output tokens and your prompt contains {prompt_tokens} input "
                f"tokens, for a total of {prompt_tokens + max_tokens} tokens. Please reduce the length of "
                f"the input prompt or the number of requested output tokens. {hint}"
            )
        else:
            return max_tokens or min(default, limit - prompt_tokens)
        raise BadRequestError(message, "input_tokens")

    def _record(self, request: web.Request, model: str, number: int, prompt_tokens: int) -> Served:
        gateway_id = request.headers.get("X-Tokenway-Request-Id")
        return Served(f"{number}", gateway_id, request.path, model, prompt_tokens)

    def _submit(self, generation: Generation) -> None:
        rejection = self.driver.submit(generation)
        if rejection is not None:
            raise ApiError(503, "Service Unavailable", _BUSY_MESSAGES[rejection])
        self.served.append(generation.served)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self.driver.is_dead else self.faults.fault.health)

    async def _models(self, _: web.Request) -> web.Response:
        return json_response(
            {
                "object": "list",
                "data": [
                    {
                        "id": model,
                        "object": "model",
                        "created": self._started_s,
                        "owned_by": "vllm",
                        "root": model,
                        "parent": None,
                        "max_model_len": self.settings.max_model_len,
                        "permission": [],
                    }
                    for model in self.settings.models
                ],
            }
        )

    async def _version(self, _: web.Request) -> web.Response:
        return json_response({"version": VERSION})

    async def _load(self, _: web.Request) -> web.Response:
        return json_response({"server_load": self.http_requests})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = decode_object(await request.read())
        self._model(body)
        ids = self._prompt(Chat if "messages" in body else Completions, body)
        limit = self.settings.max_model_len
        answer = {"count": len(ids), "max_model_len": limit, "tokens": ids.tolist(), "token_strs": None}
        return json_response(answer)

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = decode_object(await request.read())
        self._model(body)
        ids = prompt_ids(body.get("tokens"))
        return json_response({"prompt": " ".join(map(str, ids.tolist()))})  # ids are hashes: no way back

    async def _count_tokens(self, request: web.Request) -> web.Response:
        body = decode_object(await request.read())
        self._model(body)
        return json_response({"input_tokens": len(Messages.prompt(body))})

    async def _metrics(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=1.0.0; charset=utf-8"}
        return web.Response(body=self.metrics.render(), headers=headers)

    async def _kv_event_sources(self, _: web.Request) -> web.Response:
        sources = (
            {} if self._publisher is None else {str(self.settings.engine_id): self._publisher.describe()}
        )
        return json_response(sources)

    async def _sleep(self, request: web.Request) -> web.Response:
        level = request.query.get("level", "1")
        if level not in ("1", "2"):
            raise BadRequestError("level must be 1 or 2", "level")
        self.driver.abort_all()
        self.engine.reset_prefix_cache()
        self.driver.pause()
        self.metrics.sleep_level = int(level)
        return json_response({"status": "sleeping", "level": int(level)})

    async def _wake_up(self, _: web.Request) -> web.Response:
        self.metrics.sleep_level = 0
        self.driver.resume()
        return json_response({"status": "awake", "tags": None})

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        return json_response({"is_sleeping": self.metrics.sleep_level > 0})

    async def _pause(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "abort")
        if mode not in ("abort", "keep"):
            raise BadRequestError("mode must be abort or keep", "mode")
        if mode == "abort":
            self.driver.abort_all()
        self.driver.pause()
        return json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        self.driver.resume()
        return json_response({"status": "resumed"})

    async def _is_paused(self, _: web.Request) -> web.Response:
        return json_response({"is_paused": self.driver.is_paused})

    async def _reset_prefix_cache(self, _: web.Request) -> web.Response:
        return json_response({"success": self.engine.reset_prefix_cache()})

    async def _set_fault(self, request: web.Request) -> web.Response:
        try:
            fault = parse_fault(decode_object(await request.read()))
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        self.faults.set(fault)
        self.driver.slowdown = fault.factor if fault.kind is FaultKind.SLOW else 1.0
        return json_response(asdict(fault))

    async def _state(self, _: web.Request) -> web.Response:
        engine, cache = self.engine, self.engine.cache
        return json_response(
            {
                "running": engine.num_running,
                "waiting": engine.num_waiting,
                "http_requests": self.http_requests,
                "served": list(self.served),
                "prefix_cache": {
                    "block_size": engine.profile.block_size,
                    "blocks": cache.num_blocks,
                    "used_blocks": cache.num_blocks - cache.num_unreferenced,
                    "cached_blocks": cache.num_keys,
                    "queries_tokens": self.metrics.prefix_queries_tokens,
                    "hits_tokens": self.metrics.prefix_hits_tokens,
                },
            }
        )


class _RunningPublisher(Publisher, Protocol):
    """What the server needs of a publisher beyond sending, spelt out so that ZeroMQ stays optional."""

    def describe(self) -> dict[str, Any]:
        """Its entry of `/kv_event_sources`."""
        ...

    async def stop(self) -> None:
        """Close its sockets."""
        ...


@asynccontextmanager
async def running(settings: ServerSettings) -> AsyncIterator[SimulatorServer]:
    """A started server for the length of a block."""
    server = SimulatorServer(settings)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except BadRequestError as error:
        return ApiError(400, "BadRequestError", error.message, error.param).response()
    except web.HTTPException as error:
        return json_response({"detail": error.reason}, error.status)


async def _name_server(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "uvicorn"


def _reset(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _text_field(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    return value if isinstance(value, str) else None
