"""Where stored responses live: the endpoint that holds each response or conversation, as far as it was seen.

Rules:
    1. An engine keeps its responses to itself, so what builds on one can only be answered there.
    2. Bounded: the entry longest without use goes first. An entry that expired is none.
    3. A wrong or missing entry costs the engine's own 404, never another client's response: what an id may be
       read by is the engine's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from metadata_center.sharing.messages import RESPONSES_MARK
from metadata_center.types import EndpointKey

DEFAULT_ENTRIES = 100_000
"""About 25 MB."""

DEFAULT_EXPIRY_S = 30 * 86_400.0
"""OpenAI keeps a response for 30 days; vLLM for as long as its process lives."""

MAX_LATEST = 16_384
"""Entries that a newcomer gets, the latest: 128 KiB of one message."""


class Homes:
    """A table of keys as of `extproc.request.responses`.

    Args:
        max_entries: Bound, >= 1.
        expiry_s: An entry is forgotten after this long without use.
    """

    def __init__(self, max_entries: int = DEFAULT_ENTRIES, expiry_s: float = DEFAULT_EXPIRY_S) -> None:
        self._max_entries = max_entries
        self._expiry_s = expiry_s
        self._homes: dict[int, tuple[EndpointKey, float]] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._homes)

    def configure(self, max_entries: int, expiry_s: float) -> None:
        """Go by these from now on."""
        self._max_entries = max_entries
        self._expiry_s = expiry_s

    def learn(self, key: int, endpoint: EndpointKey, now_s: float) -> bool:
        """The response lives there; False if that was known."""
        before = self._homes.pop(key, None)
        self._homes[key] = endpoint, now_s
        while len(self._homes) > self._max_entries:
            del self._homes[next(iter(self._homes))]
        return before is None or before[0] != endpoint

    def find(self, key: int, now_s: float) -> EndpointKey | None:
        """Where it lives, if that is known; finding it is use."""
        found = self._homes.pop(key, None)
        if found is None or now_s - found[1] > self._expiry_s:
            return None
        self._homes[key] = found[0], now_s
        return found[0]

    def hear(self, endpoint: EndpointKey, blocks: Sequence[int], now_s: float) -> bool:
        """Take what another worker or gateway sends, if it is about responses and not about blocks."""
        if not blocks or blocks[0] != RESPONSES_MARK:
            return False
        for key in islice(blocks, 1, None):
            self.learn(key, endpoint, now_s)
        return True

    def latest(self) -> dict[EndpointKey, list[int]]:
        """What a newcomer gets, by endpoint and in the form of `hear`: the latest `MAX_LATEST` entries."""
        chains: dict[EndpointKey, list[int]] = {}
        for key, (endpoint, _) in islice(reversed(self._homes.items()), MAX_LATEST):
            chains.setdefault(endpoint, []).append(key)
        return {endpoint: [RESPONSES_MARK, *reversed(keys)] for endpoint, keys in chains.items()}
