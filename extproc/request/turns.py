"""What of a request engines render: the one place that says so.

For the text (`extproc.rendering`) and for the hashes (`extproc.request.media`) alike.

Rules:
    1. As vLLM 0.32 does it between reading a chat and rendering it: fields of a message that it has no use
       for are dropped, null contents are empty, tool arguments are decoded, keys in the order of its types.
    2. What renders to the same text whatever the template becomes the same value; what some template may
       render differently stays different.
    3. The decoded body is never edited: what changes is made anew, what does not is shared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

TEXT_FIELDS: Final[Mapping[str, str]] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Parts that are text, and the field that holds it."""

SKIPPED_IF_NULL: Final = frozenset(("text", "refusal"))
"""Parts that are left out where their text is null; other parts without text are refused."""

PART_FIELDS: Final = frozenset(
    (
        *("audio_embeds", "audio_url", "closed", "data", "file", "image_embeds", "image_pil", "image_url"),
        *("input_audio", "name", "prompt_cache_breakpoint", "refusal", "text", "thinking", "type", "uuid"),
        *("video_embeds", "video_url"),
    )
)
"""Fields of text parts that vLLM has types for; templates that want parts are given all others."""

BILLING_HEADER: Final = "x-anthropic-billing-header"
"""Begins a line that Claude Code puts before its system prompt, new each time; vLLM and SGLang drop it."""

MAX_ARGUMENTS_CHARS: Final = 256 * 1024
"""Tool arguments of one conversation that are decoded, in its order: JSON inside JSON is not counted by
`extproc.request.structure`, and lists of nothing take 20 ns a character. Later ones stay as they came."""

_LONG_NUMBER: Final = re.compile("[0-9]{20}")
"""Integers beyond 64 bits, which orjson rounds and json does not."""

_NEVER_ROUNDED: Final = frozenset((str, int, bool, type(None)))

_CALL: Final = frozenset(("id", "type", "function"))
_FUNCTION: Final = frozenset(("name", "arguments"))
"""Keys of most calls."""

PLAIN: Final = ("role", "content")
PLAIN_ROLES: Final = frozenset(("user", "assistant", "tool"))
"""Keys and roles of chat messages in which there is nothing to change if the content is a text."""


def without_billing_header(parts: list[Any]) -> list[Any]:
    """System texts without Claude Code's line, see `BILLING_HEADER`; the same list where there is none."""
    if not any(map(_begins_with_header, parts)):
        return parts
    kept = []
    for part in parts:
        if not _begins_with_header(part):
            kept.append(part)
            continue
        text = (part if type(part) is str else part["text"]).partition("\n")[2]
        if text:
            kept.append(text if type(part) is str else {**part, "text": text})
    return kept


def _begins_with_header(part: Any) -> bool:
    text = part.get("text") if type(part) is dict and part.get("type") == "text" else part
    return type(text) is str and text.startswith(BILLING_HEADER)


def system_text(text: str) -> str:
    """A system prompt that came as one string, without Claude Code's line."""
    return text.partition("\n")[2] if text.startswith(BILLING_HEADER) else text


def other_fields(message: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Put into `fields` what of a chat message is rendered beside role, content and calls, in order."""
    role = message.get("role")
    if role == "assistant":
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")  # the older name
        if reasoning is not None:
            fields["reasoning"] = reasoning
    elif role == "tool" and "tool_call_id" in message:
        fields["tool_call_id"] = message["tool_call_id"]
    if type(message.get("name")) is str:
        fields["name"] = message["name"]
    if type(message.get("task")) is str:
        fields["task"] = message["task"]
    if role == "developer":
        fields["tools"] = message.get("tools")


def tool_call(call: Any, arguments: Any) -> dict[str, Any] | None:
    """A tool call in the order of the engine's types; None if it is no function's.

    Args:
        call: As it came.
        arguments: What to give as its arguments.
    """
    function = call.get("function") if type(call) is dict else None
    if type(function) is not dict or call.get("type", "function") != "function":
        return None
    if call.keys() == _CALL and function.keys() == _FUNCTION:
        return {
            "id": call["id"],
            "function": {"arguments": arguments, "name": function["name"]},
            "type": "function",
        }
    given = {"arguments": arguments} | first(function, "name")
    given["arguments"] = arguments
    rewritten = first(call, "id", "function", "type")
    rewritten["function"] = given
    return rewritten


def function_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as the engine dumps them: type and function, its name, description and parameters first.

    Args:
        tools: The body's, not None; not edited.

    Returns:
        One object per tool; None if the engine would refuse them.
    """
    if type(tools) is not list or not tools:
        return None
    dumped = []
    for tool in tools:
        function = tool.get("function") if type(tool) is dict else None
        if (
            type(function) is not dict
            or tool.get("type", "function") != "function"
            or type(function.get("name")) is not str
            or type(function.get("description")) not in (str, type(None))
            or type(function.get("parameters")) not in (dict, type(None))
            or type(function.get("strict")) not in (bool, type(None))
        ):
            return None
        if tool.get("defer_loading") is not None or function.get("defer_loading") is not None:
            return None
        called = {name: function.get(name) for name in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            called["strict"] = function["strict"]
        dumped.append({"type": "function", "function": called})
    return dumped


def decoded_arguments(arguments: Any) -> dict[str, Any]:
    """Tool arguments as an object; an empty one for whatever does not decode to an object."""
    if type(arguments) is str and arguments:
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if type(arguments) is dict else {}


def encoded_arguments(arguments: Any) -> Any:
    """The same for hashing: equal where `decoded_arguments` are, and much quicker.

    Returns:
        An object, or one encoded already.
    """
    if type(arguments) is str and len(arguments) > len("{}"):
        try:
            decoded = orjson.loads(arguments)
            if type(decoded) is not dict:
                return {}
            encoded = orjson.dumps(decoded)
        except (orjson.JSONDecodeError, orjson.JSONEncodeError):
            pass  # json takes NaN, lone surrogates and other depths
        else:
            # Most arguments are texts beside each other, and looking at those is the quickest.
            if all(type(said) in _NEVER_ROUNDED for said in decoded.values()) or (
                _LONG_NUMBER.search(arguments) is None
            ):
                return orjson.Fragment(encoded)
        decoded = decoded_arguments(arguments)
        try:
            return orjson.Fragment(json.dumps(decoded).encode()) if decoded else {}
        except RecursionError:
            return {}
    return arguments if type(arguments) is dict else {}


def template_variables(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Variables of the chat template that a request sets; None if the engine would refuse them."""
    asked = body.get("chat_template_kwargs") or {}
    effort = body.get("reasoning_effort")
    if type(asked) is not dict:
        return None
    named = {name: said for name, said in asked.items() if said is not None and said != "auto"}
    if effort is not None:
        if type(effort) is not str:
            return None
        named["reasoning_effort"] = effort
        if "enable_thinking" not in asked:
            named["enable_thinking"] = effort != "none"
    return named


def first(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The same fields, those named first and in that order: that of the engine's own types."""
    return {name: fields[name] for name in names if name in fields} | dict(fields)
