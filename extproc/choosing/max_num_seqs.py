"""How many sequences an engine runs at once, which it does not announce.

Rules:
    1. An engine that is full by number runs the same number again and again while others wait, and never
       one more. So the limit is the most that was ever seen running, once it was seen `SURE_VISITS` times
       with others waiting and room in the KV cache; staying there is one visit.
    2. One more running than the limit refutes it. A limit that was lowered is not noticed: keep one of these
       for as long as the engine's process runs.
    3. A largest number that the engine never came back to while it was full is forgotten after
       `FORGET_READINGS` readings with others waiting below it: it was said by mistake, or to be believed.

Neither vLLM (`--max-num-seqs`) nor SGLang (`max_running_requests`) ever sets a series of its limit.
"""

from __future__ import annotations

from typing import Final

SURE_VISITS: Final = 5
"""Where the number is bound by something else, the next change after the largest yet goes up as often as
down: five returns without going beyond have a chance of 1 in 32. A full engine returns in a second or two."""

FORGET_READINGS: Final = 32
"""Two minutes of an engine that is busy all the time, at a reading each 4 s."""

FULL_CACHE_RATIO: Final = 0.9
"""Requests that wait beside a cache fuller than this may wait for its room: they say nothing of the limit."""


class SequenceLimit:
    """What is known of one endpoint's limit on sequences."""

    __slots__ = ("_below", "_is_there", "_most", "_most_below", "_visits")

    def __init__(self) -> None:
        self._most = 0
        self._visits = 0
        self._is_there = False
        self._below = 0
        self._most_below = 0

    @property
    def limit(self) -> int:
        """Most sequences at once; 0 while it is unknown."""
        return self._most if self._visits >= SURE_VISITS else 0

    def observe(self, running: int, waiting: int, kv_usage: float) -> None:
        """Learn from one reading of the engine's metrics; the same reading twice is harmless.

        Args:
            running: Sequences in its batch.
            waiting: Requests in its queue.
            kv_usage: Share of the KV cache in use, 0..1.
        """
        if running > self._most:
            self._most, self._visits, self._is_there, self._below, self._most_below = running, 0, False, 0, 0
        is_full = waiting > 0 and kv_usage < FULL_CACHE_RATIO
        is_there = is_full and running == self._most
        if is_there and not self._is_there:
            self._visits += 1
        self._is_there = is_there
        if is_full and not is_there and not self._visits:
            self._below += 1
            self._most_below = max(self._most_below, running)
            if self._below >= FORGET_READINGS:
                self._most, self._below, self._most_below = self._most_below, 0, 0
