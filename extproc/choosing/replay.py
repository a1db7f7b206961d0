"""Draws on record: what a decision drew, and the same draws again.

Rules:
    1. A decision record that holds the draws of `RecordingRng` is recomputed exactly by `ReplayRng`.
"""

from __future__ import annotations

from collections.abc import Iterable

from extproc.values.choices import Rng


class RecordingRng:
    """Passes draws on and keeps them; one per decision, so a handful at most."""

    __slots__ = ("_draws", "_rng")

    def __init__(self, rng: Rng) -> None:
        self._rng = rng
        self._draws: list[float] = []

    @property
    def draws(self) -> tuple[float, ...]:
        """All draws so far, in order."""
        return tuple(self._draws)

    def random(self) -> float:
        """Uniform float in [0, 1) from the wrapped source."""
        draw = self._rng.random()
        self._draws.append(draw)
        return draw


class ReplayRng:
    """Gives recorded draws again."""

    __slots__ = ("_draws",)

    def __init__(self, draws: Iterable[float]) -> None:
        self._draws = iter(draws)

    def random(self) -> float:
        """The next recorded draw.

        Raises:
            ValueError: More draws are asked for than were recorded: this is not the same decision.
        """
        draw = next(self._draws, None)
        if draw is None:
            raise ValueError("more draws than were recorded")
        return draw
