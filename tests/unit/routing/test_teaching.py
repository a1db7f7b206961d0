"""What requests teach the predictor."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.choosing.teaching import Teaching
from extproc.predicting.predictor import Predictor
from extproc.values.evidence import FailureKind, NoFailure
from extproc.values.inflight import Inflight
from tests.unit.ended import GROUP, MODEL, B, ending, refusal, sent

KEY = (MODEL, GROUP)


def learned(predictor: Predictor) -> tuple[int, int, bool]:
    """First tokens and paces compared with what was foreseen, and whether a prompt's tokens were learned."""
    learned = predictor.calibration(KEY)
    ttft, tpot = (0 if summary is None else summary.num_observed for summary in (learned.ttft, learned.tpot))
    return ttft, tpot, bool(dict(predictor.token_ratios()))


def test_an_answer_teaches_all_that_it_shows() -> None:
    """Tokens per byte, time to first token and pace."""
    predictor = Predictor()
    Teaching(predictor).ended(ending(sent(), predicted_ttft_s=0.1))
    assert learned(predictor) == (1, 1, True)


@pytest.mark.parametrize(
    ("record", "changes", "teaches"),
    [
        ({"stream": False}, {}, (0, 0, True)),
        ({}, {"attempts": 2}, (0, 0, True)),
        ({}, {"prompt_tokens": None, "completion_tokens": None}, (1, 0, False)),
        ({}, {"ttft_s": None, "stream_s": None}, (0, 0, True)),
        ({}, {"status": 206}, (0, 0, False)),
    ],
)
def test_what_is_mixed_or_unknown_teaches_no_times(
    record: dict[str, Any], changes: dict[str, Any], teaches: tuple[int, int, bool]
) -> None:
    """Whole answers have no first token, a second attempt has the first one's time in it."""
    predictor = Predictor()
    Teaching(predictor).ended(ending(sent(**record), predicted_ttft_s=0.1, **changes))
    assert learned(predictor) == teaches


def test_nothing_is_learned_from_what_did_not_complete() -> None:
    """Failures, clients that left, refusals."""
    predictor = Predictor()
    teaching = Teaching(predictor)
    for evidence in (FailureKind.TRUNCATED, NoFailure.UNKNOWN):
        teaching.ended(ending(sent(), evidence))
    teaching.ended(refusal())
    assert learned(predictor) == (0, 0, False)
    assert len(predictor) == 0


def first_token(request: Inflight) -> bool:
    """True if its first token taught something."""
    Teaching(Predictor()).first_token(request, 0.2)
    return request.is_learned


def test_a_cold_group_learns_from_first_tokens_where_they_were_chosen() -> None:
    """A fallback's first token has the failed attempt's time in it."""
    elsewhere = sent()
    elsewhere.endpoint = B
    assert first_token(sent())
    assert not first_token(elsewhere)
