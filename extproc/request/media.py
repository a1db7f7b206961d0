"""Conversation turns in the form that is hashed: what engines render of them, media by content hash.

Rules:
    1. The decoded body is never edited: what changes is copied, what does not is shared.
    2. Equal media give equal tokens, and a token's width depends on the medium only, so a 20 MB video
       neither outweighs the text around it nor counts as millions of prompt tokens. A width is a number that
       is counted (`widths_of`), never text that is made, and a request has no more than `MAX_WIDTH_BYTES`.
    3. What `extproc.request.turns` says is not rendered is left out, `cache_control` with it, and a lone text
       part counts as its string: Anthropic clients move the marker to the newest turn and rewrite its content
       to carry it, which would otherwise change the bytes of every earlier turn's end.
    4. Walks a fixed depth (turn, part, part of a tool result), whatever the nesting of the body.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson
from xxhash import xxh3_128_hexdigest

from extproc.errors import Reason, RouterError
from extproc.request.turns import (
    MAX_ARGUMENTS_CHARS,
    PART_FIELDS,
    PLAIN,
    PLAIN_ROLES,
    SKIPPED_IF_NULL,
    TEXT_FIELDS,
    encoded_arguments,
    other_fields,
    system_text,
    tool_call,
    without_billing_header,
)

WIDTH_BYTES = {"image": 4096, "audio": 40960, "video": 8192}
"""Bytes a medium counts for, by kind: AIGW's `cache_hash.go`; at 4 bytes a token 1,024, 10,240 and 2,048."""

MAX_WIDTH_BYTES: Final = 1024 * 1024
"""Width of all media of one request, beyond the bytes of their tokens: 256 images, 262,144 tokens, 2,048
blocks, the context of most models. Media after that count as their tokens' bytes alone."""

_MARKS: Final = {"image": b"\xffi", "audio": b"\xffa", "video": b"\xffv"}
"""Begin tokens in encoded turns; 0xff is in no JSON, so that no text of a client's imitates one."""

_MARK: Final = re.compile(rb"\xff([iav])")
_WIDTH_OF_MARK: Final = {mark[1:]: WIDTH_BYTES[kind] for kind, mark in _MARKS.items()}

_KIND_OF_FIELD: dict[str, str | None] = {
    "image_url": "image",  # chat; Responses input_image
    "image_embeds": "image",  # vLLM
    "image": "image",  # embeddings of SGLang, with `video`
    "video": "video",
    "input_audio": "audio",  # chat
    "audio_url": "audio",  # vLLM
    "audio_embeds": "audio",  # vLLM
    "video_url": "video",  # vLLM
    "file": None,  # chat; kinds of None are the first five letters of the media type
    "file_data": None,  # Responses input_file
    "file_url": None,
    "file_id": None,  # Responses input_file, input_image
    "source": None,  # Anthropic image, document
}
_PAYLOAD_FIELDS = ("url", "data", "file_data", "file_id")
_TOKEN_BYTES = 36  # two quotes, the mark, 128 bits in hex

_NOT_RENDERED: Final = frozenset(("annotations", "cache_control", "citations", "logprobs"))
"""Fields of text parts that accompany the text; templates that are given them show none."""

_NOT_SHOWN: Final = PART_FIELDS | _NOT_RENDERED

_NAMES_OF_ITEMS: Final = frozenset(("id", "status"))
"""What the server named an item of Responses by when it made it."""

_ITEMS_WITH_NAMES: Final = (None, "message", "function_call", "function_call_output", "reasoning")


