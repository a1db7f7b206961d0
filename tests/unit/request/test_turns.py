"""What renders alike hashes alike, and nothing else does: held against what a real engine rendered."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson
import pytest

from extproc.rendering.loading import load
from extproc.rendering.prompt_text import Rendering
from extproc.request.parse import parse
from extproc.request.turns import BILLING_HEADER, MAX_ARGUMENTS_CHARS

DATA = Path(__file__).parents[2] / "data" / "rendering"
FAMILIES = ("chatml", "llama3", "instruct", "parts")
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
NOW_UNIX_S = 1_782_777_600.0

Body = dict[str, Any]
Change = Callable[[Body], object]


@cache
def rendering(family: str) -> Rendering:
    """One of the small tokenizers."""
    return load(DATA / family)


@cache
def captures(family: str) -> tuple[Body, ...]:
    """Requests and what vLLM 0.32 tokenized for them."""
    return tuple(orjson.loads(line) for line in (DATA / family / "captures.jsonl").read_bytes().splitlines())


def prompt(path: str, body: Body) -> bytes:
    """What is hashed."""
    return parse(path, orjson.dumps(body)).prompt


def rendered(family: str, body: Body) -> bytes | None:
    """What the engine tokenizes."""
    found = rendering(family).prompt_text(parse(CHAT, orjson.dumps(body)), NOW_UNIX_S)
    return None if found is None else found.text


def reversed_keys(value: Any) -> Any:
    """The same objects with their keys the other way round, down to messages, parts, calls and tools."""
    return dict(reversed(value.items()))


def each_message(change: Callable[[Body], Body]) -> Change:
    """Change every message."""

    def changed(body: Body) -> None:
        body["messages"] = [change(message) for message in body["messages"]]

    return changed


def each_call(change: Callable[[Body], Body]) -> Change:
    """Change every tool call."""

    def of(message: Body) -> Body:
        if message.get("tool_calls"):
            message["tool_calls"] = [change(call) for call in message["tool_calls"]]
        return message

    return each_message(of)


def strings_as_parts(message: Body, kind: str = "text") -> Body:
    """A content that is a string as the list of its one part."""
    if type(message.get("content")) is str and message["content"]:
        message["content"] = [{"type": kind, "text": message["content"]}]
    return message


def with_arguments(change: Callable[[Any], Any]) -> Callable[[Body], Body]:
    """A call with its arguments written otherwise."""

    def changed(call: Body) -> Body:
        call["function"]["arguments"] = change(call["function"]["arguments"])
        return call

    return changed


def decoded(arguments: Any) -> Any:
    """As an object, if it is one."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if type(value) is dict else arguments


def parts_reversed(message: Body) -> Body:
    """The keys of every part the other way round."""
    if type(message.get("content")) is list:
        message["content"] = [
            reversed_keys(part) if type(part) is dict else part for part in message["content"]
        ]
    return message


def tools_shuffled(body: Body) -> None:
    """Tools with their keys the other way round, and a field that engines drop."""
    if body.get("tools"):
        body["tools"] = [
            {"function": {"own": 1, **reversed_keys(tool["function"])}, "type": "function"}
            for tool in body["tools"]
        ]


def null_content_as(value: Any) -> Change:
    """Another way to say that a message has no content."""

    def change(message: Body) -> Body:
        if message.get("content") in (None, ""):
            if value is ...:
                message.pop("content", None)
            else:
                message["content"] = value
        return message

    return each_message(change)


