"""What is known of each engine beside its load: how much it holds at once, and what it is at.

Rules:
    1. What an engine reports of itself comes by `observe_*`; what its answers show, by the other calls.
    2. Empty columns mean that nothing is known of anybody: most fleets are never full.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import numpy as np

from extproc.choosing.kept_columns import KeptColumns
from extproc.choosing.max_num_seqs import LimitSource, Reading, SequenceLimits
from extproc.choosing.snapshots import Engines as EnginesView
from metadata_center.types import MANY_ROWS, EndpointKey

NOTHING_READ: Final = Reading(0, 0, 0, 0.0)
"""Of an engine whose metrics were not read."""


class Engines:
    """One worker's knowledge; bounded by the endpoints that exist, see `retain`."""

    def __init__(self) -> None:
        self._kv_tokens: dict[EndpointKey, int] = {}
        self._kv_columns = KeptColumns(lambda key: self._kv_tokens.get(key, 0))
        self._sequence_limits = SequenceLimits()
        self._readings: dict[EndpointKey, Reading] = {}
        self._started_s: dict[EndpointKey, float] = {}

    def observe_kv_tokens(self, key: EndpointKey, kv_tokens: int) -> None:
        """The size of its KV cache."""
        if self._kv_tokens.get(key) != kv_tokens:
            self._kv_tokens[key] = kv_tokens
            self._kv_columns.changed()

    def configure(self, key: EndpointKey, alike: str, max_num_seqs: int) -> None:
        """What its source says of it, see `SequenceLimits.configure`."""
        self._sequence_limits.configure(key, alike, max_num_seqs)

    def observe_occupancy(
        self,
        key: EndpointKey,
        running: int,
        waiting: int,
        kv_usage_ratio: float,
        started_s: float | None = None,
        prompt_tokens: float | None = None,
    ) -> None:
        """How full it is; from several such readings its limit on sequences is learned.

        Args:
            key: Whose.
            running: Requests in its batch.
            waiting: Requests in its queue.
            kv_usage_ratio: See `Reading`.
            started_s: When its process began, if it says so; another process may have another limit.
            prompt_tokens: See `Reading`.
        """
        if started_s is not None and self._started_s.setdefault(key, started_s) != started_s:
            self.restarted(key)
            self._started_s[key] = started_s
        last = self._readings.get(key)
        number = 1 if last is None else last.number + 1
        reading = Reading(number, running, waiting, kv_usage_ratio, prompt_tokens)
        self._readings[key] = reading
        self._sequence_limits.observe(key, reading)

    def first_token(
        self, key: EndpointKey, decoding: int, sent_s: float, now_s: float, prefill_s: float
    ) -> None:
        """A first token came; see `Replacements.first_token`."""
        self._sequence_limits.first_token(key, decoding, sent_s, now_s, prefill_s)

    def sequence_ended(self, key: EndpointKey, decoding: int, now_s: float) -> None:
        """A request that had its first token is over; see `Replacements.ended`."""
        self._sequence_limits.ended(key, decoding, now_s)

    def restarted(self, key: EndpointKey) -> None:
        """It may be another process, with other limits."""
        self._sequence_limits.restarted(key)
        self._readings.pop(key, None)

    def reading(self, key: EndpointKey) -> Reading:
        """What its metrics last said of how full it is; all zero if they have not."""
        return self._readings.get(key, NOTHING_READ)

    def forget(self, keys: Iterable[EndpointKey]) -> None:
        """They left the configuration."""
        for key in keys:
            self._sequence_limits.forget(key)
            self._readings.pop(key, None)
            if self._kv_tokens.pop(key, None) is not None:
                self._kv_columns.changed()
            self._started_s.pop(key, None)

    def retain(self, keys: AbstractSet[EndpointKey]) -> None:
        """Keep these alone: news of requests that outlived their endpoint is kept no longer than this."""
        known = self._kv_tokens.keys() | self._readings.keys()
        known |= self._started_s.keys() | set(self._sequence_limits.keys)
        self.forget(known - keys)

    @property
    def kv_tokens(self) -> Mapping[EndpointKey, int]:
        """Sizes of KV caches, as far as they are known."""
        return self._kv_tokens

    def max_num_seqs(self, keys: tuple[EndpointKey, ...]) -> Sequence[int]:
        """Limits on sequences, 0 where one is unknown; empty if all are."""
        return self._sequence_limits.column(keys)

    def sequence_limit(self, key: EndpointKey) -> tuple[int, LimitSource]:
        """Its limit on sequences, 0 while that is unknown, and where it is from."""
        return self._sequence_limits.limit(key)

    def view(
        self,
        keys: tuple[EndpointKey, ...],
        distinct_ratios: Callable[[Sequence[EndpointKey]], Sequence[float]],
        under_way_s: Sequence[float],
    ) -> EnginesView:
        """All of it, as policies take it.

        Args:
            keys: Whose.
            distinct_ratios: Which part of the prompts that run at each endpoint is there once, 0..1.
            under_way_s: See `under_way_s`; empty where nobody asks.
        """
        sizes = self._kv_tokens
        return EnginesView(
            kv_tokens=self._kv_columns.of(keys) if sizes else (),
            max_num_seqs=self.max_num_seqs(keys),
            distinct_ratios=distinct_ratios(keys) if sizes else (),
            under_way_s=under_way_s,
        )


def under_way_s(since_s: Sequence[float], prefilling: Sequence[int], now_s: float) -> Sequence[float]:
    """For how long each endpoint has been at the prefill at the head of its queue; 0 where none is.

    Args:
        since_s: See `LoadStore.prefill_since_s`, shape (n,); another process may have said it after `now_s`.
        prefilling: Requests not known to be prefilled, shape (n,).
        now_s: The time.
    """
    if len(since_s) >= MANY_ROWS:
        since, counts = np.array(since_s), np.array(prefilling, np.int64)
        found = np.where((counts > 0) & (since > 0.0), np.maximum(now_s - since, 0.0), 0.0)
        return array("d", found.tobytes())
    return [
        now_s - since if count and 0.0 < since < now_s else 0.0
        for since, count in zip(since_s, prefilling, strict=True)
    ]
