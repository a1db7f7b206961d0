"""What the benchmark of the real path computes: its set-ups, streams as clients see them, and its figures."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random
from typing import Any

import orjson
import pytest

from benchmarks.conversations import conversations
from benchmarks.real_engines import ENGINES, PROFILE, SLOWDOWN, Real, Used, announced_ratio, held_requests
from benchmarks.real_path import both_row, fleet, job, moved, real_row, replayed, schedule, slowed
from benchmarks.real_path_setups import SETUPS, Setup, refusal
from benchmarks.streaming import Reading, ScheduledRequest, StreamedAnswer, figures
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.replay.sweep import run_job

SCHEDULED = ScheduledRequest(due_s=2.0, body=b"{}", prompt_tokens=100, output_tokens=3)
BEGAN_S = 1000.0


def event(**fields: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(fields) + b"\n"


def token(text: str = "w") -> bytes:
    """One token's event."""
    return event(choices=[{"index": 0, "text": text}])


def usage(prompt_tokens: int = 100, details: Any = None) -> bytes:
    """The closing event."""
    return event(choices=[], usage={"prompt_tokens": prompt_tokens, "prompt_tokens_details": details})


def read(*lines: tuple[float, bytes]) -> StreamedAnswer:
    """What lines at times after the start come to."""
    reading = Reading()
    for at_s, line in lines:
        reading.line(line, BEGAN_S + at_s)
    return reading.answer(SCHEDULED, BEGAN_S, 0.001)


DONE = b"data: [DONE]\n"


def test_a_stream_is_timed_from_when_it_was_due_by_its_tokens_alone() -> None:
    """Comments, empty texts and the usage are no tokens; the pace is that of the tokens after the first."""
    answer = read(
        (2.1, b": keep-alive\n"),
        (2.2, token("")),
        (2.5, token()),
        (2.5, b"\n"),
        (2.6, token()),
        (2.9, token()),
        (3.5, usage(details={"cached_tokens": 64})),
        (3.5, DONE),
    )
    assert answer.error is None
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.tpot_s == pytest.approx(0.2)
    assert (answer.prompt_tokens, answer.cached_tokens) == (100, 64)


def test_usage_without_details_means_nothing_cached() -> None:
    """An engine that does not report it is taken at its word."""
    answer = read((2.5, token()), (2.6, token()), (2.7, token()), (2.8, usage()), (2.8, DONE))
    assert (answer.error, answer.cached_tokens) == (None, 0)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([token(), token(), token(), usage()], "broke off"),
        ([DONE], "broke off"),
        ([token(), token(), usage(), DONE], r"\(100, 2\) tokens of prompt and answer, not \(100, 3\)"),
        ([token(), token(), token(), usage(99), DONE], r"\(99, 3\) tokens"),
        ([token(), token(), token(), DONE], r"\(0, 3\) tokens"),
    ],
    ids=["no end", "nothing", "short answer", "other prompt", "no usage"],
)
def test_an_answer_that_is_not_whole_is_an_error(lines: list[bytes], said: str) -> None:
    """It says what is missing and has no latency."""
    answer = read(*((2.5, line) for line in lines))
    assert answer.error is not None
    assert re.search(said, answer.error)
    assert (answer.ttft_s, answer.is_refused) == (0.0, False)


@pytest.mark.parametrize("data", [b"{", b"[1]", b"1"])
def test_an_event_that_is_no_object_is_refused(data: bytes) -> None:
    """The documented error, whatever came."""
    with pytest.raises(ValueError):
        Reading().line(b"data: " + data + b"\n", 0.0)


def test_figures_are_of_what_came_after_the_warm_up() -> None:
    """Refusals and errors are counted apart and have no part in latencies or in the cached share."""
    whole = StreamedAnswer(20.0, 0.0, ttft_s=1.0, tpot_s=0.1, prompt_tokens=100, cached_tokens=50)
    found = figures(
        [
            replace(whole, due_s=14.9, ttft_s=99.0),
            whole,
            replace(whole, ttft_s=3.0, tpot_s=0.3, prompt_tokens=300, cached_tokens=250, late_s=0.02),
            StreamedAnswer(21.0, 0.0, "429 b''", is_refused=True),
            StreamedAnswer(22.0, 0.0, "503 b''"),
        ],
        15.0,
    )
    assert (found.requests, found.errors, found.refused) == (4, 1, 1)
    assert (found.ttft_mean_s, found.ttft_p50_s) == (2.0, 2.0)
    assert found.ttft_p90_s == pytest.approx(2.8)
    assert found.tpot_mean_s == pytest.approx(0.2)
    assert (found.cached_ratio, found.late_max_s) == (0.75, 0.02)


def test_figures_of_nothing_are_none() -> None:
    """No answer, no latency; not a zero that looks like a good one."""
    found = figures([StreamedAnswer(20.0, 0.0, "503 b''")], 15.0)
    assert (found.requests, found.errors, found.ttft_mean_s, found.ttft_p90_s) == (1, 1, None, None)
    assert found.cached_ratio == 0.0


