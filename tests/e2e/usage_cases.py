"""Answers that say how many tokens they had, in whatever form, and what each comes to."""

from __future__ import annotations

import json
import re
from typing import Any

CHAT = "/v1/chat/completions"
USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 7,
    "total_tokens": 107,
    "prompt_tokens_details": {"cached_tokens": 64},
}
REPORTED = (100, 7, 64)
UNKNOWN = (None, None, None)
PARTS = {"parts": [{"kind": "step {", "of": f"part {number}"} for number in range(200)]}
"""Some 7,900 bytes: more than usage has, less than is looked at."""
LIE = {"prompt_tokens": 999, "completion_tokens": 999, "input_tokens": 999, "output_tokens": 999}
LONG = "word " * 20_000
"""100 kB: more than Envoy looks at of either end of an answer."""

BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
}


def dumped(value: object, *, compact: bool = False) -> bytes:
    """JSON as servers write it, with or without spaces."""
    return json.dumps(value, separators=(",", ":") if compact else None).encode()


def event(value: Any, *, compact: bool = False, end: bytes = b"\n") -> bytes:
    """A server-sent event, named if the value has a type."""
    name = b"event: " + value["type"].encode() + end if "type" in value else b""
    return name + b"data: " + dumped(value, compact=compact) + end + end


def spread(value: Any, *, end: bytes = b"\n", indent: bytes = b" ") -> bytes:
    """The same, its JSON over many lines: an event may have several of data."""
    name = b"event: " + value["type"].encode() + end if "type" in value else b""
    lines = re.sub(r"(?m)(: )([{\[])", r"\1\n\2", json.dumps(value, indent=1)).encode().splitlines()
    return name + b"".join(b"data:" + indent + line + end for line in lines) + end


def token(**more: Any) -> bytes:
    """A chunk of a chat."""
    return event({"choices": [{"index": 0, "delta": {"content": "a"}}], **more}, compact=True)


DONE = b"data: [DONE]\n\n"

WHOLE: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "in_the_middle": (
        CHAT,
        {"id": "c", "usage": USAGE, "choices": [{}], "prompt_logprobs": None, "x": [{"y": "}"}]},
        REPORTED,
    ),
    "none": (CHAT, {"choices": [{}]}, UNKNOWN),
    "null": (CHAT, {"choices": [{}], "usage": None}, UNKNOWN),
    "said_in_the_text": (
        CHAT,
        {"choices": [{"message": {"content": 'so "usage": ' + json.dumps(LIE)}}], "usage": USAGE},
        REPORTED,
    ),
    "said_in_the_text_behind": (
        CHAT,
        {"usage": USAGE, "choices": [{"message": {"content": '}],"usage":' + json.dumps(LIE) + "}\\"}}]},
        REPORTED,
    ),
    "said_in_the_text_alone": (
        CHAT,
        {"choices": [{"message": {"content": json.dumps({"usage": LIE})}}]},
        UNKNOWN,
    ),
    "in_an_argument_of_a_tool": (
        "/v1/messages",
        {
            "content": [{"type": "tool_use", "input": {"usage": LIE, "a": {"usage": LIE}}}],
            "usage": {"input_tokens": 36, "cache_read_input_tokens": 64, "output_tokens": 7},
        },
        REPORTED,
    ),
    "in_an_argument_of_a_tool_behind": (
        "/v1/messages",
        {
            "usage": {"input_tokens": 36, "cache_read_input_tokens": 64, "output_tokens": 7},
            "content": [{"type": "tool_use", "input": {"usage": LIE}}],
        },
        REPORTED,
    ),
    "in_an_argument_of_a_tool_alone": (
        "/v1/messages",
        {"content": [{"type": "tool_use", "input": {"usage": LIE}}]},
        UNKNOWN,
    ),
    "responses": (
        "/v1/responses",
        {
            "output": [{"content": LONG}],
            "usage": {
                "input_tokens": 100,
                "input_tokens_details": {"cached_tokens": 64},
                "output_tokens": 7,
                "output_tokens_details": {"reasoning_tokens": 0},
            },
            "user": None,
        },
        REPORTED,
    ),
    "brackets_in_its_texts": (
        CHAT,
        {
            "choices": [{}],
            "usage": {"a": "}", "b": '{"x": ["', "c}": "\\", **USAGE, "z": ["}}", '"}']},
            "x": 1,
        },
        REPORTED,
    ),
    "brackets_in_its_texts_before_a_long_answer": (
        CHAT,
        {"id": "c", "usage": {"tier": "}", **USAGE}, "results": [LONG]},
        REPORTED,
    ),
    "of_many_parts": (CHAT, {"choices": [LONG], "usage": PARTS | USAGE}, REPORTED),
    "of_many_parts_before_a_long_answer": (
        CHAT,
        {"id": "c", "usage": PARTS | {"tier": "{"} | USAGE, "results": [LONG]},
        REPORTED,
    ),
    "beyond_the_bound": (CHAT, {"choices": [{}], "usage": {"tier": "{", "x": "x" * 8192} | USAGE}, UNKNOWN),
    "embeddings": (
        "/v1/embeddings",
        {"data": [{"embedding": [0.125] * 20_000}], "usage": {"prompt_tokens": 8, "total_tokens": 8}},
        (8, None, None),
    ),
    "before_a_long_answer": (CHAT, {"id": "c", "model": "m", "usage": USAGE, "results": [LONG]}, REPORTED),
    "amidst_a_long_answer": (CHAT, {"a": LONG, "usage": USAGE, "b": LONG}, UNKNOWN),
    "in_a_list_behind_a_long_answer": (CHAT, {"a": LONG, "b": [{"usage": LIE}]}, UNKNOWN),
}

