"""The request and response shapes of the generation APIs, streamed and whole.

Rules:
    1. Shapes follow vLLM 0.32 captures for chat and completions, the public API definitions for the others.
    2. A dialect is pure: bodies in, bytes out. One instance per request.
    3. What repeats per token is serialised once; a token costs one concatenation.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import orjson

from tokenway.simulator.server.driver import Generation, Served
from tokenway.simulator.server.text import TokenArray, encode, encode_chat

_MARK = "@@"
_FINGERPRINT = "vllm-0.32.0-sim"
_DONE = b"data: [DONE]\n\n"
_MAX_TOKEN_ID = (1 << 32) - 1


class BadRequestError(Exception):
    """A body that cannot be served; `param` is the offending field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


def positive_int(body: dict[str, Any], name: str) -> int | None:
    """An optional integer field of at least 1.

    Raises:
        BadRequestError: It is anything else.
    """
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRequestError(f"{name} must be at least 1, got {value}.", name)
    return value


def prompt_ids(prompt: Any) -> TokenArray:
    """Token ids of a completions `prompt`: a string, a list of ids, or a list of one of these.

    Raises:
        BadRequestError: Anything else, or nothing in it.
    """
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return encode(prompt)
    if isinstance(prompt, list) and prompt:
        try:
            ids = np.array(prompt)
        except ValueError:
            ids = np.empty(0)
        if ids.ndim == 1 and ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() <= _MAX_TOKEN_ID:
            return ids.astype(np.uint32)
    raise BadRequestError("prompt must be one string or one list of token ids", "prompt")


