"""Routing history as requests make it."""

from __future__ import annotations

import pytest

from extproc.routing.cache_history import CACHED_TOLERANCE_TOKENS, CacheHistory
from extproc.values.decisions import CacheSource
from extproc.values.evidence import FailureKind
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.types import EndpointKey
from tests.unit.ended import A, B, ending, refusal, sent


class Kept:
    """A history that knows A alone, and what was sent to others."""

    def __init__(self) -> None:
        self.index = PrefixIndex(100, 100)
        self.shared: list[tuple[EndpointKey, list[int]]] = []
        self.history = CacheHistory(
            self.index, lambda key: key == A, lambda key, blocks: self.shared.append((key, list(blocks)))
        )


@pytest.fixture
def kept() -> Kept:
    """Nothing was recorded yet."""
    return Kept()


def test_a_prompt_is_recorded_once(kept: Kept) -> None:
    """At the first sign that it is cached, whatever follows."""
    request = sent()
    kept.history.record(request)
    kept.history.record(request)
    kept.history.ended(ending(request))
    assert kept.index.size(A) == 4
    assert kept.shared == [(A, [1, 2, 3, 4])]


def test_an_answer_records_what_nothing_recorded_before(kept: Kept) -> None:
    """Without a first token the end is the first sign."""
    kept.history.ended(ending(sent()))
    assert kept.index.size(A) == 4


def test_nothing_is_recorded_of_what_was_not_answered_or_has_left(kept: Kept) -> None:
    """Failures, refusals, and endpoints that are not configured any more."""
    kept.history.ended(ending(sent(), FailureKind.RESET))
    kept.history.ended(refusal())
    elsewhere = sent()
    elsewhere.endpoint = B
    kept.history.ended(ending(elsewhere))
    assert (kept.index.total, kept.shared) == (0, [])


@pytest.mark.parametrize(
    ("reported", "view", "forgets"),
    [
        (0, CacheSource.HISTORY, True),
        (400 - CACHED_TOLERANCE_TOKENS, CacheSource.HISTORY, False),
        (0, CacheSource.ANNOUNCED, False),
        (None, CacheSource.HISTORY, False),
    ],
)
def test_an_engine_that_has_less_than_believed_has_forgotten_what_is_older(
    kept: Kept, reported: int | None, view: CacheSource, forgets: bool
) -> None:
    """Within a block of either side it may be rounding, and what the engine announced was no belief."""
    kept.index.record(A, [9])
    first = sent()
    kept.history.record(first)
    request = sent(cached_tokens=(400, 0), views=(view, view))
    kept.history.record(request)
    kept.history.ended(ending(request, predicted_cached_tokens=400, cached_tokens=reported))
    assert kept.index.match([9], (A,)) == [0 if forgets else 1]
    assert kept.index.match([1, 2, 3, 4], (A,)) == [4]
