"""`multipart/form-data` bodies: small fields read, some removed or replaced, all else left byte for byte.

Rules:
    1. Bounded: parts, header bytes and the size of each field that is read. What is large (an audio file) is
       searched once for the end of its part, and never copied but into a body that is sent instead.
    2. Where parsers could differ, the body is refused: a second `model`, a file in its place, names in
       encodings of their own, folded headers. What passes is read by engines (FastAPI's python-multipart) as
       it is read here. Headers are read in one pass: email.message takes 80 ms for 4 KiB of semicolons.
    3. The boundary is the body's first line; a body that begins otherwise is none that engines take. Where
       the header names another one, or an encoding in which ASCII is not ASCII (Starlette decodes names and
       values by its `charset`), engines would read other fields than are read here: refused.

Source: RFC 7578, RFC 2046 section 5.1.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

import orjson

from extproc.errors import Reason, RouterError
from extproc.request.sanitize import STEERING_FIELDS, STEERING_XARGS, encode, sanitize
from extproc.values.exchange import Body

MAX_PARTS: Final = 256
"""vLLM's transcription request has about 30 fields; a list field is a part for each item."""

MAX_PART_HEADER_BYTES: Final = 4096
"""Names of files included; clients send about 150 bytes."""

MAX_PART_HEADERS: Final = 16
"""Lines; clients send two or three."""

MAX_PARAMETERS: Final = 8
"""Of a disposition: `name`, `filename` and `filename*` are those in use."""

MAX_LOOKALIKES: Final = 64
"""Of the delimiter within files: each costs a search of its own, and chance makes none."""

MAX_FIELD_BYTES: Final = 65_536
"""Of a field that is read: a prompt of 224 tokens is the longest that Whisper takes."""

_MAX_BOUNDARY_CHARS = 70  # RFC 2046
_END = b"\r\n"
_BLANK_LINE = b"\r\n\r\n"
_XARGS = "vllm_xargs"
_CHARSET_FIELD = "_charset_"  # RFC 7578 section 4.6: of all fields behind it
_STEERING = frozenset(STEERING_FIELDS) | {f"{_XARGS}[{key}]" for key in STEERING_XARGS}
_PLAIN_ENCODINGS = ("7bit", "8bit", "binary")
_DISPOSITION = re.compile(r"[ \t]*form-data(?=[ \t]*(?:;|$))", re.IGNORECASE)
_TYPE = re.compile(r"[ \t]*multipart/form-data(?=[ \t]*(?:;|$))", re.IGNORECASE)
_PARAMETER, _TYPE_PARAMETER = (
    re.compile(
        r"[ \t]*;[ \t]*([a-z0-9_*-]+)[ \t]*=[ \t]*"
        rf"""(?:"([^"\\]*(?:\\.[^"\\]*)*)"|([!#$%&'*+.^_`|~0-9a-z{more}-]+))(?=[ \t]*(?:;|$))""",
        re.IGNORECASE,
    )
    for more in ("", "()/:=?,")
)
"""Of a disposition, and of a type, where not all clients quote what boundaries may have."""

_CHARSET = re.compile(r"""charset[^=;]*=[ \t]*"?([^";]*)""", re.IGNORECASE)
_PLAIN_CHARSET = re.compile(
    r"utf[-_]?8|(?:us-)?ascii|latin-?1|iso[-_]?8859[-_][0-9]{1,2}|(?:windows-|cp)125[0-9]", re.IGNORECASE
)
"""Encodings in which ASCII is ASCII: names of fields that matter are the same in all of them."""


def check_type(content_type: str | None, body: Body) -> None:
    """Refuse a form that its content type has engines read in another way than it is read here.

    Args:
        content_type: Of the request; None if it has none, which engines refuse.
        body: The whole body.

    Raises:
        RouterError: INVALID_REQUEST.
    """
    if content_type is None:
        return
    parameters = _parameters_of(content_type, _TYPE, _TYPE_PARAMETER)
    boundary = parameters.get("boundary", "")
    if not boundary or "\\" in boundary or any("*" in name for name in parameters):
        raise _refused("content-type must be multipart/form-data with a boundary, once and plain")
    if bytes(body[: len(boundary) + 4]) != f"--{boundary}\r\n".encode():
        raise _refused("the request body does not begin with the boundary of its content-type")
    if not _is_plain(parameters.get("charset", "utf-8")):
        raise _refused("the charset of content-type is not accepted; accepted: utf-8")


