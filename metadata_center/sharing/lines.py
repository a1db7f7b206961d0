"""Those that wait at a member, as they travel: places in the order as ages, so that no clocks are compared.

Rules:
    1. A place is told as how long ago it was, and read as so long before it was heard. So what waits
       elsewhere seems to stand later than it does, by what the news took: for that long two members may both
       take themselves for the first.
    2. Only the first `MAX_WAITERS` are told: those behind them have long to wait.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import isfinite
from struct import Struct
from typing import Final

from metadata_center.sharing.messages import Line, MessageError
from metadata_center.types import EndpointKey, Waiter

MAX_WAITERS: Final = 64
"""In one message: a kilobyte, and what an engine of 128 sequences takes in a second or two."""

_MOST_S: Final = 3600.0
"""No request works for longer."""

_WAITER: Final = Struct("<dff")


def told(line: Iterable[Waiter], now_s: float) -> tuple[Line, ...]:
    """A line as it travels.

    Args:
        line: First in line first.
        now_s: On the clock of their ranks.
    """
    packed: defaultdict[EndpointKey, bytearray] = defaultdict(bytearray)
    for number, each in enumerate(line):
        if number == MAX_WAITERS:
            break
        work_s, least_s = min(each.work_s, _MOST_S), min(each.least_s, _MOST_S)
        packed[each.endpoint] += _WAITER.pack(now_s - each.rank, work_s, least_s)
    return tuple(Line(endpoint, bytes(waiters)) for endpoint, waiters in packed.items())


def heard(lines: Sequence[Line], now_s: float) -> list[Waiter]:
    """A line as it was told, first in line first.

    Args:
        lines: As they came.
        now_s: On the clock that their ranks are to be of.

    Raises:
        MessageError: They are none, or too many.
    """
    if sum(len(line.packed) for line in lines) > MAX_WAITERS * _WAITER.size:
        raise MessageError(f"more than {MAX_WAITERS} requests that wait")
    waiters = []
    for line in lines:
        if len(line.packed) % _WAITER.size:
            raise MessageError("a line is cut short")
        for age_s, work_s, least_s in _WAITER.iter_unpack(line.packed):
            if not (isfinite(age_s) and 0.0 <= work_s <= _MOST_S and 0.0 <= least_s <= _MOST_S):
                raise MessageError("a place, or work, that is no time")
            waiters.append(Waiter(line.endpoint, now_s - age_s, work_s, least_s))
    waiters.sort(key=lambda each: each.rank)
    return waiters
