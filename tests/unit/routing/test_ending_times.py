"""What an ending says of times and of choices: from the first token on, and after attempts that failed."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from extproc.request.choices import MOST_CHOICES, choices_of
from extproc.values.evidence import FailureKind
from extproc.values.outcomes import Ended
from extproc.values.requests import Operation
from tests.conftest import CLUSTER, MODEL, Rig, chat, request_line

COMPLETIONS = "/v1/completions"
GEN_AI = {"gen_ai_request_model": MODEL, "gen_ai_operation_name": "chat"}


def of(rig: Rig, name: str) -> float | None:
    """The sum of a histogram of chats."""
    return rig.metric(f"gen_ai_server_{name}_seconds_sum", **GEN_AI)


@pytest.mark.parametrize(("late", "pace_s"), [(False, 0.5), (True, 0.3)])
def test_the_time_of_a_token_begins_with_the_first_one(rig: Rig, late: bool, pace_s: float) -> None:
    """Not with a comment or `response.created` before it: those waited, and computed the prompt."""
    rig.decide("r", chat("x" * 1000, stream=True))
    rig.clock.advance(2.5)
    rig.gateway.first_token("r", late=late)
    rig.end("r", ttft_s=0.5 if late else 2.5, stream_s=5.0, duration_s=30.0, completion_tokens=11)
    (ending,) = rig.endings
    assert ending.outcome.ttft_s == pytest.approx(2.5)
    assert ending.tpot_s == pytest.approx(pace_s)
    assert of(rig, "time_per_output_token") == pytest.approx(pace_s)
    tpot = rig.scheduling.predictor.calibration((MODEL, CLUSTER)).tpot
    snapshot = ending.record.snapshot
    assert tpot is not None
    assert snapshot is not None
    assert tpot.mean_error_s == pytest.approx(snapshot.steps_s[0] - pace_s, abs=1e-3)


def test_the_first_byte_of_a_response_is_no_token(rig: Rig) -> None:
    """Where nobody looks for the first token: `response.created` comes before anything is computed."""
    asked = {"model": MODEL, "stream": True}
    for path, prompt, ttft_s in (("/v1/responses", "input", None), (COMPLETIONS, "prompt", 0.5)):
        rig.gateway.decide(request_line(path, path), orjson.dumps({**asked, prompt: "x" * 1000}))
        rig.end(path, ttft_s=0.5, stream_s=5.0, completion_tokens=11)
        assert rig.endings[-1].outcome.ttft_s == ttft_s
        assert rig.endings[-1].tpot_s == (None if ttft_s is None else pytest.approx(0.5))


def test_a_first_token_after_the_last_byte_is_no_pace(rig: Rig) -> None:
    """Clocks of two processes may disagree by a little."""
    rig.decide("r", chat("x" * 1000, stream=True))
    rig.clock.advance(2.5)
    rig.gateway.first_token("r", late=True)
    rig.end("r", ttft_s=0.5, stream_s=1.9, completion_tokens=11)
    assert rig.endings[0].tpot_s is None


@pytest.mark.parametrize("late", [False, True])
def test_what_failed_before_is_in_the_time_to_the_first_token(rig: Rig, late: bool) -> None:
    """The client waited for it; the endpoint that answered is not measured by it."""
    rig.decide("r", chat("x" * 1000, stream=True))
    rig.clock.advance(3.0)
    rig.gateway.first_token("r", late=late)
    rig.end("r", attempts=2, ttft_s=0.25, stream_s=1.0, duration_s=4.0, completion_tokens=11)
    assert of(rig, "time_to_first_token") == pytest.approx(3.0)
    (ending,) = rig.endings
    assert ending.outcome.ttft_s == pytest.approx(3.0 if late else 0.25)
    assert ending.tpot_s == (None if late else pytest.approx(0.1))


def test_several_choices_are_generated_at_once(rig: Rig) -> None:
    """The time of a token, and the length of an answer, are those of one of them; all of them are counted."""
    for number in range(200):
        rig.decide(f"r{number}", chat("x" * 1000, stream=True, n=4, max_tokens=20))
        rig.gateway.first_token(f"r{number}", late=False)
        rig.end(f"r{number}", stream_s=1.9, completion_tokens=80)
        assert rig.endings[-1].outcome.completion_tokens == 80
        assert rig.endings[-1].tpot_s == pytest.approx(0.1)
    assert rig.scheduling.predictor.traffic((MODEL, CLUSTER)).output_tokens < 40


def test_several_prompts_have_several_answers(rig: Rig) -> None:
    """Each may be as long as `max_tokens`."""
    body = orjson.dumps({"model": MODEL, "prompt": ["a", "b", "c"], "n": 2, "max_tokens": 20})
    decided = rig.gateway.decide(request_line("r", COMPLETIONS), body)
    assert decided is not None
    rig.end("r", completion_tokens=120)
    assert rig.endings[0].outcome.completion_tokens == 120


@pytest.mark.parametrize("status", [301, 302, 304, 307])
def test_a_redirection_is_no_answer(rig: Rig, status: int) -> None:
    """It fails at its engine, and is not counted as completed."""
    rig.decide("r")
    rig.end("r", status=status)
    (ending,) = rig.endings
    assert (ending.evidence, ending.outcome.ended) == (FailureKind.REFUSED, Ended.UPSTREAM_ERROR)


@pytest.mark.parametrize(
    ("operation", "fields", "expected"),
    [
        (Operation.CHAT, {}, 1),
        (Operation.CHAT, {"n": 3}, 3),
        (Operation.CHAT, {"n": 3, "best_of": 9, "prompt": ["a", "b"]}, 3),
        (Operation.CHAT, {"n": None}, 1),
        (Operation.CHAT, {"n": "3"}, 1),
        (Operation.CHAT, {"n": True}, 1),
        (Operation.CHAT, {"n": -3}, 1),
        (Operation.CHAT, {"n": 10**18}, MOST_CHOICES),
        (Operation.TEXT_COMPLETION, {"prompt": "abc"}, 1),
        (Operation.TEXT_COMPLETION, {"prompt": ["a"]}, 1),
        (Operation.TEXT_COMPLETION, {"prompt": ["a", "b", "c"]}, 3),
        (Operation.TEXT_COMPLETION, {"prompt": [1, 2, 3]}, 1),
        (Operation.TEXT_COMPLETION, {"prompt": [[1, 2], [3]]}, 2),
        (Operation.TEXT_COMPLETION, {"prompt": ["a", "b"], "n": 2, "best_of": 3}, 6),
        (Operation.TEXT_COMPLETION, {"prompt": ["a", "b"], "n": 10**18}, MOST_CHOICES),
        (Operation.TEXT_COMPLETION, {"prompt_embeds": ["x", "y"]}, 2),
        (Operation.TEXT_COMPLETION, {"best_of": -1, "prompt": []}, 1),
        (Operation.EMBEDDINGS, {"input": ["a", "b"], "n": 5}, 1),
        (Operation.RESPONSES, {"n": 5}, 1),
    ],
)
def test_choices(operation: Operation, fields: dict[str, Any], expected: int) -> None:
    """What makes no sense counts for nothing."""
    assert choices_of(operation, fields) == expected