def _is_plain(charset: str) -> bool:
    return _PLAIN_CHARSET.fullmatch(charset.strip()) is not None


class Upload(NamedTuple):
    """A file in place of its bytes."""

    num_bytes: int


class _Part(NamedTuple):
    """One part of a body.

    Attributes:
        name: Of its field.
        is_file: It came with a file name.
        start: Offset of the delimiter before it, whose dashes are the first bytes.
        content: Offset of its content.
        end: Offset behind its content.
    """

    name: str
    is_file: bool
    start: int
    content: int
    end: int


class Form:
    """A parsed body.

    Args:
        body: The whole body; kept, not copied.

    Raises:
        RouterError: INVALID_REQUEST: it is none, or not one that all parsers read alike.
    """

    __slots__ = ("_body", "_end", "_parts")

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._parts, self._end = _split(body)

    def fields(self) -> dict[str, Any]:
        """Values by name: text, an `Upload` for files, the last of several; what is too large is left out.

        Raises:
            RouterError: INVALID_REQUEST: `model` or `vllm_xargs` is given twice, or is no text or too large.
        """
        values: dict[str, Any] = {}
        has_xargs = False
        for part in self._parts:
            num_bytes = part.end - part.content
            if part.name == _XARGS:
                if has_xargs or num_bytes > MAX_FIELD_BYTES:
                    raise _refused(f"{_XARGS} must be given once, in {MAX_FIELD_BYTES} bytes", _XARGS)
                has_xargs = True
            if part.name == "model" and ("model" in values or part.is_file or num_bytes > MAX_FIELD_BYTES):
                raise _refused("model must be given once, as text", "model")
            if part.is_file:
                values[part.name] = Upload(num_bytes)
            elif num_bytes <= MAX_FIELD_BYTES:
                try:
                    values[part.name] = self._body[part.content : part.end].decode()
                except UnicodeDecodeError:
                    if part.name == "model":
                        raise _refused("model is not UTF-8", "model") from None
        if not _is_plain(str(values.get(_CHARSET_FIELD, "utf-8"))):
            raise _refused(f"{_CHARSET_FIELD} is not accepted; accepted: utf-8", _CHARSET_FIELD)
        return values

    def rewritten(self, model: str | None, allowed: frozenset[str]) -> bytes | None:
        """The body to send instead.

        Args:
            model: The model to ask for, None for the one it asks for.
            allowed: Names of steering fields to leave alone, as of `sanitize`.

        Returns:
            None if the body may go as it came. Else what is not removed or replaced is the same, byte for
            byte.
        """
        pieces = self._pieces(None if model is None else model.encode(), allowed)
        return b"".join(pieces) if pieces else None

    def is_changed(self, allowed: frozenset[str]) -> bool:
        """Whether `rewritten` changes more than the model; argument as there."""
        return bool(self._pieces(None, allowed))

    def around_model(self, allowed: frozenset[str]) -> tuple[bytes, bytes]:
        """What `rewritten` has before the model's name and behind it; there is a field `model`."""
        mark = bytes(bytearray(b"model"))  # an object of its own, whatever is equal to it
        pieces = self._pieces(mark, allowed)
        at = next(index for index, piece in enumerate(pieces) if piece is mark)
        return b"".join(pieces[:at]), b"".join(pieces[at + 1 :])

    def _pieces(self, model: bytes | None, allowed: frozenset[str]) -> list[bytes | memoryview]:
        """The body to send instead, to be joined; none if it may go as it came."""
        whole = memoryview(self._body)
        pieces: list[bytes | memoryview] = []
        taken = 0
        for index, part in enumerate(self._parts):
            if part.name in _STEERING and _allowed_name(part.name) not in allowed:
                after = self._parts[index + 1].start if index + 1 < len(self._parts) else self._end
                pieces.append(whole[taken : part.start])
                taken = after
            elif (content := self._replaced(part, model, allowed)) is not None:
                pieces += [whole[taken : part.content], content]
                taken = part.end
        if pieces:
            pieces.append(whole[taken:])
        return pieces

    def _replaced(self, part: _Part, model: bytes | None, allowed: frozenset[str]) -> bytes | None:
        if part.name == "model":
            return model
        if part.name != _XARGS:
            return None
        try:
            fields = {_XARGS: orjson.loads(self._body[part.content : part.end])}
        except orjson.JSONDecodeError:
            return None  # no engine reads it either
        return encode(fields[_XARGS], _XARGS) if sanitize(fields, allowed) else None


