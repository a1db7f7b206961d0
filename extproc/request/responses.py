"""The Responses API's own state: which response or conversation a request names, and which one an answer is.

Rules:
    1. Ids are opaque. Those of clients are bounded in length, and nothing but a hash of any is kept.
    2. The id of an answer is the `id` of the response object itself: never one that stands deeper, where
       clients' metadata and tool calls are, and never one that is quoted inside a string.
    3. At most `HEAD_BYTES` of an answer are looked at; engines write the id first.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import unquote

from xxhash import xxh3_64_intdigest

from extproc.request.answer_head import HEAD_BYTES, begins_events, data_of, events_of

PREFIX = "/v1/responses/"

MAX_ID_CHARS = 512
"""OpenAI's ids have 53 to 67 characters, vLLM's 37."""

_METHODS: dict[str, tuple[str, ...]] = {
    "": ("GET", "DELETE"),
    "cancel": ("POST",),
    "input_items": ("GET",),
}
"""What can be done with a stored response, by the last part of the path."""

_TOKEN = re.compile(rb'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\]]')
"""What matters of JSON's structure: strings, whether a colon makes them a key, and brackets."""


class Named(NamedTuple):
    """A request line that names a stored response.

    Attributes:
        response_id: As the client sent it, percent-decoded.
        methods: What this path takes.
        stream: The client asked for the response as a stream.
    """

    response_id: str
    methods: tuple[str, ...]
    stream: bool


class Follows(NamedTuple):
    """What a new response builds on; keys as of `response_key` and `conversation_key`, or None."""

    response: int | None
    conversation: int | None


def named_in(path: str) -> Named | None:
    """The stored response that a path names: `/v1/responses/{id}` or an operation below it; or None."""
    if not path.startswith(PREFIX):
        return None
    path, _, query = path.partition("?")
    name, _, operation = path[len(PREFIX) :].removesuffix("/").partition("/")
    methods = _METHODS.get(operation)
    if methods is None or not name:
        return None
    response_id = unquote(name, errors="replace")
    if len(response_id) > MAX_ID_CHARS:
        return None
    return Named(response_id, methods, "stream=true" in query.lower().split("&"))


def response_key(response_id: str) -> int:
    """The number that stands for a response, unsigned, 64 bits; the same in every process."""
    return xxh3_64_intdigest(b"response\0" + response_id.encode("utf-8", "surrogatepass"))


def conversation_key(conversation_id: str) -> int:
    """Likewise of a conversation."""
    return xxh3_64_intdigest(b"conversation\0" + conversation_id.encode("utf-8", "surrogatepass"))


def follows(body: dict[str, Any]) -> Follows:
    """What a request's body builds on. What is no id, or too long for one, is the engine's to refuse."""
    previous, conversation = body.get("previous_response_id"), body.get("conversation")
    if type(conversation) is dict:
        conversation = conversation.get("id")
    return Follows(
        response_key(previous) if _is_id(previous) else None,
        conversation_key(conversation) if _is_id(conversation) else None,
    )


def id_in(head: bytes) -> str | None:
    """The id of the response that an answer begins with.

    Args:
        head: The first bytes of its body, whole or cut short: a response object, or server-sent events of
            which the first that names one says `{"response": {"id": ...}}`.

    Returns:
        None if there is none, or it is longer than ids are.
    """
    head = head[:HEAD_BYTES]
    if not begins_events(head):
        return _string_at(head, (b"id",))
    ids = (_string_at(data_of(event), (b"response", b"id")) for event in events_of(head))
    return next(filter(None, ids), None)


def _is_id(value: object) -> TypeGuard[str]:
    return type(value) is str and 0 < len(value) <= MAX_ID_CHARS


def _string_at(text: bytes, path: tuple[bytes, ...]) -> str | None:
    """The string at a path of keys in JSON that may be cut short; the first of duplicate keys."""
    inside: list[bytes] = []  # the keys, or b"[" for arrays, that lead to where the scan is
    key = b""
    for token in _TOKEN.finditer(text):
        bracket = token[0]
        if bracket in (b"{", b"["):
            inside.append(key if bracket == b"{" else b"[")
            key = b""
        elif bracket in (b"}", b"]"):
            if len(inside) < 2:
                return None  # the object is over, or there is none
            inside.pop()
            key = b""
        elif token[2] is not None:
            key = token[1]
        else:
            if key == path[-1] and tuple(inside) == (b"", *path[:-1]):
                value = token[1]
                if b"\\" in value or len(value) > MAX_ID_CHARS:
                    return None
                return value.decode("utf-8", "replace") or None
            key = b""
    return None
