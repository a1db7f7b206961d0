"""Answers that are failures of their engine, and answers that look like it and are none."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from tests.e2e.event_streams import (
    DONE,
    MESSAGES,
    PING,
    RESPONSES,
    STREAM,
    TOKEN,
    by_cr,
    data,
    events,
    typed,
)
from tests.e2e.harness import Behaviour

ERROR = {"error": {"message": "engine core is gone", "type": "InternalServerError", "code": 500}}
LONG_ERROR = data({"error": {"message": "gone " * 5_000, "code": 500}})
LONG = TOKEN * 500
"""Events that fill more than is kept of either end of an answer."""
USAGE = {"prompt_tokens": 9, "completion_tokens": 0}


def chat_event(reason: str | None = None, **delta: object) -> bytes:
    """One event of a chat."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return data({"object": "chat.completion.chunk", "choices": [choice]})


ROLE = chat_event(role="assistant", content="")


def whole(status: int, body: object) -> Behaviour:
    """Answers with one JSON body."""

    async def behave(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status)

    return behave


def written(text: str) -> Behaviour:
    """Answers with a body that says it is JSON."""

    async def behave(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text, content_type="application/json")

    return behave


async def breaks(request: web.Request) -> web.StreamResponse:
    """Reads the request and closes the connection."""
    await request.read()
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def nothing(_: web.Request) -> web.StreamResponse:
    """Answers 200 and no byte."""
    return web.Response()


@dataclass(frozen=True, slots=True)
class Case:
    """How one replica of two fails fast.

    Attributes:
        path: The API.
        bad: What it answers.
        good: The events of the other one.
        kind: How such a failure is counted.
    """

    path: str
    bad: Behaviour
    good: tuple[bytes, ...]
    kind: str