def conversation(body: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The non-empty list of messages in field `name`.

    Raises:
        BadRequestError: It is missing, empty or holds something else.
    """
    messages = body.get(name)
    if not isinstance(messages, list) or not messages:
        raise BadRequestError(f"{name} must be a non-empty list", name)
    if not all(isinstance(message, dict) for message in messages):
        raise BadRequestError(f"{name} must hold objects", name)
    return messages


def usage(served: Served) -> dict[str, Any]:
    """OpenAI's usage object, with vLLM's details."""
    return {
        "prompt_tokens": served.prompt_tokens,
        "total_tokens": served.prompt_tokens + served.output_tokens,
        "completion_tokens": served.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": served.cached_tokens,
            "created_cache_tokens": None,
            "multimodal_tokens": None,
        },
        "completion_tokens_details": None,
    }


class Dialect:
    """What all dialects share; `Chat` and the others fill in the shapes."""

    id_prefix: ClassVar[str]
    default_max_tokens: ClassVar[int] = 64  # long enough to see a stream, short enough for tests

    def __init__(self, reply_id: str, created_s: int, generation: Generation, body: dict[str, Any]) -> None:
        self._id = reply_id
        self._generation = generation
        self._served = generation.served
        self._model = generation.served.model
        self._created_s = created_s
        self._has_started = False
        self._head = self._tail = b""
        options = body.get("stream_options")
        self._include_usage = isinstance(options, dict) and options.get("include_usage") is True

    @staticmethod
    def prompt(body: dict[str, Any]) -> TokenArray:
        """Token ids of the prompt, shape (n,), n > 0; raises `BadRequestError`."""
        raise NotImplementedError

    @staticmethod
    def max_tokens(body: dict[str, Any]) -> int | None:
        """The client's bound on the output, if any; raises `BadRequestError`."""
        return positive_int(body, "max_tokens")

    def opening(self) -> bytes:
        """What a stream says before anything is computed."""
        return b""

    def token(self, word: bytes, finish_reason: str | None) -> bytes:
        """One token of a stream; `finish_reason` is set on the last."""
        start = b"" if self._has_started else self._start()
        self._has_started = True
        return start + (self._piece(word) if finish_reason is None else self._last(word, finish_reason))

    def closing(self) -> bytes:
        """The end of a stream."""
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        raise NotImplementedError

    def _start(self) -> bytes:
        """What goes with the first token."""
        return b""

    def _piece(self, word: bytes) -> bytes:
        return self._head + word + self._tail

    def _last(self, word: bytes, _finish_reason: str, /) -> bytes:
        return self._piece(word)


class Completions(Dialect):
    """`POST /v1/completions`."""

    id_prefix = "cmpl-"
    default_max_tokens = 16  # OpenAI's and vLLM's default

    def __init__(self, reply_id: str, created_s: int, generation: Generation, body: dict[str, Any]) -> None:
        super().__init__(reply_id, created_s, generation, body)
        self._head, self._tail = _split(b"data: ", self._chunk(_MARK, None))

    @staticmethod
    def prompt(body: dict[str, Any]) -> TokenArray:
        """See `Dialect.prompt`."""
        return prompt_ids(body.get("prompt"))

    def _last(self, word: bytes, finish_reason: str, /) -> bytes:
        return _data({**self._chunk(word.decode(), finish_reason), "system_fingerprint": _FINGERPRINT})

    def closing(self) -> bytes:
        """See `Dialect.closing`."""
        if not self._include_usage:
            return _DONE
        return _data({**self._base("text_completion"), "choices": [], "usage": usage(self._served)}) + _DONE

    def whole(self) -> dict[str, Any]:
        """See `Dialect.whole`."""
        choice = {
            "index": 0,
            "text": self._generation.text,
            "logprobs": None,
            "finish_reason": self._served.finish_reason,
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
        return {
            **self._base("text_completion"),
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": _FINGERPRINT,
            "usage": usage(self._served),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created_s, "model": self._model}

    def _chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": None,
        }
        return {**self._base("text_completion"), "choices": [choice]}


class Chat(Dialect):
    """`POST /v1/chat/completions`."""

    id_prefix = "chatcmpl-"

    def __init__(self, reply_id: str, created_s: int, generation: Generation, body: dict[str, Any]) -> None:
        super().__init__(reply_id, created_s, generation, body)
        self._head, self._tail = _split(b"data: ", self._chunk({"content": _MARK}, None))

    @staticmethod
    def prompt(body: dict[str, Any]) -> TokenArray:
        """See `Dialect.prompt`."""
        return encode_chat(conversation(body, "messages"), body.get("tools"))

    @staticmethod
    def max_tokens(body: dict[str, Any]) -> int | None:
        """See `Dialect.max_tokens`; the newer name wins."""
        return positive_int(body, "max_completion_tokens") or positive_int(body, "max_tokens")

    def _start(self) -> bytes:
        return _data(self._chunk({"role": "assistant", "content": ""}, None))

    def _last(self, word: bytes, finish_reason: str, /) -> bytes:
        last = self._chunk({"content": word.decode()}, finish_reason)
        return _data({**last, "system_fingerprint": _FINGERPRINT})

    def closing(self) -> bytes:
        """See `Dialect.closing`."""
        if not self._include_usage:
            return _DONE
        return (
            _data({**self._base("chat.completion.chunk"), "choices": [], "usage": usage(self._served)})
            + _DONE
        )

    def whole(self) -> dict[str, Any]:
        """See `Dialect.whole`."""
        message = {
            "role": "assistant",
            "content": self._generation.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._served.finish_reason,
            "stop_reason": None,
            "token_ids": None,
            "routed_experts": None,
        }
        return {
            **self._base("chat.completion"),
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": _FINGERPRINT,
            "usage": usage(self._served),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created_s, "model": self._model}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._base("chat.completion.chunk"), "choices": [choice]}


