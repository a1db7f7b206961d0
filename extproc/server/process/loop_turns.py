"""How long each turn of the event loop takes: while one lasts, no call of the process goes on.

Rules:
    1. Every turn is measured, from what woke the loop to its next wait, so that none falls between two looks.
    2. The clock decides what is long; processor time of the loop's thread says whose fault it is. A turn that
       would have been short on a free processor waited: for the machine, or for another thread of ours that
       held Python's lock.
    3. Processor time is a system call, so it is asked for once in `READING_S` at most: what turns in between
       took counts for the long one, no more than that.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from extproc.observing.metrics.process import StallCause

OnStall = Callable[[float, float, StallCause], None]

STALL_S: Final = 0.005
"""Longer turns are reported: several times the wait for an engine step that a request does not notice."""

READING_S: Final = 0.0005
"""How old the last reading of processor time may be."""


class WatchedSelector(selectors.DefaultSelector):
    """The loop's selector, which reports turns that took long.

    Args:
        on_stall: Called with how long one took, in seconds, its processor time, and its cause; in the loop's
            thread.
        clock: Seconds.
        cpu_clock: The thread's processor time in seconds.
    """

    def __init__(
        self,
        on_stall: OnStall,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        super().__init__()
        self._on_stall = on_stall
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._began_s: float | None = None
        self._read_s = self._cpu_s = 0.0
        self._collecting_s = 0.0
        self._collected_s = 0.0
        gc.callbacks.append(self._collects)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait; a turn ends here and another begins."""
        if self._began_s is not None:
            took_s = self._clock() - self._began_s
            if took_s > STALL_S:
                self._stalled(took_s)
        events = super().select(timeout)
        self._collected_s = 0.0
        self._began_s = began_s = self._clock()
        if began_s - self._read_s > READING_S:
            self._read_s, self._cpu_s = began_s, self._cpu_clock()
        return events

    def _stalled(self, took_s: float) -> None:
        own_s = min(took_s, self._cpu_clock() - self._cpu_s)
        if own_s <= STALL_S:
            cause = StallCause.WAITING
        else:
            cause = StallCause.GC if self._collected_s > own_s / 2 else StallCause.OTHER
        self._on_stall(took_s, own_s, cause)

    def close(self) -> None:
        """See `selectors.BaseSelector`."""
        if self._collects in gc.callbacks:
            gc.callbacks.remove(self._collects)
        super().close()

    def _collects(self, phase: str, _info: Mapping[str, Any]) -> None:
        """See `gc.callbacks`."""
        if phase == "start":
            self._collecting_s = self._cpu_clock()
        else:
            self._collected_s += self._cpu_clock() - self._collecting_s


def watched_loop(on_stall: OnStall) -> asyncio.AbstractEventLoop:
    """An event loop of asyncio's own kind, whose long turns are reported."""
    return asyncio.SelectorEventLoop(WatchedSelector(on_stall))
