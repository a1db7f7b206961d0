"""Token boundaries in a small window of canonical text.

Rules:
    1. Only a window around the asked span is tokenized. It begins and ends where tokenizers cut: at an
       added token, a line's or a word's beginning, a word's end. What is left of a boundary does not change
       the tokens right of it, so the answer is that of the whole text, but for texts that go on for
       kilobytes without such a place.
    2. None means "the canonical tokenization has no boundary there" (or, of a span beyond the bound, "not
       looked at"); a list of ids means that both ends are boundaries.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, Protocol

import orjson

from extproc.rendering.vocabulary import (
    SPACE_MARK,
    Spelling,
    UnsupportedTokenizer,
    Vocabulary,
    added_bytes,
    steps,
)

CONTEXT_BYTES: Final = 256
"""Looked at on each side of a span for a place to cut: words end within it in most texts."""

WIDE_CONTEXT_BYTES: Final = 8192
"""Looked at if there is none: runs of digits or spaces, Base64. A window of it costs some milliseconds.
Not looked at in scripts without spaces, whose tokens are short and come back into step much sooner."""

_MARGIN_BYTES: Final = 32
"""Between the place and the span: tokenizers that do not cut at words come back into step within it."""

MAX_SPAN_BYTES: Final = 64 * 1024
"""Longest span that is tokenized: about 16,000 tokens, 10 ms."""

_WORD_START: Final = re.compile(rb"(?<=[!-~])(?= [^\s])|(?<=\n)(?=[^\s])")
"""Before a single space between words, and at the beginning of a line that is neither empty nor indented."""

_WORD_END: Final = re.compile(
    rb"(?<=[0-9A-Za-z])(?=[!-&(-/:-@[-^`{-~])"
    rb"|(?:(?<=[\xe4-\xe9][\x80-\xbf]{2})|(?<=\xe3[\x81-\x83][\x80-\xbf]))"
    rb"(?=\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c\x9a\x9b\x9f])"
)
"""Between a word or number and a punctuation mark (an apostrophe may belong to the word), and between an
ideograph or kana and one of the marks 、 。 ！ ， ： ； ？ that stand for the spaces of other scripts."""

_NOT_SPACE: Final = re.compile(rb"\S")

_FIRST_NOT_ASCII: Final = 0x80

_CONTINUATION: Final = frozenset(range(0x80, 0xC0))  # bytes inside a UTF-8 character


class TokenCuts(Protocol):
    """Where tokens end in one prompt's text."""

    def tokens_between(self, start: int, end: int) -> Sequence[int] | None:
        """Ids of the tokens that cover exactly the bytes [start, end).

        Args:
            start: Byte offset in the prompt's text.
            end: Byte offset, not less than `start`.

        Returns:
            The ids, empty for an empty span at a boundary; None if `start` or `end` is inside a token.
        """
        ...