def test_tokenway_takes_the_set_ups_and_the_simulator_has_their_rules() -> None:
    """Names are distinct, rivals are those that are not least completion, every rule can be replayed."""
    assert len({setup.name for setup in SETUPS}) == len(SETUPS)
    assert [setup.is_rival for setup in SETUPS] == [s.algorithm != "least_completion" for s in SETUPS]
    for setup in SETUPS:
        assert refusal(setup) is None
        job(setup, conversations(Random(1), 3), 1.0, 10.0).entrant.maker()  # raises for an unknown rule


def test_a_configuration_that_tokenway_refuses_says_why() -> None:
    """So that its set-up is skipped with a reason."""
    reason = refusal(Setup("new", "least_request", "least_request", sections={"no_such_section": {}}))
    assert reason is not None
    assert "no_such_section" in reason


def test_a_slowed_engine_takes_so_many_times_as_long_for_every_step() -> None:
    """Speed changes, size and limits do not."""
    profile = PROFILES[PROFILE]
    slow = slowed(profile, 3.0)
    for step in ((1, 0.0, 0, 1), (2048, 1e7, 0, 1), (10, 0.0, 50_000, 10)):
        assert slow.step_s(*step) == pytest.approx(3.0 * profile.step_s(*step))
    assert slow.alpha0_ms == 3.0 * profile.alpha0_ms
    assert (slow.kv_tokens, slow.max_num_seqs) == (profile.kv_tokens, profile.max_num_seqs)
    assert {member.profile for member in fleet()} == {slowed(profile, SLOWDOWN)}
    assert len(fleet()) == ENGINES


def test_both_paths_are_asked_the_same_requests_at_the_same_times() -> None:
    """At twice the rate they come in half the time, and nothing comes after the end, in either world."""
    trace = conversations(Random(3), 40)
    texts = [f"prompt {index}" for index in range(40)]
    asked = schedule(trace, texts, 2.0, 15.0)
    assert 10 < len(asked) < 40
    assert [each.due_s for each in asked] == [r.arrival_s / 2.0 for r in trace.requests[: len(asked)]]
    bodies = [orjson.loads(each.body) for each in asked]
    assert [body["prompt"] for body in bodies] == texts[: len(asked)]
    assert [body["max_tokens"] for body in bodies] == [each.output_tokens for each in asked]
    entered = job(SETUPS[0], trace, 2.0, 15.0)
    no_warm_up = replace(entered, settings=replace(entered.settings, warmup_s=0.0))
    assert run_job(no_warm_up).summary.requests == len(asked)


def test_virtual_runs_differ_by_milliseconds_of_arrival_alone() -> None:
    """The first is the trace itself; in others arrivals move by no more than they may, and not before 0."""
    trace = conversations(Random(3), 60)
    other = moved(trace, Random(1), 0.5)
    assert other != trace
    for one, two in zip(trace.requests, other.requests, strict=True):
        assert abs(one.arrival_s - two.arrival_s) <= 0.5
        assert two.arrival_s >= 0.0
        assert replace(two, arrival_s=one.arrival_s) == one
    summaries = replayed(SETUPS[0], trace, 3.0, 25.0)
    assert summaries[0] == run_job(job(SETUPS[0], trace, 3.0, 25.0)).summary
    assert len({summary.ttft_mean_s for summary in summaries}) > 1


def test_the_announced_share_is_that_of_decisions_without_history() -> None:
    """Announced caches and prompts on their way stand on announcements; without a decision nothing does."""
    text = "# TYPE tokenway_cache_views counter\n"
    for view, count in (("announced", 6), ("history", 2), ("running", 2)):
        text += f'tokenway_cache_views_total{{view="{view}"}} {count}\n'
    assert announced_ratio(text) == pytest.approx(0.8)
    assert announced_ratio("") == 0.0


def test_held_requests_are_summed_over_models_and_reasons() -> None:
    """Both labels count; a gateway that does not hold has none."""
    text = "# TYPE tokenway_holds counter\n"
    for model, reason, count in (("a", "prefill", 6), ("a", "kv_cache", 2), ("b", "prefill", 1)):
        text += f'tokenway_holds_total{{model="{model}",reason="{reason}"}} {count}\n'
    assert held_requests(text) == 9
    assert held_requests("") == 0


def test_tables_show_what_was_not_answered_as_a_dash() -> None:
    """A set-up whose every request failed has a line as well."""
    used = Used(dict.fromkeys(("engines", "tokenway", "envoy", "client"), 0.1), 0.5, 0.25)
    run = Real(figures([StreamedAnswer(20.0, 0.0, "503")], 15.0), [3, 1, 2, 2], 1.0, 0, used, 1.0, ["503"])
    row = real_row("failed", run)
    assert row.count("–") == 5
    assert "| 2 [3, 1, 2, 2] |" in row
    assert "50% 25%" in row
    summaries = replayed(SETUPS[0], conversations(Random(3), 60), 3.0, 25.0)
    assert both_row("failed", run, summaries).startswith("| failed | – | – | – | 0 / ")
    answered = figures([StreamedAnswer(20.0, 0.0, None, ttft_s=1.0, tpot_s=0.1, prompt_tokens=4)], 15.0)
    assert "| 1 / " in both_row("answered", replace(run, figures=answered), summaries)
