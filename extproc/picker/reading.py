"""What an answer says of itself, by the beginning and the end of its text: tokens, and errors.

The same as the script in our own Envoy sees (docs/adr/0016), for gateways that have none.

Rules:
    1. Nothing is decoded that is not needed: most answers have no word of an error, and usage at their end.
    2. A key counts by its depth. A quote inside a JSON string is escaped, so that `"usage":` is a key
       wherever it stands; the brackets that close behind it say how deep. A tool's arguments lie deeper.
    3. Of an error its type and code are read, never its message.
    4. Whatever the text is, the answer is a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import orjson

from extproc.accesslog.answer_errors import error_seen
from extproc.accesslog.usage import UNKNOWN, Usage, read_usage

LONGEST: Final = 8_192
"""Characters of a usage object that is read; real ones have 100 to 500."""

_TRIES: Final = 8
"""Keys of one name that are looked at, from the end."""

_MOST_EVENTS: Final = 256
"""Of a part of a stream in which there is a word of an error, those that are looked at."""

_LAST_PIECES: Final = 64
"""Looked at from the end for the last event: what stands behind it are pings and comments."""

_DECODER: Final = json.JSONDecoder()
_COLON: Final = re.compile(r"\s*:\s*")
_ESCAPE: Final = re.compile(r"\\.", re.DOTALL)
_STRING: Final = re.compile(r'"[^"]*"')
_NO_BRACKET: Final = re.compile(r"[^\[\]{}]+")
_DONE: Final = re.compile(r'^data:[ \t]*"?\[?done\]?"?[ \t]*$', re.IGNORECASE | re.MULTILINE)
_DATA: Final = re.compile(r"^data:[ \t]*[^\[\s]", re.MULTILINE)
_PING: Final = re.compile(r'^event: ?ping$|^data:[ \t]*\{\s*"type"\s*:\s*"ping"\s*\}', re.MULTILINE)
_LONG_ERROR: Final = re.compile(
    r'(?:^|\n)(?:data:)?[ \t]*+\{\s*"(?:errors?"\s*:\s*(?:\{(?!\s*\})|\[(?!\s*\])|"(?!"))'
    r'|(?:object|type|status)"\s*:\s*"error")'
)
"""How an event, or an answer without the blanks before it, begins that is an error and goes on for long."""

_LAST_TYPE: Final = re.compile(r'"type"\s*:\s*"(response\.[\w.]+)"\s*\}\s*$')
_CHUNKS: Final = frozenset({"chat.completion.chunk", "text_completion"})
_STATUS: Final = re.compile('"(failed|cancelled|error)"')
_MOST_ENDS: Final = 3
"""Of a choice's reason: the choice, the choices, the answer."""

_REASON: Final = re.compile('"(error|abort)"')
_ERROR_WORDS: Final = ("rror", "failed", '"abort"')
_WORDS_OF_JSON: Final = (*_ERROR_WORDS, '"cancelled"', '"detail"')
_NO_REASONS: Final = frozenset({"error", "abort"})
"""Of choices that end so no model has said that it is done: the engine gave them up."""

_NO_CHOICE: Final = re.compile(r'"choices"\s*:\s*(?:\[\s*\]|null\b)')
_EVENTS_OF_ANSWERS: Final = ('"choices"', '"message_', '"response.')
_KEYS_OF_ANSWERS: Final = ('"choices"', '"output"', '"content"', '"embedding"')
"""What answers of the APIs that generate have; the one of embeddings spares a look at their own."""

_LEAST_JSON: Final = 3
"""Characters; less is nothing by its length."""
_FIELDS: Final = ("data:", "event:", "id:", "retry:", ":")
_CLOSES: Final = {"{": "}", "[": "]", '"': '"'}
_SOME_ERROR: Final = {"seen": "1"}


class Told(NamedTuple):
    """What an answer says of itself.

    Attributes:
        usage: Its tokens, as the engine counted.
        error: Type and code of an error in it, as `error_seen` gives them; None if there is none.
    """

    usage: Usage
    error: str | None


NOTHING: Final = Told(UNKNOWN, None)


