"""Endings as counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import create_autospec

import pytest

from extproc.errors import Reason
from extproc.observing.ending_counts import EndingCounts
from extproc.observing.recorder import Recorder
from extproc.values.endings import Ending
from extproc.values.evidence import FailureKind
from extproc.values.requests import COMPUTING_NOTHING, Operation
from tests.unit.ended import GROUP, MODEL, B, ending, refusal, sent


def counted(ended: Ending) -> dict[str, tuple[Any, ...]]:
    """What the recorder was given, by method."""
    recorder = create_autospec(Recorder)
    EndingCounts(recorder).ended(ended)
    return {call[0]: call.args for call in recorder.method_calls}


def test_an_end_is_counted_with_its_wait() -> None:
    """One count, of the operation and model that were asked for; what failed is waited for as well."""
    ended = replace(ending(sent(held_s=0.5)), retried_s=0.25)
    assert counted(ended) == {"observe_end": (Operation.CHAT, MODEL, ended.outcome, 0.75, 0.08)}


def test_a_fallback_is_counted_where_an_endpoint_was_reached() -> None:
    """An end without an attempt says nothing of fallbacks."""
    request = sent()
    request.endpoint = B
    assert counted(ending(request, attempts=2))["fell_back"] == (GROUP,)
    assert "fell_back" not in counted(ending(request, attempts=0, endpoint=None))


def test_an_answer_without_usage_is_counted_with_the_reason() -> None:
    """Of what failed no usage is missed."""
    nothing: dict[str, Any] = {"prompt_tokens": None, "completion_tokens": None}
    assert counted(ending(sent(), **nothing))["usage_unknown"] == (MODEL, "absent")
    assert counted(ending(sent(), usage_unseen="encoded", **nothing))["usage_unknown"] == (MODEL, "encoded")
    assert "usage_unknown" not in counted(ending(sent(), FailureKind.RESET, **nothing))


@pytest.mark.parametrize("operation", sorted(COMPUTING_NOTHING))
def test_no_usage_is_missed_where_no_model_runs(operation: Operation) -> None:
    """Their answers have none in any API."""
    request = sent()
    request.operation = operation
    assert "usage_unknown" not in counted(ending(request, prompt_tokens=None, completion_tokens=None))


def test_a_refusal_is_counted_as_one() -> None:
    """It never was sent, so nothing ends upstream."""
    assert counted(refusal(429, rejected=Reason.OVERLOADED)) == {"rejected": (Reason.OVERLOADED, "", 429)}
