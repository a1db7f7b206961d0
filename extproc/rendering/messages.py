"""A chat request's messages and tools in the form that the engine hands to its template.

Rules:
    1. As vLLM 0.32 does it between reading a request and rendering it: unknown fields of a message are
       dropped, texts joined, tool arguments decoded, keys put in the order of its own types.
       What of them is rendered at all, `extproc.request.turns` says.
    2. The request's body is never edited: what changes is copied, what does not is shared.
    3. None where the engine would refuse, or where this cannot be exact: media, tools that are no
       functions, values of unexpected types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from extproc.request.turns import (
    PART_FIELDS,
    SKIPPED_IF_NULL,
    TEXT_FIELDS,
    decoded_arguments,
    other_fields,
    tool_call,
    without_billing_header,
)

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
        parts = without_billing_header(parts)
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
    other_fields(message, converted)
    if "reasoning" in converted:
        converted["reasoning_content"] = converted["reasoning"]
    if role == "tool" and type(content) is list:
        converted["content"] = "\n".join(part["text"] for part in content)
    return converted


def _content(parts: list[Any], wants_parts: bool) -> str | list[dict[str, Any]] | None:
    texts: list[str] = []
    rich: list[dict[str, Any]] = []
    for part in parts:
        if type(part) is str:
            part = {"type": "text", "text": part}
        elif type(part) is not dict or part.get("uuid") is not None:
            return None
        kind = part.get("type")
        field = TEXT_FIELDS.get(kind) if type(kind) is str else None
        if field is None:
            return None
        text = part.get(field)
        if text is None and kind in SKIPPED_IF_NULL:
            continue
        if type(text) is not str:
            return None
        if not wants_parts:
            texts.append(text)
        else:
            extra = {name: value for name, value in part.items() if name not in PART_FIELDS}
            rich.append({"type": "text", "text": text, **extra})
    return rich if wants_parts else "\n".join(filter(None, texts))  # the engine leaves empty parts out


def _tool_calls(calls: Any) -> list[dict[str, Any]] | None:
    if type(calls) is not list:
        return None
    decoded = []
    for call in calls:
        function = call.get("function") if type(call) is dict else None
        arguments = function.get("arguments") if type(function) is dict else None
        given = tool_call(call, decoded_arguments(arguments))
        if given is None:
            return None
        decoded.append(given)
    return decoded


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
