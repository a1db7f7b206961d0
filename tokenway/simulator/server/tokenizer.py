"""A real byte-level BPE for completions, in place of pieces of four bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tokenway.simulator.server.text import TokenArray, Words

_ESCAPED_BY_JSON = frozenset('"\\')


class BpeTokenizer:
    """The tokenizer of one `tokenizer.json`.

    Args:
        path: The file.

    Raises:
        ValueError: It cannot be read, or has no entry that a completion could be made of.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: {error}") from error
        special = self._tokenizer.get_added_tokens_decoder()
        ids = [index for index in range(self._tokenizer.get_vocab_size()) if index not in special]
        pieces = {index: self._tokenizer.decode([index]) for index in ids}
        usable = [index for index, piece in pieces.items() if _can_be_said(piece)]
        if not usable:
            raise ValueError(f"{path}: no entry is plain ASCII")
        self.words = Words(
            tuple(pieces[index].encode() for index in usable), np.array(usable, dtype=np.uint32)
        )

    def encode(self, text: str) -> TokenArray:
        """Token ids of a text, with what the tokenizer puts around it, shape (n,)."""
        return np.array(self._tokenizer.encode(text).ids, dtype=np.uint32)


def _can_be_said(piece: str) -> bool:
    return bool(piece) and piece.isascii() and piece.isprintable() and _ESCAPED_BY_JSON.isdisjoint(piece)