ALIKE: dict[str, Change] = {
    "keys of messages": each_message(reversed_keys),
    "keys of parts": each_message(parts_reversed),
    "keys of calls": each_call(
        lambda call: reversed_keys({**call, "function": reversed_keys(call["function"])})
    ),
    "null name": each_message(lambda message: {"name": None, **message}),
    "unknown field": each_message(lambda message: {**message, "own": 1}),
    "null refusal": each_message(lambda message: {**message, "refusal": None, "audio": None}),
    "no calls": each_message(
        lambda message: message if message.get("tool_calls") else {**message, "tool_calls": []}
    ),
    "string as part": each_message(strings_as_parts),
    "string as input_text": each_message(lambda message: strings_as_parts(message, "input_text")),
    "string as output_text": each_message(lambda message: strings_as_parts(message, "output_text")),
    "string in a list": each_message(
        lambda message: (
            {**message, "content": [message["content"]]} if type(message.get("content")) is str else message
        )
    ),
    "arguments decoded": each_call(with_arguments(decoded)),
    "arguments spaced": each_call(
        with_arguments(
            lambda said: json.dumps(decoded(said), indent=3) if type(decoded(said)) is dict else said
        )
    ),
    "tools": tools_shuffled,
    "null tools": lambda body: body.setdefault("tools", None),
    "null variables": lambda body: body.setdefault("chat_template_kwargs", None),
    "absent content": null_content_as(...),
    "null content": null_content_as(None),
    "empty content": null_content_as(""),
    "no parts": null_content_as([]),
    "unread fields": lambda body: body.update(temperature=0.3, user="u", metadata={"a": "b"}, n=1),
}


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_renders_alike_hashes_alike(family: str, change: Change) -> None:
    """Another spelling of the same conversation, which the engine's template shows to be the same."""
    compared = 0
    for capture in captures(family):
        if capture["path"] != CHAT:
            continue
        other = deepcopy(capture["body"])
        change(other)
        if (text := rendered(family, capture["body"])) is None:
            continue
        assert rendered(family, other) == text
        assert prompt(CHAT, other) == prompt(CHAT, capture["body"])
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_engine_tokenized_differently_hashes_differently(family: str) -> None:
    """Of all pairs of captured requests, those with the same bytes have the same tokens."""
    listed = [
        (capture["path"], prompt(capture["path"], capture["body"]), capture["tokens"])
        for capture in captures(family)
        if capture["tokens"] is not None
    ]
    assert len(listed) > 30
    for (path, one, its), (other_path, other, tokens) in combinations(listed, 2):
        assert path != other_path or one != other or its == tokens


def changed_texts(body: Body) -> list[Body]:
    """The body with one thing changed that some template shows."""
    changed = []
    for index, message in enumerate(body["messages"]):
        for field, value in (
            *(("role", "user"), ("role", "assistant"), ("content", "other"), ("content", ["a", "b"])),
            *(("name", "alice"), ("reasoning", "because"), ("tool_call_id", "call00009")),
            ("content", "a\nb"),
        ):
            other = deepcopy(body)
            other["messages"][index] = {**message, field: value}
            changed.append(other)
        for number, call in enumerate(message.get("tool_calls") or ()):
            for function in (
                {**call["function"], "arguments": '{"other": 1}'},
                {**call["function"], "arguments": '{"b": 1, "a": 2}'},
                {**call["function"], "arguments": '{"a": 2, "b": 1}'},
                {**call["function"], "arguments": '{"a": 12345678901234567890123}'},
                {**call["function"], "arguments": '{"a": 12345678901234567890124}'},
                {**call["function"], "arguments": '{"a": NaN}'},
                {**call["function"], "name": "other"},
            ):
                other = deepcopy(body)
                other["messages"][index]["tool_calls"][number]["function"] = function
                changed.append(other)
    shaping = ("tools", "chat_template_kwargs", "reasoning_effort", "documents", "add_generation_prompt")
    changed += [
        {name: value for name, value in body.items() if name != field} for field in shaping if field in body
    ]
    changed.append({**body, "chat_template_kwargs": {"cutoff": "May 1999"}})
    changed.append({**body, "add_special_tokens": True})
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_what_renders_differently_hashes_differently(family: str) -> None:
    """One change to a captured request: where any template shows it, the bytes show it as well."""
    pairs = 0
    for capture in captures(family)[:16]:
        if capture["path"] != CHAT:
            continue
        variants = [capture["body"], *changed_texts(capture["body"])]
        by_prompt: dict[bytes, list[Body]] = {}
        for variant in variants:
            by_prompt.setdefault(prompt(CHAT, variant), []).append(variant)
        for alike in by_prompt.values():
            for of in FAMILIES:
                assert len({rendered(of, variant) for variant in alike}) == 1
        pairs += len(by_prompt)
    assert pairs > 80


def blocks(nonce: str) -> list[Body]:
    """Claude Code's system blocks."""
    header = {"type": "text", "text": f"{BILLING_HEADER}: cc_version=2.1.0; cch={nonce};"}
    return [header, {"type": "text", "text": "rules", "cache_control": {"type": "ephemeral"}}]


