"""Gives a client's own name for the model back in its answer, wherever the answer is cut.

Rules:
    1. No JSON is read: `"model":"NAME"` is replaced where it stands. In a string its quotes would be escaped,
       so a text that says so is left alone.
    2. What could be the beginning of it at the end of a chunk is held back until the next one: never more
       than its own length.
"""

from __future__ import annotations

import json

from extproc.values.placements import Renamed


class Renaming:
    """One answer on its way.

    Args:
        names: The engine's, and the client's.
    """

    __slots__ = ("_held", "_longest", "_pairs")

    def __init__(self, names: Renamed) -> None:
        pairs: dict[bytes, bytes] = {}
        for ascii_only in (True, False):
            engine, client = (
                json.dumps(name, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
                for name in (names.engine, names.client)
            )
            for key in (b'"model":', b'"model": '):
                pairs.setdefault(key + engine, key + client)
        self._pairs = tuple(pairs.items())
        self._longest = max(map(len, pairs))
        self._held = b""

    def feed(self, chunk: bytes, *, end: bool) -> bytes:
        """What of the answer may go on, with the next chunk; all that is left at its end."""
        data = self._held + chunk if self._held else chunk
        for engine, client in self._pairs:
            data = data.replace(engine, client)
        kept = 0 if end else self._begun(data)
        self._held = data[len(data) - kept :] if kept else b""
        return data[: len(data) - kept] if kept else data

    def _begun(self, data: bytes) -> int:
        """How many bytes at the end could be the beginning of what is replaced."""
        at = max(0, len(data) - self._longest + 1)
        while (at := data.find(b'"', at)) >= 0:
            tail = data[at:]
            if any(engine.startswith(tail) for engine, _ in self._pairs):
                return len(tail)
            at += 1
        return 0
