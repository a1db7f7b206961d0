"""Text → canonical text: the bytes that its tokens, concatenated, stand for.

Rules:
    1. Equal to the concatenated pieces of the tokens of that text, by `Vocabulary.pieces`, for every text:
       what the tokenizer normalizes, prepends or swallows is done here as well, and nothing else.
    2. Costs one encoding of the text where the tokenizer leaves text alone, or leaves it alone if it is
       in Unicode's composed form (NFC) already: all byte-level tokenizers of today.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, Final

import orjson

from extproc.rendering.vocabulary import SPACE_MARK, AddedToken, Spelling, Vocabulary, steps

_WHITESPACE: Final = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space as a character class, which `str.isspace` is not quite: what added tokens swallow."""


class Canonical:
    """Makes canonical text for one tokenizer.

    Args:
        document: The decoded `tokenizer.json`.
        vocabulary: What `read_vocabulary` made of it.
    """

    def __init__(self, document: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        normalizing = list(steps(document.get("normalizer"), "normalizers"))
        self._has_marks = vocabulary.spelling is Spelling.SENTENCEPIECE
        self._prepends = [
            _prepend_scheme(step)
            for step in steps(document.get("pre_tokenizer"), "pretokenizers")
            if step["type"] == "Metaspace"
        ]
        self._normalizer = _normalizer(document) if normalizing else None
        self._is_composing = bool(normalizing) and all(step["type"] == "NFC" for step in normalizing)
        swallows = any(token.strips_left or token.strips_right for token in vocabulary.added)
        self._is_plain = not swallows and not self._has_marks and (not normalizing or self._is_composing)
        self._raw = _pattern((token.content, token) for token in vocabulary.added if not token.is_normalized)
        late = {self._normal(token.content): token for token in vocabulary.added if token.is_normalized}
        self._late = _pattern(late.items())
        found_as = {token.content: token.content for token in vocabulary.added}
        found_as |= {content: token.content for content, token in late.items()}
        self._contents = {_strip(content): said for content, said in found_as.items()} | found_as

    def of(self, text: str) -> bytes:
        """The canonical text of `text`.

        Args:
            text: Without lone surrogates, as decoded from JSON by `extproc.request.parse`.

        Raises:
            UnicodeEncodeError: There was one.
        """
        if self._is_plain and (
            not self._is_composing or text.isascii() or unicodedata.is_normalized("NFC", text)
        ):
            return text.encode()
        written: list[str] = []
        for start, piece, is_token in _cut(text, self._raw, self._contents):
            if is_token:
                written.append(piece)
                continue
            for inner, part, is_late_token in _cut(self._normal(piece), self._late, self._contents):
                written.append(part if is_late_token else self._marked(part, is_first=start + inner == 0))
        joined = "".join(written)
        return (joined.replace(SPACE_MARK, " ") if self._has_marks else joined).encode()

    def _normal(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    def _marked(self, part: str, *, is_first: bool) -> str:
        for prepend in self._prepends:
            if prepend == "always" or (prepend == "first" and is_first):
                part = part if part.startswith((SPACE_MARK, " ")) else SPACE_MARK + part
        return part


def _prepend_scheme(step: Mapping[str, Any]) -> str:
    """When a Metaspace step puts a mark before the text; older files have a boolean instead."""
    if step.get("add_prefix_space") is False:
        return "never"
    scheme: str = step.get("prepend_scheme") or "always"
    return scheme


def _normalizer(document: Mapping[str, Any]) -> Any:
    """The tokenizer's normalizer alone, without its vocabulary."""
    bare = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": document["normalizer"],
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    from tokenizers import Tokenizer  # 5 MiB that a gateway without tokenizers does without

    return Tokenizer.from_str(orjson.dumps(bare).decode()).normalizer


def _pattern(tokens: Iterable[tuple[str, AddedToken]]) -> re.Pattern[str] | None:
    """Finds the leftmost, then the longest, with the whitespace that it swallows; None for no tokens."""
    alternatives = [
        (f"[{_WHITESPACE}]*" if token.strips_left else "")
        + re.escape(content)
        + (f"[{_WHITESPACE}]*" if token.strips_right else "")
        for content, token in sorted(tokens, key=lambda item: -len(item[0]))
    ]
    return re.compile("|".join(alternatives)) if alternatives else None


def _cut(
    text: str, pattern: re.Pattern[str] | None, contents: Mapping[str, str]
) -> Iterable[tuple[int, str, bool]]:
    """Parts of `text` that are not empty: (where it starts, what it says, is it an added token)."""
    position = 0
    for found in pattern.finditer(text) if pattern is not None else ():
        if found.start() > position:
            yield position, text[position : found.start()], False
        said = found[0]
        yield found.start(), contents[said] if said in contents else contents[_strip(said)], True
        position = found.end()
    if position < len(text):
        yield position, text[position:], False


_EDGES: Final = re.compile(f"^[{_WHITESPACE}]+|[{_WHITESPACE}]+$")


def _strip(text: str) -> str:
    return _EDGES.sub("", text)