def read_answer(content_type: str | None, head: str, tail: str, *, is_cut: bool) -> Told:
    """What an answer says that is not compressed.

    Args:
        content_type: As its header has it, or None.
        head: Its beginning.
        tail: Its end, or all of it.
        is_cut: The tail is not all of it.
    """
    if is_of_events(content_type, head):
        return _of_events(head, tail, is_cut=is_cut)
    kind = _kind(content_type)
    if kind.endswith("json") or (not kind and _begun(head).startswith(("{", "["))):
        return _of_json(head, tail, is_cut=is_cut)
    return NOTHING


def is_of_events(content_type: str | None, head: str) -> bool:
    """True if an answer is a stream of events.

    Args:
        content_type: As its header has it, or None.
        head: Its beginning, by which one without a type is known.
    """
    kind = _kind(content_type)
    return kind == "text/event-stream" or (not kind and _begun(head).startswith(_FIELDS))


def _kind(content_type: str | None) -> str:
    """Without parameters; of several the first counts."""
    return "" if content_type is None else content_type.partition(",")[0].partition(";")[0].strip().lower()


def _begun(head: str) -> str:
    return head[:64].lstrip("\ufeff \t\r\n")


def error_in_part(text: str, *, begins: bool, long: int) -> str | None:
    """Type and code of the first error in a part of a stream, as `error_seen` gives them; None without one.

    The event in which the part begins is passed over, and so is that in which it ends: they are in the parts
    before and after, if those have `long` bytes in common with this one.

    Args:
        text: Of the part.
        begins: The stream begins with it.
        long: An event that ends behind the part and has more bytes in it is judged by its beginning.
    """
    pieces = _split(text)
    looked = 0
    for piece in pieces[0 if begins else 1 : -1]:
        if not _may_have_error(piece):
            continue
        looked += 1
        fields = _error_of_event(_event(piece)) if looked <= _MOST_EVENTS else None
        if fields is not None:
            return error_seen(fields)
    last = pieces[-1]
    is_whole_so_far = begins or len(pieces) > 1
    if is_whole_so_far and len(last.encode("utf-8", "replace")) > long and _LONG_ERROR.search(last):
        return error_seen(_SOME_ERROR)
    return None


class _Event(NamedTuple):
    """One server-sent event.

    Attributes:
        name: Its type by the field `event`, or "".
        data: Of its `data` lines together.
        is_error: It has a field `error`, as llama.cpp's have.
    """

    name: str
    data: str
    is_error: bool


def _event(piece: str, *, is_cut: bool = False) -> _Event:
    """The event that these lines are; of one whose beginning is cut off the first line is of its data."""
    name, data, is_error = "", [], False
    for number, line in enumerate(piece.split("\n")):
        if line.startswith("data:"):
            data.append(line[5:])
        elif line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("error:"):
            is_error = True
        elif is_cut and number == 0:
            data.append(line)
    return _Event(name, "\n".join(data), is_error)


def _split(text: str) -> list[str]:
    """The events of a text, each as its lines; what stands behind the last one, or nothing, comes last."""
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n\n")


def _pieces(text: str) -> list[str]:
    """The same without those that say nothing."""
    pieces = _split(text)
    return [piece for piece in pieces if _PING.search(piece) is None] if "ping" in text else pieces


def _of_events(head: str, tail: str, *, is_cut: bool) -> Told:
    last = _pieces(tail)
    first = _pieces(head)[:-1] if is_cut else []
    error = _error_in_events(head, tail, first, last, is_cut=is_cut)
    return Told(_usage_of_events(first, last, is_cut=is_cut), error)


def _usage_of_events(first: list[str], last: list[str], *, is_cut: bool) -> Usage:
    top = nested = ""
    places = [(piece, is_cut and number == 0) for number, piece in enumerate(last)]
    for piece, is_cut_off in reversed([*((piece, False) for piece in first), *places]):
        if '"usage"' not in piece:
            continue
        data = _event(piece, is_cut=is_cut_off).data
        may_nest = is_cut_off or '"message"' in data or '"response"' in data
        for text, depth in _objects(data, "usage"):
            if depth == 1:
                top = top or text
            elif depth == 2 and may_nest:
                nested = nested or text
        if top and (nested or '"choices"' in data):
            break
    return read_usage(top, nested)


