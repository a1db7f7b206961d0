"""Smooth weighted round-robin: whose turn it is, over endpoints that come, go and change their weight.

Rules:
    1. Each turn every endpoint is owed its weight more, and the one owed most is chosen and pays the sum of
       all weights (nginx's method). So in a run of turns as long as that sum each is chosen as often as its
       weight says, and never in one burst.
    2. What is owed stays with its endpoint when others come or go, in proportion where weights change. No
       endpoint is ever owed, or owes, more than one round, so no past is made up for in a burst.
    3. Whole weights are counted exactly, whatever the number of turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

from extproc.predicting.sums import plain_sum
from metadata_center.types import EndpointKey


class Rotation:
    """The turns of one stream of requests.

    Args:
        start: Which endpoint begins, modulo their number; rotations that all began at the first one would
            together send it a burst.
    """

    __slots__ = ("_keys", "_owed", "_start", "_total", "_weights")

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._keys: tuple[EndpointKey, ...] = ()
        self._weights: Sequence[float] = ()
        self._owed: list[float] = []
        self._total = 0.0

    def turn(self, keys: tuple[EndpointKey, ...], weights: Sequence[float]) -> list[float]:
        """What each endpoint is owed in the turn that begins: the first of those owed most is to be chosen.

        Args:
            keys: Distinct, at least one; passing the same two objects again saves comparing them.
            weights: Relative capacity, > 0, one per key.
        """
        if keys is not self._keys or weights is not self._weights:
            self._change(keys, weights)
        return list(map(add, self._owed, weights))

    def served(self, owed: Sequence[float], row: int) -> None:
        """The turn ended with `row` chosen; `owed` is what `turn` returned."""
        after = list(owed)
        after[row] -= self._total
        self._owed = after

    def _change(self, keys: tuple[EndpointKey, ...], weights: Sequence[float]) -> None:
        total = plain_sum(weights)
        if self._keys:
            scale = 1.0 if total == self._total else total / self._total
            before = dict(zip(self._keys, self._owed, strict=True))
            self._owed = [max(-total, min(total, before.get(key, 0.0) * scale)) for key in keys]
        else:
            self._owed = [0.0] * len(keys)
            self._owed[self._start % len(keys)] = min(weights) / 2  # less than a turn: it orders equals alone
        self._keys, self._weights, self._total = keys, weights, total
