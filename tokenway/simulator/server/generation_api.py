"""Generations, embeddings, transcriptions and token counts over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import orjson
import xxhash
from aiohttp import web

from tokenway.simulator.engine.engine import Rejection
from tokenway.simulator.server.answers import ApiError, decode_object, json_response
from tokenway.simulator.server.compaction import Compaction
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
from tokenway.simulator.server.driver import Generation, Served
from tokenway.simulator.server.event_stream import EventStream, reset
from tokenway.simulator.server.faults import FaultKind
from tokenway.simulator.server.pooling import POOLED, Pooled
from tokenway.simulator.server.replica import Replica
from tokenway.simulator.server.response_api import ResponseApi
from tokenway.simulator.server.text import Output, TokenArray, encode, generate

_AUDIO_TOKENS = 1_500  # Whisper's positions for 30 s, what one request of it has at most
_AUDIO_BYTES_PER_S = 16_000
_BUSY_MESSAGES = {
    Rejection.QUEUED_REQUESTS: "The engine is currently busy. Please try again later.",
    Rejection.QUEUED_TOKENS: "The engine is over its prefill token backlog limit. Please try again later.",
}


class GenerationApi:
    """All that makes the engine of one replica compute.

    Args:
        replica: Whose engine.
        responses: Where responses are kept, and those that a new one builds on.
    """

    def __init__(self, replica: Replica, responses: ResponseApi) -> None:
        self._replica = replica
        self._responses = responses
        self._background: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()

    def routes(self) -> list[web.RouteDef]:
        """All of it."""

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
            web.post("/v1/responses/compact", generation(Compaction)),
            web.post("/v1/responses/input_tokens", self._input_tokens),
            web.post("/v1/messages", generation(Messages)),
            *(web.post(path, pooling(api)) for path, api in POOLED.items()),
            web.post("/v1/messages/count_tokens", self._count_tokens),
            web.post("/v1/audio/transcriptions", audio),
            web.post("/v1/audio/translations", audio),
            *(web.post(path, self._tokenize) for path in ("/tokenize", "/v1/tokenize")),
            *(web.post(path, self._detokenize) for path in ("/detokenize", "/v1/detokenize")),
        ]

    async def _counted(
        self, request: web.Request, dialect: type[Dialect] | Pooled | None
    ) -> web.StreamResponse:
        """Answer a generation, what is pooled, or audio if it is None: counted in `/load`, faults first."""
        self._replica.http_requests += 1
        try:
            fault = self._replica.faults.take()
            match fault and fault.kind:
                case FaultKind.STATUS:
                    status = self._replica.faults.fault.status
                    raise ApiError(status, HTTPStatus(status).phrase, "Injected fault.")
                case FaultKind.RESET_BEFORE:
                    reset(request)
                    return web.Response()
                case FaultKind.HANG:
                    await asyncio.Event().wait()
            if dialect is None:
                return await self._transcribe(request)
            if isinstance(dialect, Pooled):
                return await self._pool(request, dialect)
            return await self._generate(request, dialect, fault.chunks if fault else None)
        finally:
            self._replica.http_requests -= 1

    async def _generate(
        self, request: web.Request, dialect: type[Dialect], reset_after: int | None
    ) -> web.StreamResponse:
        asked = decode_object(await request.read())
        model = self._replica.model(asked)
        body = self._responses.continued(asked) if issubclass(dialect, Responses) else asked
        prompt = self._replica.prompt(dialect, body)
        max_tokens = self._bound_output(len(prompt), dialect.max_tokens(body), dialect.default_max_tokens)
        number = next(self._numbers)
        request_id = request.headers.get("X-Request-Id")
        suffix = request_id or xxhash.xxh3_64_hexdigest(
            f"{self._replica.started_s}-{self._replica.port}-{number}".encode()
        )
        generation = Generation(
            self._record(request, model, number, len(prompt)),
            prompt,
            self._say(dialect, prompt, max_tokens, body.get("ignore_eos") is True),
            asyncio.get_running_loop().create_future(),
            _text_field(body, "cache_salt"),
            request.headers.get("X-Session-ID") or _text_field(body, "session_id"),
        )
        reply = dialect(dialect.id_prefix + suffix, int(time.time()), generation, body)
        echo = (request_id or suffix) if self._replica.settings.request_id_headers else None
        self._submit(generation)
        if type(reply) is Responses and body.get("background") is True:
            stored = self._responses.keep(body, asked, reply.pending("queued"))
            if stored is None:
                raise BadRequestError("background can only be used when `store` is true", "background")
            stored.generation = generation
            task = asyncio.create_task(self._responses.finish_in_background(stored, reply, generation))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
            return json_response(reply.pending("queued"))
        try:
            if body.get("stream") is True and dialect is not Compaction:
                stream = EventStream(request, self._replica.settings.sse_keep_alive_s, reset_after)
                return await self._stream(stream, reply, generation, echo)
            await generation.done
        finally:
            self._replica.driver.abort(generation)
            if type(reply) is Responses and generation.served.finish_reason in ("stop", "length"):
                self._responses.keep(body, asked, reply.whole())
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
        model = self._replica.model(body)
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
                self._replica.driver.abort(generation)
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
        model = self._replica.model({"model": form.get("model")})
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
            self._replica.driver.abort(generation)
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

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = decode_object(await request.read())
        self._replica.model(body)
        ids = self._replica.prompt(Chat if "messages" in body else Completions, body)
        limit = self._replica.settings.max_model_len
        answer = {"count": len(ids), "max_model_len": limit, "tokens": ids.tolist(), "token_strs": None}
        return json_response(answer)

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = decode_object(await request.read())
        self._replica.model(body)
        ids = prompt_ids(body.get("tokens"))
        return json_response({"prompt": " ".join(map(str, ids.tolist()))})  # ids are hashes: no way back

    async def _count_tokens(self, request: web.Request) -> web.Response:
        body = decode_object(await request.read())
        self._replica.model(body)
        return json_response({"input_tokens": len(Messages.prompt(body))})

    async def _input_tokens(self, request: web.Request) -> web.Response:
        body = decode_object(await request.read())
        self._replica.model(body)
        num_tokens = len(Responses.prompt(self._responses.continued(body)))
        return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})

    def _bound_output(self, prompt_tokens: int, max_tokens: int | None, default: int) -> int:
        limit = self._replica.settings.max_model_len
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
        rejection = self._replica.driver.submit(generation)
        if rejection is not None:
            raise ApiError(503, "Service Unavailable", _BUSY_MESSAGES[rejection])
        self._replica.served.append(generation.served)

    def _say(self, dialect: type[Dialect], prompt: TokenArray, max_tokens: int, ignore_eos: bool) -> Output:
        tokenizer = self._replica.tokenizer if dialect is Completions else None
        return generate(prompt, max_tokens, ignore_eos, None if tokenizer is None else tokenizer.words)


def _text_field(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    return value if isinstance(value, str) else None
