"""How much a body would decode to, counted in its bytes before anything is decoded.

Rules:
    1. Counting costs a fraction of decoding: what most bodies are is known by their length alone.
    2. Nothing that an engine could serve is refused: the bounds are several times what fills the longest
       contexts of today in the smallest pieces that agents send.
    3. Counts are exact for valid JSON and for the valid beginning of anything else, which is all of it that a
       decoder reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from extproc.errors import Reason, RouterError
from extproc.values.exchange import Body

MAX_CONTAINERS: Final = 262_144
"""Objects and lists of one body: a context of a million tokens in messages of four tokens each, or 87,000
messages whose content is a list of one part."""

MAX_MEMBERS: Final = 1_048_576
"""Members of all objects, four per object of as many as there may be."""

MAX_ELEMENTS: Final = 6_291_456
"""Commas: a batch of token ids that fills 32 MiB has 5.6 million, a prompt of a million ids one."""

LIGHT_BYTES: Final = 64 * 1024
"""Bodies up to this are decoded at once and uncounted: the worst take 20 ms (make bench-worst-bodies)."""

HEAVY_BYTES: Final = 2 * 1024 * 1024
"""Larger ones are heavy whatever is in them, forms as well."""

_HEAVY_CONTAINERS: Final = 8_192
_HEAVY_ELEMENTS: Final = 65_536
_MANY_BYTES: Final = 512 * 1024  # less has fewer elements than that, or quick ones
_MANY_MARKS: Final = 65_536  # beyond which nothing is looked at more closely
"""What decodes and hashes in 25 ms at worst; a coding agent's turn has 0.8 MB and thousands of blocks."""

_PIECE_BYTES: Final = 1024 * 1024  # counted at once, so that masks stay in the processor's cache

_STEP_BYTES: Final = 256 * 1024
"""The same where a few passes are made: what they leave stays in the processor's cache."""

_QUOTE: Final = ord('"')
_COMMA: Final = ord(",")
_COLON: Final = ord(":")
_BRACE: Final = ord("{")
_CASE: Final = 0x20  # distinguishes "[" from "{"

_Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Structure:
    """What is in a body, outside its strings.

    Attributes:
        containers: Objects and lists.
        members: Of all objects.
        elements: Values beyond the first of each object and list.
    """

    containers: int
    members: int
    elements: int


def structure_of(body: bytes) -> Structure:
    """Count. 12 ns per byte measured, 35 where all of it is escapes."""
    if b"\\" in body:
        body = _without_escapes(body)
    containers = members = elements = 0
    is_inside = 0
    whole = np.frombuffer(body, dtype=np.uint8)
    for start in range(0, len(whole), _PIECE_BYTES):
        piece: _Bytes = whole[start : start + _PIECE_BYTES]
        quotes = (piece == _QUOTE).view(np.uint8)
        outside = (np.bitwise_xor.accumulate(quotes) ^ np.uint8(is_inside)) == 0
        containers += int(np.count_nonzero(((piece | _CASE) == _BRACE) & outside))
        elements += int(np.count_nonzero((piece == _COMMA) & outside))
        members += int(np.count_nonzero((piece == _COLON) & outside))
        is_inside ^= int(np.count_nonzero(quotes)) & 1
    return Structure(containers, members, elements)


def _without_escapes(body: bytes) -> bytes:
    """The body without escaped quotes; lengths stay, which is the quickest to replace as well."""
    return body.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")


def is_heavy(body: Body) -> bool:
    """Whether decoding and hashing may take longer than others should wait."""
    if len(body) <= LIGHT_BYTES:
        return False
    if len(body) > HEAVY_BYTES:
        return True
    containers = commas = 0
    whole = np.frombuffer(body, dtype=np.uint8)
    counts_commas = len(body) > _MANY_BYTES
    most = min(len(body), _STEP_BYTES)
    folded, found = np.empty(most, np.uint8), np.empty(most, np.bool_)
    for start in range(0, len(whole), _STEP_BYTES):
        step: _Bytes = whole[start : start + _STEP_BYTES]
        size = len(step)
        np.bitwise_or(step, _CASE, out=folded[:size])
        np.equal(folded[:size], _BRACE, out=found[:size])
        containers += int(np.count_nonzero(found[:size]))
        if counts_commas:
            np.equal(step, _COMMA, out=found[:size])
            commas += int(np.count_nonzero(found[:size]))
    if containers > _MANY_MARKS or commas > _HEAVY_ELEMENTS:
        return True
    if containers <= _HEAVY_CONTAINERS:
        return False
    # Code and JSON in strings have as many: those that are outside of strings decide.
    text = bytes(body)
    if b"\\" in text:
        whole = np.frombuffer(_without_escapes(text), dtype=np.uint8)
    quotes = np.flatnonzero(whole == _QUOTE)
    before = np.searchsorted(quotes, np.flatnonzero((whole | _CASE) == _BRACE))
    return int(np.count_nonzero((before & 1) == 0)) > _HEAVY_CONTAINERS


def check_structure(body: bytes) -> None:
    """Refuse a body of more pieces than any engine serves.

    Raises:
        RouterError: BODY_TOO_LARGE.
    """
    if len(body) <= LIGHT_BYTES:
        return
    bounds = ((b"{", b"["), MAX_CONTAINERS), ((b":",), MAX_MEMBERS), ((b",",), MAX_ELEMENTS)
    if len(body) <= MAX_CONTAINERS or all(sum(map(body.count, marks)) <= bound for marks, bound in bounds):
        return
    found = structure_of(body)
    for count, bound, what in (
        (found.containers, MAX_CONTAINERS, "objects and lists"),
        (found.members, MAX_MEMBERS, "members of objects"),
        (found.elements, MAX_ELEMENTS, "elements of objects and lists"),
    ):
        if count > bound:
            raise RouterError(
                Reason.BODY_TOO_LARGE, f"The request body has more than {bound} {what}.", param="body"
            )
