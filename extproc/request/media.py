"""Conversation turns in the form that is hashed: media by content hash, cache markers dropped.

Rules:
    1. The decoded body is never edited: what changes is copied, what does not is shared.
    2. Equal media give equal tokens, and a token's width depends on the medium only, so a 20 MB video
       neither outweighs the text around it nor counts as millions of prompt tokens.
    3. `cache_control` is dropped and a lone text part counts as its string: Anthropic clients move the
       marker to the newest turn and rewrite its content to carry it, which would otherwise change the
       bytes of every earlier turn's end.
    4. Walks a fixed depth (turn, part, part of a tool result), whatever the nesting of the body.
"""

from __future__ import annotations

from typing import Any

from xxhash import xxh3_128_hexdigest

from extproc.errors import Reason, RouterError

WIDTH_BYTES = {"image": 4096, "audio": 40960, "video": 8192}
"""Bytes a medium counts for, by kind: AIGW's `cache_hash.go`; at 4 bytes a token 1,024, 10,240 and 2,048."""

_KIND_OF_FIELD: dict[str, str | None] = {
    "image_url": "image",  # chat; Responses input_image
    "image_embeds": "image",  # vLLM
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
_DIGEST_CHARS = 32  # 128 bits in hex
_TEXT_TYPES = ("text", "input_text")
_REWRITTEN_FIELDS = frozenset((*_KIND_OF_FIELD, "cache_control", "content"))


def compact_turns(turns: list[Any], param: str) -> tuple[list[Any], bool]:
    """Bring messages (or Responses input items) to their hashed form.

    Args:
        turns: Decoded `messages` or `input`; not edited.
        param: Name of that field, for errors.

    Returns:
        The turns, the same list if nothing had to change; and whether any part was media.

    Raises:
        RouterError: INVALID_REQUEST: a turn is not an object, or its content neither text nor a list.
    """
    compacted = turns
    is_multimodal = False
    for index, turn in enumerate(turns):
        if type(turn) is not dict:
            raise RouterError(
                Reason.INVALID_REQUEST, f"{param}[{index}] must be an object", param=f"{param}[{index}]"
            )
        content = turn.get("content")
        if type(content) is str:
            continue
        field = "content"
        if content is None:
            field, content = "output", turn.get("output")  # Responses: what a function call returned
        if type(content) is list:
            parts, has_media = compact_parts(content)
            is_multimodal |= has_media
            if parts is not content:
                if compacted is turns:
                    compacted = turns.copy()
                compacted[index] = {**turn, field: parts}
        elif field == "content":
            raise RouterError(
                Reason.INVALID_REQUEST,
                f"{param}[{index}].content must be a string or a list of parts",
                param=f"{param}[{index}].content",
            )
    return compacted, is_multimodal


def compact_parts(parts: list[Any], *, inside_part: bool = False) -> tuple[list[Any] | str, bool]:
    """Bring one content list to its hashed form.

    Args:
        parts: Decoded content parts; not edited. Anything that is not an object passes unchanged.
        inside_part: True for the content of a part; the parts of such parts pass unchanged.

    Returns:
        The text if there is only one plain text part, else the parts (the same list if nothing had to
        change); and whether any part was media.
    """
    compacted = parts
    is_multimodal = False
    for index, part in enumerate(parts):
        if type(part) is dict and not _REWRITTEN_FIELDS.isdisjoint(part):
            rewritten, has_media = _compact_part(part, inside_part)
            is_multimodal |= has_media
            if compacted is parts:
                compacted = parts.copy()
            compacted[index] = rewritten
    if len(compacted) == 1:
        only = compacted[0]
        if type(only) is dict and len(only) == 2 and only.get("type") in _TEXT_TYPES:
            text = only.get("text")
            if type(text) is str:
                return text, is_multimodal
    return compacted, is_multimodal


def _compact_part(part: dict[str, Any], inside_part: bool) -> tuple[dict[str, Any], bool]:
    """A copy of `part` without cache marker, media payloads as tokens; and whether it had any."""
    rewritten: dict[str, Any] = {}
    is_multimodal = False
    for field, value in part.items():
        if field in _KIND_OF_FIELD:
            compacted, has_media = _compact_medium(field, value)
        elif field == "content" and type(value) is list and not inside_part:
            compacted, has_media = compact_parts(value, inside_part=True)
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


def _token(kind: str, payload: str) -> str:
    """The content hash of `payload`, repeated to the width of its kind; unknown kinds count as images."""
    width_bytes = WIDTH_BYTES.get(kind, WIDTH_BYTES["image"])
    return xxh3_128_hexdigest(payload.encode()) * (width_bytes // _DIGEST_CHARS)