def compact_turns(turns: list[Any], param: str, *, as_chat: bool = True) -> tuple[list[Any], bool]:
    """Bring messages (or Responses input items) to their hashed form.

    Args:
        turns: Decoded `messages` or `input`; not edited.
        param: Name of that field, for errors.
        as_chat: They are a chat's; else Anthropic's messages or Responses' items.

    Returns:
        The turns, the same list if nothing had to change; and whether any part was media.

    Raises:
        RouterError: INVALID_REQUEST: a turn is not an object, or its content neither text nor a list.
    """
    compacted = turns
    is_multimodal = False
    arguments_left = MAX_ARGUMENTS_CHARS
    for index, turn in enumerate(turns):
        if type(turn) is not dict:
            raise RouterError(
                Reason.INVALID_REQUEST, f"{param}[{index}] must be an object", param=f"{param}[{index}]"
            )
        content = turn.get("content")
        role = turn.get("role")
        if type(content) is str and tuple(turn) == PLAIN and type(role) is str and role in PLAIN_ROLES:
            continue
        if type(content) is list:
            if role == "system":
                content = without_billing_header(content)
            content, has_media = compact_parts(content, as_chat=as_chat)
            is_multimodal |= has_media
        elif type(content) is str:
            if role == "system":
                content = system_text(content)
        elif content is not None:
            raise RouterError(
                Reason.INVALID_REQUEST,
                f"{param}[{index}].content must be a string or a list of parts",
                param=f"{param}[{index}].content",
            )
        if not as_chat:
            rewritten, has_media, arguments_left = _item(turn, content, arguments_left)
            is_multimodal |= has_media
        elif type(role) is str:
            rewritten, arguments_left = _message(turn, role, content, arguments_left)
        elif content is turn.get("content"):
            continue  # the engine refuses it
        else:
            rewritten = {**turn, "content": content}
        if compacted is turns:
            compacted = turns.copy()
        compacted[index] = rewritten
    return compacted, is_multimodal


def _message(
    turn: dict[str, Any], role: str, content: str | list[Any] | None, arguments_left: int
) -> tuple[dict[str, Any], int]:
    """A chat message as it is rendered; and how many characters of arguments may yet be decoded."""
    if role == "tool" and type(content) is list:
        content = _joined(content)
    rewritten: dict[str, Any] = {"role": role, "content": content or ""}
    if len(turn) <= 2 and "content" in turn and role != "developer":
        return rewritten, arguments_left
    calls = turn.get("tool_calls") if role == "assistant" else None
    if calls:
        if type(calls) is list:
            decoded: list[Any] = []
            for call in calls:
                function = call.get("function") if type(call) is dict else None
                arguments = function.get("arguments") if type(function) is dict else None
                if type(arguments) is str:
                    arguments_left -= len(arguments)
                if arguments_left >= 0:
                    arguments = encoded_arguments(arguments)
                given = tool_call(call, arguments)
                decoded.append(call if given is None else given)
            calls = decoded
        rewritten["tool_calls"] = calls
    other_fields(turn, rewritten)
    return rewritten, arguments_left


def _joined(parts: list[Any]) -> str | list[Any]:
    """Texts of a tool as engines join them whatever the template; the parts if some are no text or empty."""
    texts = []
    for part in parts:
        if type(part) is not str or not part:
            return parts
        texts.append(part)
    return "\n".join(texts)


def _item(
    turn: dict[str, Any], content: str | list[Any] | None, arguments_left: int
) -> tuple[dict[str, Any], bool, int]:
    """A message of Anthropic's, or an item of Responses; whether it has media, and as `_message`."""
    rewritten: dict[str, Any] = {}
    is_multimodal = False
    if "role" in turn:
        rewritten["role"] = turn["role"]
    if content is not None:
        rewritten["content"] = content
    if len(turn) == len(rewritten):
        return rewritten, False, arguments_left
    kind = turn.get("type")
    for field in sorted(turn):
        value = turn[field]
        if value is None or field == "role" or field == "content" or (field == "type" and value == "message"):
            continue
        if field in _NAMES_OF_ITEMS and (kind is None or kind in _ITEMS_WITH_NAMES):
            continue
        if field == "arguments" and kind == "function_call":
            if type(value) is str:
                arguments_left -= len(value)
            if arguments_left >= 0:
                value = encoded_arguments(value)
        elif field == "output" and type(value) is list:  # Responses: what a function call returned
            value, is_multimodal = compact_parts(value, as_chat=False)
        rewritten[field] = value
    return rewritten, is_multimodal, arguments_left


