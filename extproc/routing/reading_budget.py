"""How much of the event loop's time bodies may take before larger ones are read elsewhere.

Rules:
    1. Each body that is read here is bounded by itself (`extproc.request.structure`); this bounds many
       of them at once, which together would make all other requests wait as long as one that is too large.
    2. What bodies take is measured, not guessed from what they look like: no shape gets around it.
    3. Processor time of this thread is counted, so that a busy machine sends no body elsewhere. To ask for it
       is a system call, on a busy machine as dear as the decision, so it is asked for only once bodies took
       much of the wall clock's time; until then that counts.
    4. A small body is never asked about: of the clock's time so much counts as a body of its length takes at
       worst, which is little.
    5. Pure: time is given. Owned by one event loop.
"""

from __future__ import annotations

from typing import Final

SMALL_BYTES: Final = 4096
"""Bodies up to this are always read here: the worst take a millisecond or two."""

TIMED_BYTES: Final = 16 * 1024
"""Larger bodies may have their processor time asked for."""

MOST_S_PER_BYTE: Final = 5e-7
"""What a byte of a body takes at worst (`make bench-worst-bodies`): more was another process's."""

_WORTH_COUNTING_S: Final = 0.002
"""What takes less is ordinary: a coding agent's 220 KB take half of it."""

_BURST_S: Final = 0.1
"""A fifth of Envoy's `message_timeout`; the worst single body that is read here adds 50 ms."""

_SHARE: Final = 0.25
"""Of the loop's time, for slow bodies in the long run."""


_WATCH_FROM_S: Final = _BURST_S / 4
"""What slow bodies have taken when processor time begins to be asked for: more than a few that lost the
processor to another process."""

_WATCH_S: Final = 10.0
"""For so long it is asked for."""


class ReadingBudget:
    """Time that slow bodies took lately."""

    def __init__(self) -> None:
        self._owed_s = 0.0
        self._at_s = 0.0
        self._watched_until_s = 0.0

    def is_watched(self, now_s: float) -> bool:
        """True while the time that bodies take is to be measured in processor time."""
        return now_s < self._watched_until_s

    def is_spent(self, now_s: float) -> bool:
        """True while what is not small has to be read elsewhere."""
        return self._owed_s > _BURST_S and self._owed(now_s) > _BURST_S

    def spend(self, took_s: float, now_s: float) -> None:
        """A body took so much processor time; of the clock's, where that was not watched."""
        if took_s >= _WORTH_COUNTING_S:
            self._owed_s = self._owed(now_s) + took_s
            self._at_s = now_s
            if self._owed_s > _WATCH_FROM_S:
                self._watched_until_s = now_s + _WATCH_S

    def _owed(self, now_s: float) -> float:
        return max(0.0, self._owed_s - _SHARE * (now_s - self._at_s))
