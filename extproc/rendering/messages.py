"""A chat request's messages and tools in the form that the engine hands to its template.

Rules:
    1. As vLLM 0.32 does it between reading a request and rendering it: unknown fields of a message are
       dropped, texts joined, tool arguments decoded, keys put in the order of its own types.
    2. The request's body is never edited: what changes is copied, what does not is shared.
    3. None where the engine would refuse, or where this cannot be exact: media, tools that are no
       functions, values of unexpected types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

_TEXT_FIELDS: Final[Mapping[str, str]] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Parts that are text, and the field that holds it."""

_SKIPPED_IF_NULL: Final = ("text", "refusal")

_PART_FIELDS: Final = frozenset(
    (
        *("audio_embeds", "audio_url", "closed", "data", "file", "image_embeds", "image_pil", "image_url"),
        *("input_audio", "name", "prompt_cache_breakpoint", "refusal", "text", "thinking", "type", "uuid"),
        *("video_embeds", "video_url"),
    )
)
"""Fields of parts that vLLM has types for; templates that want parts are given all others."""

_BILLING_HEADER: Final = "x-anthropic-billing-header"
"""Begins a line that Claude Code puts before its system prompt, new each time; vLLM drops it."""

_PLAIN: Final = frozenset(("role", "content"))


def conversation(
    messages: Sequence[Any], *, wants_parts: bool, knows_developer: bool
) -> list[Mapping[str, Any]] | None:
    """Messages for a template.

    Args:
        messages: The body's; not edited.
        wants_parts: Give contents as lists of parts, else as text.
        knows_developer: Leave the role `developer`, else make it `system`.

    Returns:
        One mapping per message (fewer if system messages were joined); None if not covered.
    """
    given: list[Mapping[str, Any]] = []
    has_developer = False
    for message in messages:
        if (
            not wants_parts
            and type(message) is dict
            and message.keys() == _PLAIN
            and type(message["content"]) is str
            and message["role"] in ("user", "assistant", "tool")
        ):
            given.append(message)
            continue
        converted = _message(message, wants_parts)
        if converted is None:
            return None
        has_developer |= converted["role"] == "developer"
        given.append(converted)
    return _developer_as_system(given) if has_developer and not knows_developer else given


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


def _message(message: Any, wants_parts: bool) -> dict[str, Any] | None:
    if type(message) is not dict:
        return None
    role = message.get("role")
    parts = message.get("content")
    if type(role) is not str:
        return None
    if parts is None:
        parts = []
    elif type(parts) is str:
        parts = [parts]
    elif type(parts) is not list:
        return None
    if role == "system":
        parts = _without_billing_header(parts)
    content = _content(parts, wants_parts)
    if content is None:
        return None
    converted: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        calls = message.get("tool_calls")
        if calls:
            decoded = _tool_calls(calls)
            if decoded is None:
                return None
            converted["tool_calls"] = decoded
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")  # the older name
        if reasoning is not None:
            converted["reasoning"] = converted["reasoning_content"] = reasoning
    elif role == "tool":
        if "tool_call_id" in message:
            converted["tool_call_id"] = message["tool_call_id"]
        if type(content) is list:
            converted["content"] = "\n".join(part["text"] for part in content)
    for name in ("name", "task"):
        if type(message.get(name)) is str:
            converted[name] = message[name]
    if role == "developer":
        converted["tools"] = message.get("tools")
    return converted


def _without_billing_header(parts: list[Any]) -> list[Any]:
    kept = []
    for part in parts:
        text = part.get("text") if type(part) is dict and part.get("type") == "text" else part
        if type(text) is str and text.startswith(_BILLING_HEADER):
            text = text.partition("\n")[2]
            if text:
                kept.append({**part, "text": text} if type(part) is dict else text)
        else:
            kept.append(part)
    return kept


def _content(parts: list[Any], wants_parts: bool) -> str | list[dict[str, Any]] | None:
    texts: list[str] = []
    rich: list[dict[str, Any]] = []
    for part in parts:
        if type(part) is str:
            part = {"type": "text", "text": part}
        elif type(part) is not dict or part.get("uuid") is not None:
            return None
        kind = part.get("type")
        field = _TEXT_FIELDS.get(kind) if type(kind) is str else None
        if field is None:
            return None
        text = part.get(field)
        if text is None and kind in _SKIPPED_IF_NULL:
            continue
        if type(text) is not str:
            return None
        if not wants_parts:
            texts.append(text)
        else:
            extra = {name: value for name, value in part.items() if name not in _PART_FIELDS}
            rich.append({"type": "text", "text": text, **extra})
    return rich if wants_parts else "\n".join(filter(None, texts))  # the engine leaves empty parts out


def _tool_calls(calls: Any) -> list[dict[str, Any]] | None:
    if type(calls) is not list:
        return None
    decoded = []
    for call in calls:
        function = call.get("function") if type(call) is dict else None
        if type(function) is not dict or call.get("type", "function") != "function":
            return None
        given = {**_first(function, "arguments", "name"), "arguments": _arguments(function.get("arguments"))}
        decoded.append({**_first(call, "id", "function", "type"), "function": given})
    return decoded


def _arguments(arguments: Any) -> dict[str, Any]:
    """Arguments as an object; an empty one for whatever does not decode to an object."""
    if type(arguments) is str and arguments:
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if type(arguments) is dict else {}


def _first(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The same fields, those named first and in that order: that of the engine's own types."""
    return {name: fields[name] for name in names if name in fields} | dict(fields)


def _developer_as_system(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Developer messages as system messages; all system messages in one if any is not the first."""
    renamed = []
    for message in messages:
        if message["role"] == "developer":
            message = {**message, "role": "system"}
            del message["tools"]
        renamed.append(message)
    at = [index for index, message in enumerate(renamed) if message["role"] == "system"]
    if at == [0]:
        return renamed
    said = [renamed[index]["content"] for index in at]
    texts = ["\n".join(part["text"] for part in one) if type(one) is list else one for one in said]
    joined = {"role": "system", "content": "\n\n".join(filter(None, texts))}
    return [joined, *(message for message in renamed if message["role"] != "system")]
