"""What one endpoint of a group may teach about all of them: what the others say as well, within a factor.

Endpoints of a group are equal hardware, so one whose times or counts differ from all others' is broken or
lies; a model that learned them from it would be wrong for the others, which did nothing.

Rules:
    1. Each endpoint's own level is followed: its observations over what the group's model expects. Levels are
       kept beside a reference of the model, so that one not heard of for long still says the same when the
       model has moved.
    2. An observation counts as within `factor` of the median level. With three endpoints or more, most of
       them honest, the model stays within that factor of what those say, however often the others speak.
    3. Of one or two there is no majority: each is believed, as far as the model itself bounds a step.
    4. A model that the median contradicts for long learned from others than those reporting now: it is to be
       begun anew, because what it forgets by itself it forgets slowly.
    5. Memory is bounded: `MAX_MEMBERS`, the one least recently heard goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from math import exp, log
from typing import Final

MAX_MEMBERS: Final = 256
"""Endpoints whose level is kept: a median of so many is as good as that of all."""

_MIN_MEMBERS: Final = 3

_SURE: Final = 3
"""Observations after which an endpoint has a voice."""

_GAIN: Final = 1.0 / 8.0
"""Share of the newest observation in an endpoint's level: some tens are remembered, one says little."""

_MOST_STEP: Final = log(16.0)
"""An observation moves its endpoint's level as if it were within this of it: a stall is no new level."""

_CONTRADICTED: Final = 64
"""Observations in a row that find the model contradicted: one that adapts to a change does so in fewer."""

_OFTEN: Final = 8
"""Up to so many endpoints the median is taken anew each time; of more, in proportion less often."""


class _Level:
    """One endpoint."""

    __slots__ = ("log_level", "seen")

    def __init__(self) -> None:
        self.log_level = 0.0
        self.seen = 0


class Agreement:
    """The levels of one group's endpoints.

    Args:
        factor: See Rule 2, > 1.
    """

    __slots__ = ("_contradicted", "_due", "_levels", "_log_factor", "_median")

    def __init__(self, factor: float) -> None:
        self._log_factor = log(factor)
        self._levels: OrderedDict[str, _Level] = OrderedDict()
        self._median: float | None = None
        self._due = 0
        self._contradicted = 0

    def believed(self, endpoint: str, observed: float, expected: float, reference: float) -> float:
        """What an observation counts as.

        Args:
            endpoint: Which one.
            observed: Finite, > 0.
            expected: By the group's model now, finite, > 0.
            reference: By the same model for a case that is always the same, finite, > 0.

        Returns:
            `observed`, or what is nearest to it within Rule 2.
        """
        log_reference = log(reference)
        log_ratio = log(observed / expected)
        level = self._levels.get(endpoint)
        if level is None:
            if len(self._levels) >= MAX_MEMBERS:
                self._levels.popitem(last=False)
            level = self._levels[endpoint] = _Level()
        else:
            self._levels.move_to_end(endpoint)
        said = log_ratio + log_reference
        level.seen += 1
        if level.seen == 1:
            level.log_level = said
        else:
            step = said - level.log_level
            if not -_MOST_STEP <= step <= _MOST_STEP:
                step = _MOST_STEP if step > 0.0 else -_MOST_STEP
            level.log_level += (_GAIN if level.seen >= 1.0 / _GAIN else 1.0 / level.seen) * step
        self._due -= 1
        if self._due <= 0:
            self._vote()
        if self._median is None:
            return observed
        middle, within = self._median - log_reference, self._log_factor
        self._contradicted = self._contradicted + 1 if not -within <= middle <= within else 0
        if middle - within <= log_ratio <= middle + within:
            return observed
        return expected * exp(middle + within if log_ratio > middle else middle - within)

    def is_contradicted(self) -> bool:
        """Rule 4, once for each time."""
        if self._contradicted < _CONTRADICTED:
            return False
        self._contradicted = 0
        return True

    def _vote(self) -> None:
        voices = [level.log_level for level in self._levels.values() if level.seen >= _SURE]
        voices.sort()
        self._due = len(self._levels) // _OFTEN
        half = len(voices) // 2
        if len(voices) < _MIN_MEMBERS:
            self._median = None
        elif len(voices) % 2:
            self._median = voices[half]
        else:
            self._median = (voices[half - 1] + voices[half]) / 2
