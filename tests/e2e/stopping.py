"""A client that says something and stops, for the tests of what bounds it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

ENDS_S: Final = 30.0
"""Room for a busy machine; the bounds of these tests are of a second, the defaults of minutes."""

STALL_S: Final = 1.0
"""How long an upload may stop here."""

HEAD: Final = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


def stopping_soon(text: str) -> str:
    """Envoy's configuration, YAML or JSON, with a stop of an upload noticed after `STALL_S`."""
    assert text.count("65s") == 1
    return text.replace("65s", f"{STALL_S:g}s")


async def said_until_closed(port: int, said: bytes) -> bytes:
    """What Envoy answers to a client that says this and stops, once it has ended the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    heard = b""
    try:
        async with asyncio.timeout(ENDS_S):
            with suppress(ConnectionError):
                while part := await reader.read(65_536):
                    heard += part
    finally:
        writer.close()
    return heard