def _error_in_events(head: str, tail: str, first: list[str], last: list[str], *, is_cut: bool) -> str | None:
    if _may_have_error(tail) or (is_cut and _may_have_error(head)):
        for piece in (*first, *last):
            fields = _error_of_event(_event(piece)) if _may_have_error(piece) else None
            if fields is not None:
                return error_seen(fields)
        if is_cut and _LONG_ERROR.search(_pieces(head)[-1]):
            return error_seen(_SOME_ERROR)
    if not any(_DATA.search(piece) for piece in (*reversed(last), *first)):
        return None if is_cut else error_seen({"event": "none"})
    event, is_done = _last_event_of(last, is_cut=is_cut), any(map(_DONE.search, last))
    if is_done or event in (None, "message_stop"):
        if not is_cut and not any(map(_says, last)):
            return error_seen({"event": "none"})
        if event in _CHUNKS:
            return None
    if event is None:
        is_known = any(word in text for text in (head, tail) for word in _EVENTS_OF_ANSWERS)
        return None if is_known else error_seen({"event": "unlike"})
    return error_seen({"event": event})


def _may_have_error(text: str) -> bool:
    return any(word in text for word in _ERROR_WORDS)


def _says(piece: str) -> bool:
    """An event has a token, or why there is none; what is not known here is taken for one."""
    if _DATA.search(piece) is None:
        return False
    fields = _decoded(_event(piece).data)
    if fields is None:
        return True
    choices = fields.get("choices")
    if isinstance(choices, list):
        return not all(isinstance(choice, dict) and _is_bare(choice) for choice in choices)
    return fields.get("type") not in ("message_start", "message_stop")


def _is_bare(choice: dict[str, Any]) -> bool:
    """Nothing but the role has been said."""
    return all(
        value in (None, "", [])
        or name in ("role", "index")
        or (name == "delta" and isinstance(value, dict) and _is_bare(value))
        for name, value in choice.items()
    )


def _error_of_event(event: _Event) -> dict[str, Any] | None:
    """What is wrong, in the words of `error_seen`; None if nothing is."""
    fields = _decoded(event.data)
    found = None if fields is None else _error_of(fields)
    if found is None and (event.name == "error" or event.is_error):
        return _SOME_ERROR
    return found