MESSAGES_START = {
    "type": "message_start",
    "message": {"id": "msg", "usage": {"input_tokens": 100, "output_tokens": 0}},
}
MESSAGES_DELTA = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn"},
    "usage": {"input_tokens": 36, "cache_read_input_tokens": 64, "output_tokens": 7},
}
COMPLETED = {
    "type": "response.completed",
    "response": {
        "output": [{"content": LONG * 3}],
        "tools": [{"parameters": {"properties": {"usage": LIE}}}],
        "usage": {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 64}, "output_tokens": 7},
        "user": None,
        "metadata": {"usage": "mine"},
    },
}
STREAMS: dict[str, tuple[str, bytes, tuple[Any, ...]]] = {
    "chat": (CHAT, token() * 3 + event({"choices": [], "usage": USAGE}) + DONE, REPORTED),
    "no_usage": (CHAT, token() * 3 + DONE, UNKNOWN),
    "null_until_the_end": (
        CHAT,
        token(usage=None) * 3 + event({"choices": [], "usage": USAGE}, compact=True) + DONE,
        REPORTED,
    ),
    "continuous": (
        CHAT,
        b"".join(token(usage={**USAGE, "completion_tokens": i}) for i in range(1, 8)) + DONE,
        REPORTED,
    ),
    "not_in_the_last_event": (CHAT, event({"choices": [], "usage": USAGE}) + token() * 200 + DONE, REPORTED),
    "said_in_the_text": (
        CHAT,
        event({"choices": [], "usage": USAGE})
        + event({"choices": [{"delta": {"content": '","usage":' + json.dumps(LIE) + "}"}}]})
        + DONE,
        REPORTED,
    ),
    "crlf": (
        CHAT,
        token().replace(b"\n", b"\r\n")
        + event({"choices": [], "usage": USAGE}, end=b"\r\n")
        + b"data: [DONE]\r\n\r\n",
        REPORTED,
    ),
    "over_several_lines": (
        CHAT,
        token() * 3 + spread({"choices": [], "usage": USAGE}) + DONE,
        REPORTED,
    ),
    "over_several_lines_crlf": (
        CHAT,
        spread({"choices": [], "usage": None}) * 9
        + spread({"choices": [], "usage": USAGE}, end=b"\r\n", indent=b"")
        + b"data: [DONE]\r\n\r\n",
        REPORTED,
    ),
    "over_several_lines_messages": (
        "/v1/messages",
        spread(MESSAGES_START) + spread(MESSAGES_DELTA) + event({"type": "message_stop"}),
        REPORTED,
    ),
    "over_several_lines_responses": (
        "/v1/responses",
        event({"type": "response.created", "response": {"usage": None}}) + spread(COMPLETED),
        REPORTED,
    ),
    "said_over_several_lines": (
        CHAT,
        spread({"choices": [], "usage": USAGE})
        + spread(
            {"choices": [{"delta": {"tool": {"usage": LIE}, "content": '","usage":' + json.dumps(LIE)}}]}
        )
        + DONE,
        REPORTED,
    ),
    "cr": (
        CHAT,
        (token() * 30 + event({"choices": [], "usage": USAGE}) + DONE).replace(b"\n", b"\r"),
        REPORTED,
    ),
    "cr_messages": (
        "/v1/messages",
        (event(MESSAGES_START) + event(MESSAGES_DELTA) + event({"type": "message_stop"})).replace(
            b"\n", b"\r"
        ),
        REPORTED,
    ),
    "cr_over_several_lines": (
        CHAT,
        (token() * 30 + spread({"choices": [], "usage": USAGE}) + DONE).replace(b"\n", b"\r"),
        REPORTED,
    ),
    "mark_of_utf_8": (CHAT, b"\xef\xbb\xbf" + event({"choices": [], "usage": USAGE}) + DONE, REPORTED),
    "brackets_in_its_texts": (
        CHAT,
        token() * 3 + event({"choices": [], "usage": {"a": "}", **USAGE, "z": '{"'}}) + DONE,
        REPORTED,
    ),
    "of_many_parts": (CHAT, token() * 20 + event({"choices": [], "usage": PARTS | USAGE}) + DONE, REPORTED),
    "of_many_parts_over_several_lines": (
        "/v1/messages",
        spread({"type": "message_start", "message": {"usage": PARTS | {"input_tokens": 100}}})
        + spread(MESSAGES_DELTA)
        + event({"type": "message_stop"}),
        REPORTED,
    ),
    "comments_and_no_end": (
        CHAT,
        b": } ] keep-alive \n\n" + event({"choices": [], "usage": USAGE})[:-2],
        REPORTED,
    ),
    "comments_for_long": (
        CHAT,
        token() * 30 + event({"choices": [], "usage": USAGE}) + b": keep-alive\n\n" * 70 + DONE,
        REPORTED,
    ),
    "long_events": (
        CHAT,
        token(text=LONG[:6000]) * 9
        + event({"choices": [], "usage": USAGE, "text": LONG[:15000]})
        + token() * 3,
        REPORTED,
    ),
    "messages": (
        "/v1/messages",
        event(MESSAGES_START)
        + event({"type": "ping"}) * 50
        + event(MESSAGES_DELTA)
        + event({"type": "message_stop"}),
        REPORTED,
    ),
    "messages_as_the_api_says": (
        "/v1/messages",
        event(
            {
                "type": "message_start",
                "message": {"usage": {"input_tokens": 36, "cache_read_input_tokens": 64, "output_tokens": 1}},
            }
        )
        + event(
            {"type": "content_block_start", "content_block": {"type": "tool_use", "input": {"usage": LIE}}}
        )
        + event({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 7}}),
        REPORTED,
    ),
    "responses": (
        "/v1/responses",
        event({"type": "response.created", "response": {"usage": None}})
        + event({"type": "response.output_text.delta", "delta": "a"})
        + event(COMPLETED),
        REPORTED,
    ),
}
