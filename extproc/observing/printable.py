"""Text that came from elsewhere, made harmless for a terminal.

A client chooses model names, an engine its answers to probes. C0 controls (ESC among them) are escaped by
JSON itself; C1 controls (U+009B is a whole CSI to many terminals) and those that turn the direction of text
are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# DEL and C1; what turns the direction of text (UAX 9, "Trojan Source"); line and paragraph separators.
_CONTROLS = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: Iterable[str]) -> str:
    """The text on one line, whatever is not printable as a backslash, `x` and its number in hexadecimal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def escaped_json(encoded: bytes) -> str:
    """JSON as it was, with controls inside its strings escaped as JSON does it."""
    if encoded.isascii() and b"\x7f" not in encoded:
        return encoded.decode()
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", encoded.decode())