CASES = {
    "chat": Case("chat/completions", events(data(ERROR), DONE), STREAM, "error_in_answer"),
    "late": Case("chat/completions", events(*[TOKEN] * 100, data(ERROR), DONE), STREAM, "error_in_answer"),
    "in-the-midst": Case(
        "chat/completions", events(LONG, data(ERROR), LONG, LONG, DONE), STREAM, "error_in_answer"
    ),
    "next-line": Case(
        "chat/completions",
        events(TOKEN, b'data: {"error":\ndata: {"message": "gone",\ndata:  "code": 500}}\n\n'),
        STREAM,
        "error_in_answer",
    ),
    "long": Case("chat/completions", events(TOKEN, LONG_ERROR), STREAM, "error_in_answer"),
    "long-in-pieces": Case(
        "chat/completions",
        events(
            TOKEN, LONG_ERROR[:9], *(LONG_ERROR[at : at + 3_000] for at in range(9, len(LONG_ERROR), 3_000))
        ),
        STREAM,
        "error_in_answer",
    ),
    "long-object": Case(
        "chat/completions",
        events(TOKEN, data({"object": "error", "message": "gone " * 5_000, "code": 500})),
        STREAM,
        "error_in_answer",
    ),
    "messages": Case(
        "messages",
        events(MESSAGES[0], typed("error", error={"type": "api_error", "message": "gone"})),
        MESSAGES,
        "error_in_answer",
    ),
    "messages-cut-short": Case("messages", events(*MESSAGES[:2]), MESSAGES, "truncated"),
    "responses": Case(
        "responses",
        events(RESPONSES[0], typed("response.failed", response={"status": "failed", "error": None})),
        RESPONSES,
        "error_in_answer",
    ),
    "cut-short": Case("chat/completions", events(TOKEN, TOKEN), STREAM, "truncated"),
    "cut-short-by-cr": Case("messages", events(*by_cr(*MESSAGES[:2])), MESSAGES, "truncated"),
    "error-by-cr": Case(
        "chat/completions", events(*by_cr(TOKEN, data(ERROR), DONE)), STREAM, "error_in_answer"
    ),
    "error-field": Case(
        "chat/completions", events(TOKEN, b"error: " + data(ERROR["error"])[6:]), STREAM, "error_in_answer"
    ),
    "brackets-in-an-error": Case(
        "chat/completions",
        events(TOKEN, data({"error": {"message": "no '}' in {", "type": "BadRequestError", "code": 400}})),
        STREAM,
        "refused",
    ),
    "brackets-in-an-error-of-json": Case(
        "chat/completions",
        whole(200, {"error": {"message": "no '}' in {", "type": "overloaded_error"}}),
        STREAM,
        "overloaded",
    ),
    "object": Case(
        "chat/completions",
        events(data({"object": "error", "message": "gone", "code": 500}), DONE),
        STREAM,
        "error_in_answer",
    ),
    "object-for-a-stream": Case(
        "chat/completions",
        whole(200, {"object": "error", "message": "gone", "code": 500}),
        STREAM,
        "error_in_answer",
    ),
    "named-error": Case(
        "chat/completions",
        events(b"event: error\n" + data({"message": "gone"}), DONE),
        STREAM,
        "error_in_answer",
    ),
    "finish-reason": Case(
        "chat/completions",
        events(TOKEN, data({"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]}), DONE),
        STREAM,
        "error_in_answer",
    ),
    "comments": Case("chat/completions", events(b": keep-alive\n\n" * 9, DONE), STREAM, "empty_answer"),
    "messages-without-names": Case(
        "messages", events(data({"type": "message_start", "message": {}})), MESSAGES, "truncated"
    ),
    "responses-and-done": Case(
        "responses",
        events(RESPONSES[0], typed("response.failed", response={"error": None}), DONE),
        RESPONSES,
        "error_in_answer",
    ),
    "responses-error": Case(
        "responses",
        events(RESPONSES[0], data({"type": "error", "code": "server_error"}), DONE),
        RESPONSES,
        "error_in_answer",
    ),
    "responses-cut-short": Case("responses", events(*RESPONSES[:2], DONE), RESPONSES, "truncated"),
    "nothing-in-json": Case("chat/completions", whole(200, {}), STREAM, "empty_answer"),
    "no-json": Case("chat/completions", written("Internal Server Error"), STREAM, "error_in_answer"),
    "half-of-json": Case(
        "chat/completions", written('{"choices": [{"message": {'), STREAM, "error_in_answer"
    ),
    "long-message": Case(
        "chat/completions",
        whole(200, {"error": {"message": "gone " * 10_000, "code": 500}}),
        STREAM,
        "error_in_answer",
    ),
    **{
        name: Case("chat/completions", whole(200, body), STREAM, "error_in_answer")
        for name, body in {
            "errors": {"errors": [{"message": "gone", "code": 500}]},
            "errors-in-words": {"errors": ["gone"], "data": None},
            "errors-by-name": {"id": "x", "errors": {"engine": "gone"}},
            "errors-at-length": {"errors": [{"message": "gone " * 10_000}]},
            "status": {"status": "error", "message": "gone"},
            "abort": {"choices": [{"message": {"content": "["}, "finish_reason": "abort"}], "usage": USAGE},
        }.items()
    },
    "errors-of-the-client": Case(
        "chat/completions",
        whole(200, {"errors": [{"message": "no", "type": "BadRequestError", "code": 400}]}),
        STREAM,
        "refused",
    ),
    **{
        f"{name}-in-a-stream": Case("chat/completions", events(TOKEN, event, DONE), STREAM, "error_in_answer")
        for name, event in {
            "errors": data({"errors": [{"message": "gone", "code": 500}]}),
            "errors-in-words": data({"errors": ["gone"]}),
            "status": data({"status": "error", "message": "gone"}),
            "abort": chat_event("abort"),
        }.items()
    },
    "failed-as-its-tool": Case(
        "responses",
        whole(200, {"output": [{"type": "mcp_call", "status": "failed"}], "status": "failed", "error": None}),
        RESPONSES,
        "error_in_answer",
    ),
    "cancelled": Case(
        "responses",
        whole(200, {"output": [], "status": "cancelled", "error": None}),
        RESPONSES,
        "error_in_answer",
    ),
    **{
        name: Case("chat/completions", whole(200, body), STREAM, kind)
        for name, body, kind in (
            ("no-choice", {"id": "x", "choices": [], "usage": USAGE}, "empty_answer"),
            ("null-for-choices", {"id": "x", "choices": None}, "empty_answer"),
            ("no-answer", {"message": "gone"}, "wrong_content"),
            ("no-success", {"success": False, "code": 50_001}, "wrong_content"),
        )
    },
    **{
        name: Case("chat/completions", events(*parts), STREAM, kind)
        for name, parts, kind in (
            ("usage-alone", (data({"choices": [], "usage": USAGE}), DONE), "empty_answer"),
            ("role-alone", (ROLE, DONE), "empty_answer"),
            (
                "role-and-usage",
                (ROLE, chat_event(), data({"choices": [], "usage": USAGE}), DONE),
                "empty_answer",
            ),
            ("no-answer-in-a-stream", (data({"message": "gone"}), DONE), "wrong_content"),
        )
    },
    "message-without-anything": Case("messages", events(MESSAGES[0], MESSAGES[3]), MESSAGES, "empty_answer"),
    "redirect": Case("chat/completions", whole(302, {}), STREAM, "refused"),
    "not-modified": Case("chat/completions", whole(304, {}), STREAM, "refused"),
    "empty": Case("chat/completions", nothing, STREAM, "empty_answer"),
    "404": Case("chat/completions", whole(404, {"error": {}}), STREAM, "missing_model"),
    "401": Case("chat/completions", whole(401, {"error": {}}), STREAM, "refused"),
}

NO_ERRORS = {
    "said": (
        "chat/completions",
        (TOKEN.replace(b'"a"', rb'"\n\nevent: error\ndata: {\"error\": {\"type\": \"x\"}}"'), DONE),
    ),
    "said-at-length": (
        "chat/completions",
        (TOKEN.replace(b'"a"', rb'"data: {\"error\": {\"' + b"a" * 40_000 + b'"'), TOKEN, DONE),
    ),
    "said-in-the-midst": (
        "chat/completions",
        (LONG, TOKEN.replace(b'"a"', rb'"\n\ndata: {\"error\": {\"type\": \"x\"}}"'), LONG, LONG, DONE),
    ),
    "argument-at-length": (
        "messages",
        (
            MESSAGES[0],
            typed(
                "content_block_start",
                content_block={"type": "tool_use", "input": {"error": {"type": "a" * 40_000}}},
            ),
            *MESSAGES[2:],
        ),
    ),
    "null": (
        "chat/completions",
        (data({"error": None, "choices": [{"index": 0, "delta": {"content": "a"}}]}), TOKEN, DONE),
    ),
    "empty-text": (
        "chat/completions",
        (data({"error": "", "choices": [{"index": 0, "delta": {"content": "a"}}]}), TOKEN, DONE),
    ),
    "empty-object": (
        "chat/completions",
        (TOKEN, data({"choices": [{"index": 0, "delta": {"content": "a"}}], "error": {}}), DONE),
    ),
    "argument": (
        "messages",
        (
            MESSAGES[0],
            typed("content_block_start", content_block={"type": "tool_use", "input": {"error": "x"}}),
            *MESSAGES[2:],
        ),
    ),
    "no-stop-event": ("messages", MESSAGES[:3]),
    "pinged-to-the-end": ("messages", (*MESSAGES, PING)),
    "pinged-without-a-name": ("messages", (*MESSAGES[:3], data({"type": "ping"}), PING)),
    "speaks-of-pings": (
        "messages",
        (
            MESSAGES[0],
            typed("content_block_delta", delta={"text": '{"type": "ping"}\nevent: ping\ndata: '}),
            *MESSAGES[2:],
        ),
    ),
    "a-tool-failed": (
        "responses",
        (
            RESPONSES[0],
            typed("response.output_item.done", item={"type": "mcp_call", "error": "no such file"}),
            RESPONSES[2],
        ),
    ),
    "by-cr": ("messages", tuple(by_cr(*MESSAGES))),
    "by-cr-without-names": ("chat/completions", tuple(by_cr(TOKEN, TOKEN, *STREAM[2:]))),
    "by-cr-in-pieces": ("messages", tuple(bytes([byte]) for byte in b"".join(by_cr(*MESSAGES)))),
    "by-crlf-in-pieces": (
        "messages",
        tuple(bytes([byte]) for byte in b"".join(MESSAGES).replace(b"\n", b"\r\n")),
    ),
    "two-spaces": ("chat/completions", tuple(part.replace(b"data: ", b"data:  ") for part in STREAM)),
    "no-spaces": ("chat/completions", tuple(part.replace(b"data: ", b"data:") for part in (TOKEN, DONE))),
    "mark-of-utf-8": ("messages", (b"\xef\xbb\xbf", *MESSAGES)),
    "last-line-alone": ("messages", (*MESSAGES[:3], MESSAGES[3].rstrip())),
    **{
        f"done-as-{said.decode().strip()}": ("chat/completions", (TOKEN, TOKEN, said))
        for said in (b"data:[done]\n\n", b"data: DONE\n\n", b'data: "[DONE]"\r\n\r\n', b"data: [DONE]")
    },
    "finished": (
        "chat/completions",
        (TOKEN, TOKEN.replace(b'"index"', b'"finish_reason": "stop", "index"')),
    ),
    "usage-at-the-end": ("chat/completions", STREAM),
    "no-choice-at-first": (
        "chat/completions",
        (data({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}), ROLE, *STREAM),
    ),
    "nothing-to-say": (
        "chat/completions",
        (ROLE, chat_event("stop"), data({"choices": [], "usage": USAGE}), DONE),
    ),
    "tools-alone": (
        "chat/completions",
        (
            ROLE,
            chat_event(tool_calls=[{"index": 0, "id": "t", "function": {"name": "f", "arguments": '{["'}}]),
            DONE,
        ),
    ),
    "unheard-of-alone": ("chat/completions", (ROLE, chat_event(audio={"id": "a"}), DONE)),
    "text-alone": (
        "completions",
        (data({"object": "text_completion", "choices": [{"index": 0, "text": "a"}]}), DONE),
    ),
    "no-errors": ("chat/completions", (data({"errors": [], "choices": [{"delta": {"content": "a"}}]}), DONE)),
    "speaks-of-aborts": (
        "chat/completions",
        (TOKEN.replace(b'"a"', rb'"{\"errors\": [1], \"finish_reason\": \"abort\"}"'), DONE),
    ),
    "argument-that-aborts": (
        "messages",
        (
            MESSAGES[0],
            typed(
                "content_block_start",
                content_block={
                    "type": "tool_use",
                    "input": {"finish_reason": "abort", "status": "error", "errors": ["x"], "choices": []},
                },
            ),
            *MESSAGES[2:],
        ),
    ),
    "nothing-in-messages": ("messages", (MESSAGES[0], *MESSAGES[2:])),
    "incomplete": (
        "responses",
        (*RESPONSES[:2], typed("response.incomplete", response={"status": "incomplete", "output": []})),
    ),
    "nothing-in-a-response": (
        "responses",
        (RESPONSES[0], typed("response.completed", response={"status": "completed", "output": []})),
    ),
}

NO_ERRORS_IN_JSON: dict[str, tuple[str, object]] = {
    "tool": (
        "/v1/chat/completions",
        {"choices": [{"message": {"tool_calls": [{"arguments": '{"errors":["x"],"status":"error"}'}]}}]},
    ),
    "empty-errors": (
        "/v1/chat/completions",
        {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}], "errors": [], "error": None},
    ),
    "text": ("/v1/completions", {"choices": [{"text": '"status": "error"', "finish_reason": "length"}]}),
    "label": ("/classify", {"data": [{"label": "error", "probs": [1.0]}]}),
    "input": (
        "/v1/messages",
        {
            "content": [{"type": "tool_use", "input": {"status": "failed", "errors": ["x"], "choices": []}}],
            "stop_reason": "tool_use",
        },
    ),
    "nothing": ("/v1/messages", {"content": [], "stop_reason": "end_turn"}),
    "incomplete": ("/v1/responses", {"status": "incomplete", "output": [], "error": None}),
    "failed-tool": ("/v1/responses", {"output": [{"status": "failed", "error": "x"}], "status": "completed"}),
    "embeddings": ("/v1/embeddings", {"data": [{"embedding": "AAAA"}]}),
    "compacted": ("/v1/responses/compact", {"object": "response.compaction", "output": []}),
    "input-tokens": ("/v1/responses/input_tokens", {"object": "response.input_tokens", "input_tokens": 7}),
    "count-tokens": ("/v1/messages/count_tokens", {"input_tokens": 7}),
    "tokens": ("/tokenize", {"count": 1, "tokens": [7]}),
    "prompt": ("/detokenize", {"prompt": "hello"}),
    "rerank": ("/rerank", {"results": [{"index": 0, "relevance_score": 0.5}]}),
    "score": ("/score", {"data": [{"score": 0.5}]}),
    "pooling": ("/pooling", {"data": [{"data": [0.5]}]}),
}
