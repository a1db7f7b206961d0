"""Messages and tools in the form in which templates are given them."""

from copy import deepcopy
from typing import Any

import pytest

from extproc.rendering.messages import conversation
from extproc.request.turns import function_tools


def given(*messages: Any, wants_parts: bool = False, knows_developer: bool = True) -> Any:
    """What a template is given; the messages stay as they were."""
    before = deepcopy(messages)
    converted = conversation(messages, wants_parts=wants_parts, knows_developer=knows_developer)
    assert messages == before
    return converted


def text_part(text: Any, **fields: Any) -> dict[str, Any]:
    """A text part."""
    return {"type": "text", "text": text, **fields}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([], ""),
        ([text_part("a"), text_part(""), "b", text_part(None)], "a\nb"),
        ([{"type": "refusal", "refusal": "no"}, {"type": "thinking", "thinking": "hm"}], "no\nhm"),
        ([{"type": "input_text", "text": "x"}, {"type": "output_text", "text": "y"}], "x\ny"),
    ],
)
def test_contents_are_texts_joined_by_lines(content: Any, text: str) -> None:
    """Empty parts are left out."""
    assert given({"role": "user", "content": content, "own": 1}) == [{"role": "user", "content": text}]


def test_contents_are_parts_for_templates_that_want_them() -> None:
    """Fields that the engine has no types for stay, those that it has go; a tool's content is text anyway."""
    parts = [text_part("a", cache_control={"type": "ephemeral"}, uuid=None), text_part(""), "b"]
    assert given({"role": "user", "content": parts}, {"role": "user", "content": "c"}, wants_parts=True) == [
        {
            "role": "user",
            "content": [text_part("a", cache_control={"type": "ephemeral"}), text_part(""), text_part("b")],
        },
        {"role": "user", "content": [text_part("c")]},
    ]
    assert given({"role": "tool", "content": parts}, wants_parts=True) == [
        {"role": "tool", "content": "a\n\nb"}
    ]


@pytest.mark.parametrize(
    "message",
    [
        "hi",
        {"content": "no role"},
        {"role": "user", "content": 1},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [text_part(1)]},
        {"role": "user", "content": [text_part("a", uuid="x")]},
        {"role": "user", "content": [{"text": "untyped"}]},
        {"role": "user", "content": [{"type": ["text"], "text": "a"}]},
        {"role": "user", "content": [1]},
        {"role": "user", "content": [{"type": "input_text", "text": None}]},
        {"role": "assistant", "content": "a", "tool_calls": [1]},
        {"role": "assistant", "content": "a", "tool_calls": {"a": 1}},
        {"role": "assistant", "content": "a", "tool_calls": [{"type": "custom", "custom": {}}]},
    ],
)
def test_what_is_not_plain_text_is_not_covered(message: Any) -> None:
    """Media, and what the engine refuses."""
    assert given({"role": "user", "content": "a"}, message) is None


@pytest.mark.parametrize(
    ("arguments", "decoded"),
    [
        ('{"b": 1, "a": {"c": [NaN]}}', None),
        ('{"b": 1, "a": "é"}', {"b": 1, "a": "é"}),
        ({"b": 1}, {"b": 1}),
        ("", {}),
        (None, {}),
        ("[1]", {}),
        ("{bad", {}),
        ("[" * 100_000, {}),
        (5, {}),
    ],
)
def test_arguments_of_calls_are_objects(arguments: Any, decoded: dict[str, Any] | None) -> None:
    """Whatever does not decode to an object is an empty one; the fields come in the engine's order."""
    call = {"type": "function", "index": 0, "function": {"name": "f", "arguments": arguments}, "id": "c"}
    ((message),) = given({"role": "assistant", "content": None, "tool_calls": [call]})
    (converted,) = message["tool_calls"]
    assert list(converted) == ["id", "function", "type", "index"]
    assert list(converted["function"]) == ["arguments", "name"]
    if decoded is not None:
        assert converted["function"]["arguments"] == decoded
    else:
        assert list(converted["function"]["arguments"]) == ["b", "a"]


def test_assistants_keep_calls_and_reasoning() -> None:
    """Reasoning comes by either name and goes by both; no calls are no field."""
    asked: dict[str, Any] = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": []}
    assert given({**asked, "reasoning_content": "r"}) == [
        {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r"}
    ]
    assert given({**asked, "reasoning": "r", "reasoning_content": "old"})[0]["reasoning_content"] == "r"
    assert given({**asked, "role": "user", "reasoning": "r"}) == [{"role": "user", "content": "a"}]


def test_tools_and_named_speakers_keep_their_names() -> None:
    """Ids of calls for tools, names for all if they are strings."""
    assert given({"role": "tool", "content": "r", "tool_call_id": "c", "name": "f"}) == [
        {"role": "tool", "content": "r", "tool_call_id": "c", "name": "f"}
    ]
    assert given({"role": "user", "content": "r", "tool_call_id": "c", "name": 1}) == [
        {"role": "user", "content": "r"}
    ]


def test_the_billing_line_of_a_system_prompt_is_dropped() -> None:
    """It differs from request to request, and the engine drops it as well; elsewhere it is text."""
    header = "x-anthropic-billing-header: cch=1;"
    assert given({"role": "system", "content": f"{header}\nBe brief."})[0]["content"] == "Be brief."
    assert given({"role": "system", "content": [text_part(header), text_part("b")]})[0]["content"] == "b"
    assert given({"role": "user", "content": header})[0]["content"] == header


def test_developers_are_systems_to_templates_that_do_not_know_them() -> None:
    """All system messages then become the first, unless the only one is."""
    user = {"role": "user", "content": "u"}
    developer = {"role": "developer", "content": [text_part("d"), text_part("e")], "tools": [1]}
    assert given(developer, user)[0] == {"role": "developer", "content": "d\ne", "tools": [1]}
    assert given(developer, user, knows_developer=False) == [{"role": "system", "content": "d\ne"}, user]
    system = {"role": "system", "content": "s"}
    for wants_parts in (False, True):
        joined = given(system, user, developer, knows_developer=False, wants_parts=wants_parts)
        assert joined[0] == {"role": "system", "content": "s\n\nd\ne"}
        assert [message["role"] for message in joined] == ["system", "user"]
    assert given(user, system, knows_developer=False)[1] == system


def test_tools_are_dumped_in_the_engines_order() -> None:
    """What is missing is null, what is unknown is dropped."""
    parameters = {"z": 1, "a": 2}
    function = {"parameters": parameters, "own": 1, "strict": False, "name": "f"}
    dumped = function_tools(
        [{"function": function, "own": 1}, {"type": "function", "function": {"name": "g"}}]
    )
    assert dumped == [
        {
            "type": "function",
            "function": {"name": "f", "description": None, "parameters": parameters, "strict": False},
        },
        {"type": "function", "function": {"name": "g", "description": None, "parameters": None}},
    ]
    assert dumped is not None
    assert list(dumped[0]["function"]) == ["name", "description", "parameters", "strict"]


@pytest.mark.parametrize(
    "tools",
    [
        [],
        {},
        [1],
        [{"type": "custom", "custom": {}}],
        [{"type": "function"}],
        [{"function": {"name": 1}}],
        [{"function": {"name": "f", "parameters": []}}],
        [{"function": {"name": "f", "description": 1}}],
        [{"function": {"name": "f", "strict": 1}}],
        [{"function": {"name": "f"}, "defer_loading": True}],
    ],
)
def test_tools_that_are_no_plain_functions_are_not_covered(tools: Any) -> None:
    """The engine refuses them, or dumps them in ways of its own."""
    assert function_tools(tools) is None