def _error_of(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The same of one object: an event's, or an answer."""
    for error in (fields.get("error"), fields.get("errors")):
        if error and isinstance(error, dict | str | list):
            return _words_of(error)
    if "error" in (fields.get("object"), fields.get("status")):
        return _words_of(fields)
    if fields.get("status") == "failed":
        return _reason("failed")
    kind = fields.get("type")
    if kind == "error":
        return _words_of(fields) | {"type": None}
    if kind == "response.failed":
        response = fields.get("response")
        return _words_of(response.get("error") if isinstance(response, dict) else None)
    choices = fields.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        reason = choice.get("finish_reason") if isinstance(choice, dict) else None
        if isinstance(reason, str) and reason in _NO_REASONS:
            return _reason(reason)
    return None


def _reason(word: str) -> dict[str, Any]:
    return {"type": word, **_SOME_ERROR}


def _words_of(error: object) -> dict[str, Any]:
    if isinstance(error, list):
        error = error[0]
    if not isinstance(error, dict):
        return _SOME_ERROR
    return {"type": error.get("type"), "code": error.get("code"), **_SOME_ERROR}


def _last_event_of(pieces: list[str], *, is_cut: bool) -> str | None:
    """The type of the last event, where the API gives each one; of a chat, if it is no last one."""
    for number in reversed(range(max(0, len(pieces) - _LAST_PIECES), len(pieces))):
        if "{" in pieces[number]:
            return _type_of(_event(pieces[number], is_cut=is_cut and number == 0))
    return None


def _type_of(event: _Event) -> str | None:
    if event.name:
        return event.name
    fields = _decoded(event.data)
    if fields is None:
        found = _LAST_TYPE.search(event.data)
        return None if found is None else found[1]
    kind = fields.get("type")
    if isinstance(kind, str):
        return kind
    choices, kind = fields.get("choices"), fields.get("object")
    if not isinstance(kind, str) or kind not in _CHUNKS or not isinstance(choices, list) or not choices:
        return None
    is_finished = any(isinstance(one, dict) and isinstance(one.get("finish_reason"), str) for one in choices)
    return None if is_finished else kind


def _of_json(head: str, tail: str, *, is_cut: bool) -> Told:
    head, tail = head.removeprefix("\ufeff"), tail.removeprefix("\ufeff")
    if not _is_closed(head, tail):
        return Told(UNKNOWN, error_seen(_SOME_ERROR))
    error = _error_in_cut_json(head, tail) if is_cut else _error_in_json(tail)
    if error is None:
        error = _lack_in_json(head, is_cut=is_cut)
    top = next((text for text, depth in _objects(tail, "usage") if depth == 1), "")
    if not top and is_cut:
        top = _usage_ahead(head)
    return Told(read_usage(top), None if error is None else error_seen(error))


def _is_closed(head: str, tail: str) -> bool:
    """Nothing, or an object, a list or a text that ends."""
    first, last = head.lstrip()[:1], tail.rstrip()[-1:]
    return not first or _CLOSES.get(first) == last


def _error_in_json(text: str) -> dict[str, Any] | None:
    if not any(word in text for word in _WORDS_OF_JSON):
        return None
    fields = _decoded(text)
    if fields is None:  # a line each, perhaps
        lines = filter(None, map(_decoded, text.splitlines()))
        return next(filter(None, map(_error_of, lines)), None)
    if fields.get("status") == "cancelled":
        return _reason("cancelled")
    return _SOME_ERROR if next(iter(fields), "") == "detail" else _error_of(fields)


def _lack_in_json(text: str, *, is_cut: bool) -> dict[str, Any] | None:
    """That there is no choice, or nothing of what answers have that generate."""
    if not is_cut and len(text) >= _LEAST_JSON and not any(key in text for key in _KEYS_OF_ANSWERS):
        return {"event": "unlike"}
    found = _NO_CHOICE.search(text)
    return {"event": "none"} if found is not None and _depth(text[: found.start()]) == -1 else None


def _error_in_cut_json(head: str, tail: str) -> dict[str, Any] | None:
    if _LONG_ERROR.match(head.lstrip()):
        return _SOME_ERROR
    keys = (each for key in ("error", "errors") for each in _objects(tail, key))
    error = _decoded(next((text for text, depth in keys if depth == 1), ""))
    if error:
        return _words_of(error)
    for key, pattern, ends in (("status", _STATUS, "}"), ("finish_reason", _REASON, "}]}")):
        for found in _found(tail, key):
            value = pattern.match(tail, found)
            if value is not None and _open_ends(tail[found:]) == ends:
                return _reason(value[1])
    return None


def _usage_ahead(head: str) -> str:
    """From the beginning, for usage before a long answer."""
    at = -1
    for _ in range(_TRIES):
        at = head.find('"usage"', at + 1)
        if at < 0:
            return ""
        colon = _COLON.match(head, at + len('"usage"'))
        if colon is not None and _depth(head[:at]) == -1:
            return _object_at(head, colon.end()) or ""
    return ""


def _objects(text: str, key: str) -> Iterator[tuple[str, int]]:
    """Objects under a key, the last first, and how deep each lies, by the end of the text."""
    for begins in _found(text, key):
        found = _object_at(text, begins)
        if found is not None:
            yield found, _depth(text[begins + len(found) :])


def _found(text: str, key: str) -> Iterator[int]:
    """Where the values of a key begin, the last first."""
    quoted, end = f'"{key}"', len(text)
    for _ in range(_TRIES):
        end = text.rfind(quoted, 0, end)
        if end < 0:
            return
        colon = _COLON.match(text, end + len(quoted))
        if colon is not None:
            yield colon.end()


def _object_at(text: str, begins: int) -> str | None:
    """The object that begins there; None if there is none, or it is too long."""
    if not text.startswith("{", begins):
        return None
    try:
        _, stop = _DECODER.raw_decode(text, begins)
    except (ValueError, RecursionError):
        return None
    return text[begins:stop] if stop - begins <= LONGEST else None


def _depth(text: str) -> int:
    """Closing less opening brackets, strings apart."""
    text = _STRING.sub("", _ESCAPE.sub("", text))
    return text.count("}") + text.count("]") - text.count("{") - text.count("[")


def _open_ends(text: str) -> str:
    """The brackets that close and do not open in it, strings apart; four at most."""
    depth, ends = 0, ""
    for bracket in _NO_BRACKET.sub("", _STRING.sub("", _ESCAPE.sub("", text))):
        if bracket in "{[":
            depth += 1
        elif depth:
            depth -= 1
        else:
            ends += bracket
            if len(ends) > _MOST_ENDS:
                break
    return ends


def _decoded(text: str) -> dict[str, Any] | None:
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return fields if type(fields) is dict else None
