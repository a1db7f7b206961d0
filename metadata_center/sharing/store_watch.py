"""How a member stands with the store where gateways meet: what is wrong there, and since when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

EMPTIED_S: Final = 60.0
"""How long it is shown that the store's data was gone: it is whole again sooner than anybody looks."""

_EMPTIED: Final = (
    "flushed, evicted by maxmemory-policy, or its clock was set; each gateway says its own again"
)


class StoreState(StrEnum):
    """How a member stands with the store."""

    JOINING = "joining"
    """The first attempt has not ended."""
    JOINED = "joined"
    NOT_JOINED = "not_joined"
    """Never since the start."""
    LOST = "lost"
    NOT_WRITABLE = "not_writable"
    """What others say is read, and nothing is accepted of this member."""
    EMPTIED = "emptied"
    """Joined; what was there is gone, or was not long ago."""


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How a member stands with the store.

    Attributes:
        state: One of these.
        reason: What is wrong, in one line; None if nothing is.
        for_s: Seconds since that began, 0 if nothing is wrong.
    """

    state: StoreState
    reason: str | None = None
    for_s: float = 0.0


class StoreWatch:
    """Takes down what happens to a member; all times are monotonic seconds of one clock."""

    def __init__(self) -> None:
        self._was_joined = False
        self._is_writable = True
        self._reason: str | None = None
        self._since_s = 0.0
        self._emptied_s = self._emptied_since_s = -math.inf

    def joined(self) -> None:
        """A message was accepted."""
        self._was_joined, self._reason = True, None

    def failed(self, reason: str, now_s: float, *, is_writable: bool) -> None:
        """An attempt failed, or what stood was lost; `is_writable` is False if the store could be read."""
        if self._reason is None:
            self._since_s = now_s
        self._reason, self._is_writable = reason, is_writable

    def emptied(self, now_s: float) -> bool:
        """What was there is gone; True if that is news."""
        is_news = now_s - self._emptied_s > EMPTIED_S
        if is_news:
            self._emptied_since_s = now_s
        self._emptied_s = now_s
        return is_news

    def status(self, now_s: float) -> StoreStatus:
        """What is wrong at this time."""
        if self._reason is not None:
            state = StoreState.LOST if self._was_joined else StoreState.NOT_JOINED
            if not self._is_writable:
                state = StoreState.NOT_WRITABLE
            return StoreStatus(state, self._reason, now_s - self._since_s)
        if now_s - self._emptied_s <= EMPTIED_S:
            return StoreStatus(StoreState.EMPTIED, _EMPTIED, now_s - self._emptied_since_s)
        return StoreStatus(StoreState.JOINED if self._was_joined else StoreState.JOINING)
