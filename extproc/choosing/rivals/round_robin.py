"""One endpoint after the other: the usual baseline of published comparisons."""

from __future__ import annotations

from extproc.choosing.stateful import FleetView, StatefulPolicy


class RoundRobin(StatefulPolicy):
    """In turn, counted per gateway; from a drawn row on, so that several gateways do not march in step."""

    __slots__ = ("_turn",)

    def __init__(self) -> None:
        self._turn: int | None = None

    def choose(self, view: FleetView) -> int:
        """The next row; one draw at the very first."""
        rows = len(view.keys)
        self._turn = int(view.rng.random() * rows) if self._turn is None else (self._turn + 1) % rows
        return self._turn