class Encoder:
    """The tokenizer over canonical text: cuts it as the engine does and changes nothing.

    Args:
        document: The decoded `tokenizer.json`; not edited.
        vocabulary: What `read_vocabulary` made of it.

    Raises:
        UnsupportedTokenizer: The tokenizers package does not accept it.
    """

    def __init__(self, document: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        marks = any(
            step["type"] == "Metaspace" for step in steps(document.get("pre_tokenizer"), "pretokenizers")
        )
        self._writes_marks = vocabulary.spelling is Spelling.SENTENCEPIECE and not marks
        unchanging = {
            **document,
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "pre_tokenizer": _without_prepending(document.get("pre_tokenizer")),
        }
        from tokenizers import Tokenizer  # as in `canonical`

        try:
            self._tokenizer = Tokenizer.from_str(orjson.dumps(unchanging).decode())
        except Exception as error:  # the package raises nothing narrower
            raise UnsupportedTokenizer(f"tokenizers: {error}") from error
        self.pieces = vocabulary.pieces
        self.lengths = tuple(map(len, vocabulary.pieces))
        added = sorted({added_bytes(token, vocabulary.spelling) for token in vocabulary.added}, key=len)
        self._added = re.compile(b"|".join(map(re.escape, reversed(added)))) if added else None
        self._longest_added = max(map(len, added), default=0)

    def encode(self, text: str) -> list[int]:
        """Ids of canonical text, without special tokens around it."""
        if self._writes_marks:
            text = text.replace(" ", SPACE_MARK)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def specials(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the tokenizer puts before and after any text."""
        inner = self._tokenizer.encode("a", add_special_tokens=False).ids
        outer = self._tokenizer.encode("a", add_special_tokens=True).ids
        before = next(start for start in range(len(outer)) if outer[start : start + len(inner)] == inner)
        return tuple(outer[:before]), tuple(outer[before + len(inner) :])

    def start_before(self, text: bytes, position: int) -> int:
        """Nearest place to begin a window so that the tokens at `position` are those of the whole text."""
        for context in (CONTEXT_BYTES, WIDE_CONTEXT_BYTES):
            lowest = max(0, position - context)
            if self._added is not None:
                stop = min(len(text), position + self._longest_added)
                added = _last(self._added, text, lowest, stop, before=position)
                if added is not None:
                    return added
            for places in (_WORD_START, _WORD_END):
                place = _last(places, text, lowest, position - _MARGIN_BYTES, before=position)
                if place is not None:
                    return place
            if lowest == 0:
                return 0
            if text[lowest] >= _FIRST_NOT_ASCII:
                break
        return _character_start(text, lowest)

    def end_after(self, text: bytes, position: int) -> int:
        """Where to end a window so that the tokens before `position` are those of the whole text."""
        for context in (CONTEXT_BYTES, WIDE_CONTEXT_BYTES):
            highest = min(len(text), position + context)
            word = _NOT_SPACE.search(text, position, highest)
            behind_it = highest if word is None else word.end()
            for places in (_WORD_START, _WORD_END):
                found = places.search(text, behind_it, highest)
                if found is not None:
                    return self._behind_added(text, found.start())
            if highest == len(text):
                return highest
            if text[highest] >= _FIRST_NOT_ASCII:
                break
        return self._behind_added(text, _character_start(text, highest))

    def _behind_added(self, text: bytes, position: int) -> int:
        """The position, or the end of the added token that it would cut: its first half reads otherwise."""
        if self._added is not None:
            reach = self._longest_added
            for token in self._added.finditer(text, max(0, position - reach), position + reach):
                if token.start() < position < token.end():
                    return token.end()
        return position


class Window:
    """Token boundaries of one text, found by tokenizing windows of it.

    Args:
        encoder: Of the model.
        text: Canonical text, special tokens included.
    """

    __slots__ = ("_encoder", "_text")

    def __init__(self, encoder: Encoder, text: bytes) -> None:
        self._encoder = encoder
        self._text = text

    def tokens_between(self, start: int, end: int) -> Sequence[int] | None:
        """See `TokenCuts`. 80 us measured for a span of some words."""
        text, encoder = self._text, self._encoder
        if not 0 <= start <= end <= len(text) or end - start > MAX_SPAN_BYTES:
            return None
        first = encoder.start_before(text, start)
        last = encoder.end_after(text, end)
        ids = encoder.encode(text[first:last].decode(errors="replace"))
        return _between(ids, encoder.lengths, first, last, start, end)


class GivenTokens:
    """Token boundaries of a prompt that came as token ids.

    Args:
        ids: The prompt.
        lengths: Bytes per token id.
    """

    __slots__ = ("_ends", "_ids", "_lengths")

    def __init__(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        self._ids = ids
        self._lengths = lengths
        self._ends: list[int] | None = None

    def tokens_between(self, start: int, end: int) -> Sequence[int] | None:
        """See `TokenCuts`."""
        if self._ends is None:  # most prompts are never asked about
            self._ends = list(accumulate(map(self._lengths.__getitem__, self._ids), initial=0))
        return _sliced(self._ids, self._ends, start, end)


def _between(
    ids: Sequence[int], lengths: Sequence[int], first: int, last: int, start: int, end: int
) -> Sequence[int] | None:
    try:
        ends = list(accumulate(map(lengths.__getitem__, ids), initial=first))
    except IndexError:
        return None
    if ends[-1] != last:  # the tokenizer left something out: this is not canonical text
        return None
    return _sliced(ids, ends, start, end)


def _sliced(ids: Sequence[int], ends: Sequence[int], start: int, end: int) -> Sequence[int] | None:
    left = bisect_left(ends, start)
    right = bisect_left(ends, end, left)
    if right >= len(ends) or ends[left] != start or ends[right] != end:
        return None
    return ids[left:right]


def _last(places: re.Pattern[bytes], text: bytes, start: int, stop: int, *, before: int) -> int | None:
    """Where the last match within [start, stop) that begins before `before` begins."""
    last = None
    for found in places.finditer(text, start, max(start, stop)):
        if found.start() >= before:
            break
        last = found.start()
    return last


def _character_start(text: bytes, position: int) -> int:
    while position > 0 and text[position] in _CONTINUATION:
        position -= 1
    return position


def _without_prepending(pre_tokenizer: Any) -> Any:
    """The same pre-tokenizer, which puts no mark before text."""
    if not isinstance(pre_tokenizer, Mapping):
        return pre_tokenizer
    if pre_tokenizer["type"] == "Sequence":
        return {
            **pre_tokenizer,
            "pretokenizers": list(map(_without_prepending, pre_tokenizer["pretokenizers"])),
        }
    if pre_tokenizer["type"] != "Metaspace":
        return pre_tokenizer
    return {
        "type": "Metaspace",
        "replacement": SPACE_MARK,
        "prepend_scheme": "never",
        "split": pre_tokenizer.get("split", True),
    }
