"""Bearer tokens as people keep them, in files and variables: with the end of a line, or a byte order mark.

Rules:
    1. Pure. No message quotes a token, nor a part of one.
    2. What no header can have is found where it is read; libraries refuse it for each request.
"""

from __future__ import annotations

from typing import Final

MALFORMED: Final = "no token; accepted: one line of printable ASCII without blanks"
"""Also of an empty one."""


def bearer(content: str | bytes) -> str:
    """The token in it.

    Raises:
        ValueError: It has none, or more than one; the text is `MALFORMED`.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        raise ValueError(MALFORMED) from None
    token = text.removeprefix("\ufeff").strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(MALFORMED)
    return token
