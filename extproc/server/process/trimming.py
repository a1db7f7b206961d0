"""Gives memory back that large bodies took and left free: the C library keeps it, in case it is needed again.

Rules:
    1. Only memory that grew by `_GROWN_BYTES` since the last time is looked at, and at a quiet moment: when
       it grew no more for a second.
    2. It takes 0.2 ms where there is nothing to give back, and 0.8 for 16 MiB; so every `_PAUSE_S` at most.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

_GROWN_BYTES: Final = 4 * 1024 * 1024
_STILL_BYTES: Final = 1024 * 1024
"""What it may grow by in a quiet second."""

_PAUSE_S: Final = 10.0
_STATM: Final = Path("/proc/self/statm")


def trim() -> None:
    """Give back what is free. glibc alone has the call."""
    call = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if call is not None:
        call(0)


def resident_bytes() -> int:
    """Memory that this process has; 0 where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


class Trimmer:
    """Looks once a second.

    Args:
        resident: Bytes of memory that this process has.
        give_back: Gives back what is free.
    """

    def __init__(
        self, resident: Callable[[], int] = resident_bytes, give_back: Callable[[], None] = trim
    ) -> None:
        self._resident = resident
        self._give_back = give_back
        self._last = self._least = 0
        self._not_before_s = float("-inf")

    def tick(self, now_s: float) -> None:
        """Give back what is free, if it is time."""
        resident = self._resident()
        grew, self._last = resident - self._last, resident
        self._least = min(self._least or resident, resident)
        if grew > _STILL_BYTES or resident - self._least < _GROWN_BYTES or now_s < self._not_before_s:
            return
        self._give_back()
        self._last = self._least = self._resident()
        self._not_before_s = now_s + _PAUSE_S
