"""The usual length of an answer, in tokens, as the endpoints of a group report it.

Rules:
    1. It is the mean of the last hundred answers or so, a first guess among them to begin with.
    2. No answer counts as longer than `MOST_STEP` times what is usual.
    3. Of each endpoint's answers the mean is followed, and counts as within `FACTOR` of the median
       endpoint's. With three endpoints or more, most of them honest, the usual length is therefore within
       that factor of what those say, however many answers one of the others gives.
    4. Memory is bounded as in `agreement`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from extproc.predicting.agreement import MAX_MEMBERS

GAIN: Final = 0.02
"""Share of the newest answer's length in the usual one: the last hundred count."""

MOST_STEP: Final = 16.0
"""Public traces have a longest answer of about ten times the mean; of longer ones this much counts."""

FACTOR: Final = 4.0
"""Requests go where their prefix is, so endpoints' means differ, by about two in sessions: twice that."""

_OFTEN: Final = 8

_KEPT: Final = tuple((1.0 - GAIN) ** age for age in range(1024))
"""What is left of an answer's weight after so many more, without a power for each; nothing after these."""


class _Answers:
    """Of one endpoint: sums that are forgotten at the pace of the group's answers."""

    __slots__ = ("at", "mean", "tokens", "weight")

    def __init__(self) -> None:
        self.tokens = 0.0
        self.weight = 0.0
        self.mean = 0.0
        self.at = 0


class AnswerLength:
    """What is usual in one group.

    Args:
        first_tokens: Before any answer was seen, > 0.
    """

    __slots__ = ("_count", "_due", "_first_tokens", "_members", "expected_tokens")

    def __init__(self, first_tokens: float) -> None:
        self._first_tokens = first_tokens
        self._members: OrderedDict[str, _Answers] = OrderedDict()
        self._count = 0
        self._due = 0
        self.expected_tokens = first_tokens
        """The usual length."""

    def learn(self, endpoint: str, tokens: float) -> None:
        """An answer of `endpoint` had so many tokens, finite, >= 0."""
        most = MOST_STEP * self.expected_tokens
        if tokens > most:
            tokens = most
        answers = self._members.get(endpoint)
        if answers is None:
            if len(self._members) >= MAX_MEMBERS:
                self._members.popitem(last=False)
            answers = self._members[endpoint] = _Answers()
        else:
            self._members.move_to_end(endpoint)
        self._count += 1
        kept = _kept(self._count - answers.at)
        answers.tokens = answers.tokens * kept + tokens
        answers.weight = answers.weight * kept + 1.0
        answers.mean = answers.tokens / answers.weight
        answers.at = self._count
        self._due -= 1
        if self._due <= 0:
            self._add_up()

    def _add_up(self) -> None:
        self._due = len(self._members) // _OFTEN
        middle, count, longest = self._median(), self._count, len(_KEPT)
        low, high = middle / FACTOR, middle * FACTOR
        weights = _kept(count) / GAIN  # of the first guess
        tokens = weights * self._first_tokens
        for answers in self._members.values():
            age, mean = count - answers.at, answers.mean
            weight = answers.weight * (_KEPT[age] if age < longest else 0.0)
            weights += weight
            tokens += weight * (low if mean < low else high if mean > high else mean)
        self.expected_tokens = tokens / weights

    def _median(self) -> float:
        means = [answers.mean for answers in self._members.values()]
        if len(means) > 1 and not len(means) % 2:
            means.append(self._first_tokens)  # two cannot outvote each other
        means.sort()
        return means[len(means) // 2]


def _kept(age: int) -> float:
    return _KEPT[age] if age < len(_KEPT) else 0.0