class Responses(Dialect):
    """`POST /v1/responses`, text output only."""

    id_prefix = "resp_"

    def __init__(self, reply_id: str, created_s: int, generation: Generation, body: dict[str, Any]) -> None:
        super().__init__(reply_id, created_s, generation, body)
        self._previous = body.get("previous_response_id")
        self._item_id = "msg_" + reply_id.removeprefix(self.id_prefix)
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._events = 0
        kind = "response.output_text.delta"
        delta = {"type": kind, **self._place, "logprobs": [], "delta": _MARK}
        self._head, tail = _split(f"event: {kind}\ndata: ".encode(), delta)
        self._tail = tail.removesuffix(b"}\n\n")

    @staticmethod
    def prompt(body: dict[str, Any]) -> TokenArray:
        """See `Dialect.prompt`."""
        given = body.get("input")
        messages = (
            [{"role": "user", "content": given}] if isinstance(given, str) else conversation(body, "input")
        )
        if body.get("instructions"):
            messages = [{"role": "system", "content": body["instructions"]}, *messages]
        return encode_chat(messages, body.get("tools"))

    @staticmethod
    def max_tokens(body: dict[str, Any]) -> int | None:
        """See `Dialect.max_tokens`."""
        return positive_int(body, "max_output_tokens")

    def opening(self) -> bytes:
        """See `Dialect.opening`; these events say nothing about the first token."""
        response = self._response("in_progress", [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _start(self) -> bytes:
        item = {"id": self._item_id, "type": "message", "role": "assistant", "status": "in_progress"}
        return self._event(
            "response.output_item.added", output_index=0, item={**item, "content": []}
        ) + self._event("response.content_part.added", **self._place, part=_output_text(""))

    def _piece(self, word: bytes) -> bytes:
        self._events += 1
        return b'%b%b%b,"sequence_number":%d}\n\n' % (self._head, word, self._tail, self._events - 1)

    def closing(self) -> bytes:
        """See `Dialect.closing`; the last event is `completed` even if the status is not, as in vLLM."""
        whole = self.whole()
        return b"".join(
            (
                self._event(
                    "response.output_text.done", **self._place, logprobs=[], text=self._generation.text
                ),
                self._event(
                    "response.content_part.done", **self._place, part=_output_text(self._generation.text)
                ),
                self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
                self._event("response.completed", response=whole),
            )
        )

    def whole(self) -> dict[str, Any]:
        """See `Dialect.whole`."""
        status = "completed" if self._served.finish_reason == "stop" else "incomplete"
        item = {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_output_text(self._generation.text)],
        }
        return self._response(status, [item], self._served)

    def pending(self, status: str) -> dict[str, Any]:
        """The response while it is made in the background."""
        return self._response(status, [], None)

    def _response(self, status: str, output: list[dict[str, Any]], served: Served | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "metadata": None,
            "model": self._model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": self._previous,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": served
            and {
                "input_tokens": served.prompt_tokens,
                "input_tokens_details": {"cached_tokens": served.cached_tokens},
                "output_tokens": served.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": served.prompt_tokens + served.output_tokens,
            },
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._events += 1
        return _named(kind, {"type": kind, **fields, "sequence_number": self._events - 1})


class Messages(Dialect):
    """`POST /v1/messages`, text output only."""

    id_prefix = "msg_"

    def __init__(self, reply_id: str, created_s: int, generation: Generation, body: dict[str, Any]) -> None:
        super().__init__(reply_id, created_s, generation, body)
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": _MARK}}
        self._head, self._tail = _split(b"event: content_block_delta\ndata: ", delta)

    @staticmethod
    def prompt(body: dict[str, Any]) -> TokenArray:
        """See `Dialect.prompt`."""
        messages = conversation(body, "messages")
        if body.get("system"):
            messages = [{"role": "system", "content": body["system"]}, *messages]
        return encode_chat(messages, body.get("tools"))

    def _start(self) -> bytes:
        message = self._message([], None, _messages_usage(self._served))
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _named("message_start", {"type": "message_start", "message": message}) + _named(
            "content_block_start", block
        )

    def closing(self) -> bytes:
        """See `Dialect.closing`."""
        delta = {"stop_reason": _stop_reason(self._served), "stop_sequence": None}
        return b"".join(
            (
                _named("content_block_stop", {"type": "content_block_stop", "index": 0}),
                _named(
                    "message_delta",
                    {"type": "message_delta", "delta": delta, "usage": _messages_usage(self._served)},
                ),
                _named("message_stop", {"type": "message_stop"}),
            )
        )

    def whole(self) -> dict[str, Any]:
        """See `Dialect.whole`."""
        return self._message(
            [{"type": "text", "text": self._generation.text}],
            _stop_reason(self._served),
            _messages_usage(self._served),
        )

    def _message(
        self, content: list[dict[str, str]], stop_reason: str | None, counts: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._model,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": counts,
        }


def _stop_reason(served: Served) -> str:
    return "end_turn" if served.finish_reason == "stop" else "max_tokens"


def _messages_usage(served: Served) -> dict[str, int]:
    return {
        "input_tokens": served.prompt_tokens - served.cached_tokens,
        "cache_read_input_tokens": served.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": served.output_tokens,
    }


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _named(kind: str, value: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\n" + _data(value)


def _split(lead: bytes, template: dict[str, Any]) -> tuple[bytes, bytes]:
    """An event around its text: the last mark is ours, an earlier one belongs to an id or a model name."""
    head, _, tail = orjson.dumps(template).rpartition(_MARK.encode())
    return lead + head, tail + b"\n\n"
