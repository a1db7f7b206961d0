"""Requests that wait at a rival's gateway: one line, in the order of a rank, and nobody passes its head.

Rules:
    1. A request that comes while others wait joins the line, wherever its rank puts it.
    2. Whether the head goes is the rival's to say; if it does not, nobody behind it does.
    3. A place is given up when its request is sent, refused, or has waited for `longest_s`: a request that
       was abandoned blocks the line no longer than that.
"""

from __future__ import annotations

from extproc.choosing.stateful import Hold

HEAD_ROOM_S = 1.0
"""Beyond the longest wait, before a place whose request never came again is given up."""


class Line:
    """Ranks of those that wait.

    Args:
        longest_s: After that a place is given up, > 0.
    """

    __slots__ = ("_longest_s", "_places")

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._places: dict[int, tuple[float, float]] = {}

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._places)

    def rank(self, request_id: int) -> float | None:
        """The rank of one that waits; None if it does not."""
        place = self._places.get(request_id)
        return None if place is None else place[0]

    def may_go(self, request_id: int, now_s: float) -> bool:
        """True for the head of the line, and for a newcomer if there is no line."""
        late = [each for each, (_, since_s) in self._places.items() if now_s - since_s > self._longest_s]
        for each in late:
            del self._places[each]
        if request_id not in self._places:
            return not self._places
        return min(self._places, key=lambda each: (self._places[each][0], each)) == request_id

    def wait(
        self, request_id: int, rank: float, now_s: float, until_s: float, *, polls: bool = False
    ) -> Hold:
        """It stays in the line or joins it; those behind it wait with it.

        Args:
            request_id: Which.
            rank: Lower goes first; one that waits already keeps the rank it came with.
            now_s: The time.
            until_s: Ask again then at the latest.
            polls: Time alone may let it go.
        """
        rank, _ = self._places.setdefault(request_id, (rank, now_s))
        return Hold(until_s, rank, closed=True, polls=polls)

    def leave(self, request_id: int) -> None:
        """It was sent, was refused, or its client left."""
        self._places.pop(request_id, None)
