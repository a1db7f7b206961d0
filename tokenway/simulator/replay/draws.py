"""The randomness that a run may use, as values given to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Draws(Protocol):
    """A source of draws; `random.Random` satisfies it."""

    def random(self) -> float:
        """Uniform float in [0, 1)."""
        ...

    def gauss(self, mu: float, sigma: float) -> float:
        """Normal float of that mean and standard deviation."""
        ...

    def expovariate(self, lambd: float) -> float:
        """Exponential float of mean 1 / `lambd`."""
        ...

    def lognormvariate(self, mu: float, sigma: float) -> float:
        """Float whose logarithm is normal, of that mean and standard deviation."""
        ...


MakeDraws = Callable[[str], Draws]
"""A source for each use, by the use's name: what one draws does not disturb another."""