def compact_parts(
    parts: list[Any], *, inside_part: bool = False, as_chat: bool = True
) -> tuple[list[Any] | str, bool]:
    """Bring one content list to its hashed form.

    Args:
        parts: Decoded content parts; not edited. Anything that is not an object passes unchanged.
        inside_part: True for the content of a part; the parts of such parts pass unchanged.
        as_chat: They are a chat's.

    Returns:
        The text if there is only one plain text part, else the parts, plain texts as strings; and whether any
        part was media.
    """
    compacted: list[Any] = []
    is_multimodal = False
    for part in parts:
        if type(part) is not dict:
            compacted.append(part)
            continue
        kind = part.get("type")
        field = TEXT_FIELDS.get(kind) if type(kind) is str else None
        if field is not None and (field == "text" or as_chat):
            text = part.get(field)
            if text is not None or kind not in SKIPPED_IF_NULL:
                compacted.append(text if len(part) == 2 and type(text) is str else _text_part(part, text))
            continue
        rewritten, has_media = _compact_part(part, inside_part, as_chat)
        is_multimodal |= has_media
        compacted.append(rewritten)
    if len(compacted) == 1 and type(compacted[0]) is str:
        return compacted[0], is_multimodal
    return compacted, is_multimodal


def _text_part(part: dict[str, Any], text: Any) -> Any:
    """A text part as its text, or with what templates may show beside it."""
    shown = {name: value for name, value in part.items() if name not in _NOT_SHOWN}
    if part.get("uuid") is not None:
        shown["uuid"] = part["uuid"]
    if not shown and type(text) is str:
        return text
    return {"type": "text", "text": text, **shown}


def _compact_part(part: dict[str, Any], inside_part: bool, as_chat: bool) -> tuple[dict[str, Any], bool]:
    """A copy of `part` without cache marker, media payloads as tokens; and whether it had any."""
    rewritten: dict[str, Any] = {}
    is_multimodal = False
    for field in sorted(part):
        value = part[field]
        if field in _KIND_OF_FIELD:
            compacted, has_media = _compact_medium(field, value)
        elif field == "content" and type(value) is list and not inside_part:
            compacted, has_media = compact_parts(value, inside_part=True, as_chat=as_chat)
        elif field == "cache_control":
            continue
        else:
            compacted, has_media = value, False
        rewritten[field] = compacted
        is_multimodal |= has_media
    return rewritten, is_multimodal


def _compact_medium(field: str, value: Any) -> tuple[Any, bool]:
    """One media field's value with its payload as a token; and whether it was media after all."""
    kind = _KIND_OF_FIELD[field]
    if type(value) is str:
        if field == "source":
            return value, False  # Anthropic search results: where the text beside it came from
        return _token(kind or value[5:10], value), True  # a data URL's media type follows "data:"
    if type(value) is not dict:
        return value, kind is not None  # vLLM: null, and the medium named by `uuid`
    if value.get("type") == "text":
        return value, False  # Anthropic: a document that is text
    for name in _PAYLOAD_FIELDS:
        payload = value.get(name)
        if type(payload) is str:
            media_type = value.get("media_type")
            mark = media_type[:5] if type(media_type) is str else payload[5:10]
            return {**value, name: _token(kind or mark, payload)}, True
    return value, kind is not None


def _token(kind: str, payload: str) -> orjson.Fragment:
    """The content hash of `payload` behind the mark of its kind; unknown kinds count as images."""
    mark = _MARKS.get(kind, _MARKS["image"])
    return orjson.Fragment(b'"%b%b"' % (mark, xxh3_128_hexdigest(payload.encode()).encode()))


def widths_of(encoded: bytes) -> tuple[tuple[int, int], ...]:
    """Where encoded turns count for more than their bytes, and for how many more.

    Args:
        encoded: JSON of turns in the hashed form.

    Returns:
        Per medium (offset, bytes > 0), offsets rising; the sum of the bytes is at most `MAX_WIDTH_BYTES`.
    """
    widths: list[tuple[int, int]] = []
    left = MAX_WIDTH_BYTES
    for mark in _MARK.finditer(encoded):
        width = min(left, _WIDTH_OF_MARK[mark[1]] - _TOKEN_BYTES)
        widths.append((mark.start(), width))
        left -= width
        if not left:
            break
    return tuple(widths)