def claude(nonce: str) -> dict[str, tuple[str, Body]]:
    """The forms in which the block that changes is sent."""
    header = blocks(nonce)[0]["text"]
    go = {"role": "user", "content": "go"}
    return {
        "system blocks": (MESSAGES, {"model": "m", "system": blocks(nonce), "messages": [go]}),
        "system text": (MESSAGES, {"model": "m", "system": f"{header}\nrules", "messages": [go]}),
        "system message": (
            MESSAGES,
            {"model": "m", "messages": [{"role": "system", "content": blocks(nonce)}, go]},
        ),
        "chat blocks": (CHAT, {"model": "m", "messages": [{"role": "system", "content": blocks(nonce)}, go]}),
        "chat text": (
            CHAT,
            {"model": "m", "messages": [{"role": "system", "content": f"{header}\nrules"}, go]},
        ),
        "chat messages": (
            CHAT,
            {
                "model": "m",
                "messages": [
                    {"role": "system", "content": header},
                    {"role": "system", "content": "rules"},
                    go,
                ],
            },
        ),
        "instructions": (RESPONSES, {"model": "m", "instructions": f"{header}\nrules", "input": "go"}),
        "input": (RESPONSES, {"model": "m", "input": [{"role": "system", "content": blocks(nonce)}, go]}),
    }


@pytest.mark.parametrize("form", claude(""))
def test_a_line_that_engines_drop_does_not_count(form: str) -> None:
    """Claude Code's billing header changes with each request; what follows it counts."""
    path, one = claude("11111")[form]
    other = claude("22222")[form][1]
    assert prompt(path, one) == prompt(path, other)
    assert BILLING_HEADER.encode() not in prompt(path, one)
    assert b"rules" in prompt(path, one)
    if path == CHAT:
        assert rendered("chatml", one) == rendered("chatml", other) is not None


def test_only_system_prompts_have_lines_that_do_not_count() -> None:
    """A user may quote the line, and a system prompt may mention it further down."""
    for turns in (
        lambda said: [{"role": "user", "content": f"{BILLING_HEADER}: {said}"}],
        lambda said: [{"role": "system", "content": f"see {BILLING_HEADER}: {said}"}],
        lambda said: [{"role": "user", "content": [{"type": "text", "text": f"{BILLING_HEADER}: {said}"}]}],
    ):
        for path in (CHAT, MESSAGES):
            one, other = ({"model": "m", "messages": turns(said)} for said in ("1", "2"))
            assert prompt(path, one) != prompt(path, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            [{"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
              "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}]}],
            [{"role": "assistant", "content": "yes"}],
        ),
        (
            [{"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": '{"a": 1}',
              "status": "completed"}],
            [{"arguments": '{"a":1}', "name": "f", "call_id": "c", "type": "function_call"}],
        ),
        (
            [{"type": "function_call_output", "call_id": "c",
              "output": [{"type": "input_text", "text": "x"}]}],
            [{"type": "function_call_output", "call_id": "c", "output": "x", "id": None}],
        ),
    ],
)  # fmt: skip
def test_items_of_responses_count_by_what_they_say(one: list[Body], other: list[Body]) -> None:
    """What the server named them by does not reach the prompt."""
    assert prompt(RESPONSES, {"model": "m", "input": one}) == prompt(
        RESPONSES, {"model": "m", "input": other}
    )


def test_tools_of_messages_count_by_what_they_say() -> None:
    """Order, markers and the type of the plainest tools do not reach the prompt; another schema does."""
    go = [{"role": "user", "content": "go"}]
    one, other, different = (
        prompt(MESSAGES, {"model": "m", "messages": go, "tools": [tool]})
        for tool in (
            {"name": "t", "description": "d", "input_schema": {"type": "object"}},
            {
                "type": "custom",
                "input_schema": {"type": "object"},
                "cache_control": {},
                "description": "d",
                "name": "t",
            },
            {"name": "t", "description": "d", "input_schema": {"type": "object", "x": 1}},
        )
    )
    assert one == other
    assert one != different


def test_arguments_beyond_a_bound_count_as_they_came() -> None:
    """JSON inside JSON is decoded for so many characters of a conversation, and a prefix stays one."""

    def turns(arguments: str, number: int) -> Body:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}] * number}

    small, large = '{"a": 1}', '{"a": "' + "x" * MAX_ARGUMENTS_CHARS + '"}'
    assert b'"arguments":{"a":1}' in prompt(CHAT, turns(small, 3))
    assert b'"arguments":"{' in prompt(CHAT, turns(large, 1))
    many = '{"a": [' + "[]," * 1000 + "[]]}"
    begun, whole = (prompt(CHAT, turns(many, number)) for number in (100, 200))
    assert whole.startswith(begun)


def test_ids_are_no_text() -> None:
    """Token ids and the text of the same bytes are different prompts."""
    path = "/v1/completions"
    assert prompt(path, {"model": "m", "prompt": [1]}) != prompt(path, {"model": "m", "prompt": "\1\0\0\0"})
    one, other = ({"model": "m", "prompt": "a", "add_special_tokens": special} for special in (True, False))
    assert prompt(path, one) != prompt(path, other)