def _allowed_name(name: str) -> str:
    """How the operator allows a field by name: `vllm_xargs[key]` is `vllm_xargs.key`."""
    return name.replace("[", ".").removesuffix("]")


def _split(body: bytes) -> tuple[list[_Part], int]:
    """The parts, and the offset of the dashes that begin the closing delimiter."""
    line_end = body.find(_END, 0, 2 + _MAX_BOUNDARY_CHARS + len(_END))
    if body[:2] != b"--" or line_end <= 2:
        raise _refused("the request body must be multipart/form-data")
    delimiter = _END + body[:line_end]
    parts: list[_Part] = []
    start, headers, lookalikes = 0, line_end + len(_END), 0
    while True:
        if len(parts) >= MAX_PARTS:
            raise _refused(f"the request body has more than {MAX_PARTS} parts")
        headers_end = body.find(_BLANK_LINE, headers, headers + MAX_PART_HEADER_BYTES + len(_BLANK_LINE))
        if headers_end < 0:
            raise _refused(f"the headers of part {len(parts) + 1} have no end, or one too far away")
        content = headers_end + len(_BLANK_LINE)
        end = body.find(delimiter, content)
        while end >= 0 and (after := body[end + len(delimiter) : end + len(delimiter) + 2]) not in (
            _END,
            b"--",
        ):
            lookalikes += 1
            end = body.find(delimiter, end + len(delimiter)) if lookalikes <= MAX_LOOKALIKES else -1
        if end < 0:
            raise _refused("the request body ends within a part, or has too much that looks like an end")
        name, is_file = _field_of(body[headers:headers_end], len(parts) + 1)
        parts.append(_Part(name, is_file, start, content, end))
        start = end + len(_END)
        if after != _END:
            return parts, start
        headers = end + len(delimiter) + len(_END)


def _field_of(headers: bytes, number: int) -> tuple[str, bool]:
    """The name of a part's field, and whether it is a file."""
    disposition, charsets = None, []
    lines = headers.decode("latin-1").split("\r\n", MAX_PART_HEADERS)
    if len(lines) > MAX_PART_HEADERS:
        raise _refused(f"part {number} has more than {MAX_PART_HEADERS} headers")
    for line in lines:
        key, colon, value = line.partition(":")
        if not colon or not key or key != key.strip():
            raise _refused(f"part {number} has a header that is none")
        match key.lower():
            case "content-disposition":
                if disposition is not None:
                    raise _refused(f"part {number} has two names")
                disposition = value.rstrip(" \t")
            case "content-type":
                charsets += _CHARSET.findall(value)
            case "content-transfer-encoding":
                if value.strip().lower() not in _PLAIN_ENCODINGS:
                    raise _refused(f"part {number} is encoded; accepted: binary")
    parameters = _parameters_of(disposition or "")
    name = parameters.get("name")
    if name is None or "\\" in name or any(key.startswith("name*") for key in parameters):
        raise _refused(f"part {number} has no name, or one that is not plain text")
    is_file = any(key == "filename" or key.startswith("filename*") for key in parameters)
    if not is_file and not all(map(_is_plain, charsets)):
        raise _refused(f"the charset of part {number} is not accepted; accepted: utf-8")
    try:
        return name.encode("latin-1").decode(), is_file
    except UnicodeDecodeError:
        raise _refused(f"the name of part {number} is not UTF-8") from None


def _parameters_of(
    header: str, begins: re.Pattern[str] = _DISPOSITION, parameter: re.Pattern[str] = _PARAMETER
) -> dict[str, str]:
    """By name in lower case, quotes taken off; none where parsers could read the header otherwise."""
    parameters: dict[str, str] = {}
    found = begins.match(header)
    while found is not None and found.end() < len(header):
        found = parameter.match(header, found.end())
        if found is None or len(parameters) >= MAX_PARAMETERS:
            return {}
        key = found[1].lower()
        if key in parameters:
            return {}
        parameters[key] = found[3] if found[2] is None else found[2]
    return parameters


def _refused(message: str, param: str = "body") -> RouterError:
    return RouterError(Reason.INVALID_REQUEST, message, param=param)
