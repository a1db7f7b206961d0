"""How long each turn of the event loop takes: while one lasts, no call of the process goes on.

Rules:
    1. Every turn is measured, from what woke the loop to its next wait, so that none falls between two looks.
    2. The clock decides: on a machine that is too busy a turn is long for the others' sake as well.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from extproc.observing.metrics.process import StallCause

STALL_S: Final = 0.005
"""Longer turns are reported: several times the wait for an engine step that a request does not notice."""


class WatchedSelector(selectors.DefaultSelector):
    """The loop's selector, which reports turns that took long.

    Args:
        on_stall: Called with how long one took, in seconds, and what took most of it; in the loop's thread.
        clock: Seconds.
    """

    def __init__(
        self, on_stall: Callable[[float, StallCause], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__()
        self._on_stall = on_stall
        self._clock = clock
        self._began_s: float | None = None
        self._collecting_s = 0.0
        self._collected_s = 0.0
        gc.callbacks.append(self._collects)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait; a turn ends here and another begins."""
        if self._began_s is not None:
            took_s = self._clock() - self._began_s
            if took_s > STALL_S:
                is_gc = self._collected_s > took_s / 2
                self._on_stall(took_s, StallCause.GC if is_gc else StallCause.OTHER)
        events = super().select(timeout)
        self._collected_s = 0.0
        self._began_s = self._clock()
        return events

    def close(self) -> None:
        """See `selectors.BaseSelector`."""
        if self._collects in gc.callbacks:
            gc.callbacks.remove(self._collects)
        super().close()

    def _collects(self, phase: str, _info: Mapping[str, Any]) -> None:
        """See `gc.callbacks`."""
        if phase == "start":
            self._collecting_s = self._clock()
        else:
            self._collected_s += self._clock() - self._collecting_s


def watched_loop(on_stall: Callable[[float, StallCause], None]) -> asyncio.AbstractEventLoop:
    """An event loop of asyncio's own kind, whose long turns are reported."""
    return asyncio.SelectorEventLoop(WatchedSelector(on_stall))
