"""The step model: worked timings, scheduling rules, and what holds for any workload."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenway.simulator.engine.engine import Admission, Engine, EngineRequest, Rejection, StepResult
from tokenway.simulator.engine.prefix_cache import BlocksRemoved, BlocksStored, CacheCleared
from tokenway.simulator.engine.profile import PROFILES, EngineProfile

H100 = PROFILES["llama8b-h100"]
SMALL = EngineProfile(
    "small", 1.0, 2.0, 0.1, 0.0, 0.0, 0.0, 0.0, 64, block_size=4, max_num_batched_tokens=16, max_num_seqs=4
)


def _request(name: str, prompt: int, output: int, keys: list[int] | None = None) -> EngineRequest:
    return EngineRequest(name, prompt, output, keys or [])


def _run(engine: Engine, limit: int = 10_000) -> list[StepResult]:
    steps = []
    while (due_s := engine.next_step_due()) is not None:
        steps.append(engine.step(due_s))
        assert len(steps) < limit, "the engine does not come to rest"
    return steps


def test_a_full_prefill_step_takes_what_the_calibration_says() -> None:
    """2,048 new tokens take about 49 ms on an H100, the published 42,000 tokens per second."""
    engine = Engine(H100)
    engine.submit(_request("a", 2048, 1), 0.0)
    (step,) = _run(engine)
    assert step.duration_s == pytest.approx(0.049, abs=0.001)
    assert step.start_s == H100.alpha0_ms / 1000


def test_decode_steps_take_what_the_calibration_says() -> None:
    """64 decodes at 2,000 tokens of context take about 17 ms a step on an H100."""
    engine = Engine(H100)
    for index in range(64):
        engine.submit(_request(str(index), 2048, 100), 0.0)
    full = [step for step in _run(engine) if step.scheduled_tokens == len(step.tokens) == 64]
    assert len(full) > 30
    assert full[0].duration_s == pytest.approx(0.017, abs=0.001)


def test_named_profiles_differ_as_the_hardware_does() -> None:
    """The slower card takes longer for the same step, and the demo cache is small."""
    prefill = {name: profile.step_s(2048, 0, 0, 1) for name, profile in PROFILES.items()}
    assert prefill["llama8b-h100"] == prefill["demo"] < prefill["llama8b-a100"] < prefill["llama70b-4xh100"]
    assert PROFILES["demo"].kv_tokens == 65_536


def test_long_prompts_are_prefilled_in_chunks() -> None:
    """A prompt beyond the token budget takes several steps and gets its first token in the last."""
    engine = Engine(SMALL)
    engine.submit(_request("a", 40, 2), 0.0)
    steps = _run(engine)
    assert [step.scheduled_tokens for step in steps] == [16, 16, 8, 1]
    assert [step.first_tokens for step in steps] == [[], [], ["a"], []]
    assert [step.finished for step in steps] == [[], [], [], ["a"]]


def test_decodes_go_before_prefill_chunks() -> None:
    """A running decode advances in every step of a long prefill, which gets the rest of the budget."""
    engine = Engine(SMALL)
    engine.submit(_request("a", 4, 10), 0.0)
    engine.step(0.0)
    engine.submit(_request("b", 20, 1), 0.0)
    due_s = engine.next_step_due()
    assert due_s is not None
    step = engine.step(due_s)
    assert (step.tokens, step.scheduled_tokens) == (["a"], 16)


def test_a_later_prefill_chunk_pays_for_the_context_before_it() -> None:
    """Attention makes the second chunk of a prompt dearer than the first, by c times the pairs."""
    profile = replace(SMALL, c_ms_per_pair=1.0)
    engine = Engine(profile)
    engine.submit(_request("a", 32, 1), 0.0)
    first, second = _run(engine)
    assert second.duration_s - first.duration_s == pytest.approx(16 * 16 * 1e-3)


def test_cached_tokens_are_not_computed_again() -> None:
    """The second of two equal prompts computes only what the cache cannot have."""
    engine = Engine(SMALL)
    keys = [1, 2, 3]
    engine.submit(_request("a", 13, 1, keys), 0.0)
    _run(engine)
    engine.submit(_request("b", 13, 1, keys), 1.0)
    (step,) = _run(engine)
    assert step.admitted == [Admission("b", 12)]
    assert step.scheduled_tokens == 1


def test_a_prompt_of_whole_blocks_recomputes_its_last_block() -> None:
    """A prompt of exactly k cached blocks hits k - 1 of them: the last token must be computed."""
    engine = Engine(SMALL)
    for name in ("a", "b"):
        engine.submit(_request(name, 12, 1, [1, 2, 3]), 0.0)
        (step,) = _run(engine)
    assert step.admitted == [Admission("b", 8)]


def test_requests_of_one_step_share_their_prefix() -> None:
    """A request admitted right behind another hits the blocks that this very step computes, as in vLLM."""
    engine = Engine(SMALL)
    engine.submit(_request("a", 9, 1, [1, 2]), 0.0)
    engine.submit(_request("b", 9, 1, [1, 2]), 0.0)
    (step,) = _run(engine)
    assert step.admitted == [Admission("a", 0), Admission("b", 8)]


def test_generated_tokens_fill_blocks_that_are_stored() -> None:
    """A block completed during decode is announced with its parent; the newest token is not in it yet."""
    engine = Engine(SMALL)
    engine.submit(_request("a", 6, 4, [1, 2]), 0.0)
    stored = [(len(step.tokens), event) for step in _run(engine) for event in step.events]
    assert [event for _, event in stored] == [
        BlocksStored((1,), None, 0, None),
        BlocksStored((2,), 1, 1, None),
    ]
    engine.submit(_request("b", 6, 2, [8, 9]), 9.0)
    assert [event for step in _run(engine) for event in step.events] == [BlocksStored((8,), None, 0, None)]


def test_a_full_pool_preempts_the_newest_and_still_finishes_everyone() -> None:
    """When decodes outgrow the pool the newest one starts over, and no token is lost or repeated."""
    engine = Engine(SMALL)
    for index in range(4):
        engine.submit(_request(str(index), 8, 24), 0.0)
    steps = _run(engine)
    preempted = [name for step in steps for name in step.preempted]
    assert preempted
    assert "0" not in preempted
    assert Counter(name for step in steps for name in step.tokens) == dict.fromkeys("0123", 24)
    assert [name for step in steps for name in step.first_tokens] == list("0123")


def test_a_preempted_sequence_goes_back_before_those_that_never_ran() -> None:
    """First come, first served holds across preemption, even if a later request would fit sooner."""
    engine = Engine(SMALL)
    for name in "abc":
        engine.submit(_request(name, 24, 30), 0.0)
    steps = _run(engine)

    def first(field: str, entry: object) -> int:
        return next(index for index, step in enumerate(steps) if entry in getattr(step, field))

    assert first("preempted", "b") < first("finished", "a") < first("admitted", Admission("c", 0))


def test_limits_on_the_queue_reject_arrivals() -> None:
    """A request over either limit is refused with vLLM's reason and leaves no trace."""
    by_requests = Engine(replace(SMALL, max_num_queued_reqs=1))
    assert by_requests.submit(_request("a", 4, 1), 0.0) is None
    assert by_requests.submit(_request("b", 4, 1), 0.0) is Rejection.QUEUED_REQUESTS
    by_tokens = Engine(replace(SMALL, max_num_queued_tokens=10))
    assert by_tokens.submit(_request("a", 8, 1), 0.0) is None
    assert by_tokens.submit(_request("b", 4, 1), 0.0) is Rejection.QUEUED_TOKENS
    assert by_tokens.num_waiting == 1
    _run(by_tokens)
    assert by_tokens.submit(_request("b", 4, 1), 9.0) is None


def test_requests_that_can_never_run_are_refused() -> None:
    """A live id, an empty prompt and a request larger than the pool are errors of the caller."""
    engine = Engine(SMALL)
    engine.submit(_request("a", 4, 1), 0.0)
    for request in (_request("a", 4, 1), _request("b", 0, 1), _request("b", 4, 0), _request("b", 60, 5)):
        with pytest.raises(ValueError, match=r"live|positive|fit"):
            engine.submit(request, 0.0)


def test_a_step_before_it_is_due_is_refused() -> None:
    """Steps neither overlap nor run on an idle engine."""
    engine = Engine(SMALL)
    with pytest.raises(ValueError, match="due"):
        engine.step(0.0)
    engine.submit(_request("a", 4, 5), 0.0)
    step = engine.step(0.0)
    with pytest.raises(ValueError, match="due"):
        engine.step(step.end_s - 1e-6)


def test_an_abort_frees_blocks_at_once() -> None:
    """Aborting works in every state, once."""
    engine = Engine(SMALL)
    engine.submit(_request("decode", 4, 9), 0.0)
    engine.step(0.0)
    engine.submit(_request("prefill", 30, 9), 0.0)
    engine.submit(_request("wait", 4, 9), 0.0)
    engine.step(engine.next_step_due() or 0.0)
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    for name in ("decode", "prefill", "wait"):
        assert engine.abort(name)
        assert not engine.abort(name)
    assert (engine.kv_usage_ratio, engine.next_step_due()) == (0.0, None)


def test_a_reset_is_announced_by_the_next_step() -> None:
    """Resetting the cache says so in front of the next request's blocks, and is refused under load."""
    engine = Engine(SMALL)
    engine.submit(_request("a", 4, 2, [1]), 0.0)
    engine.step(0.0)
    assert not engine.reset_prefix_cache()
    _run(engine)
    assert engine.reset_prefix_cache()
    engine.submit(_request("b", 4, 1, [1]), 9.0)
    (step,) = _run(engine)
    assert step.events == (CacheCleared(), BlocksStored((1,), None, 0, None))


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    """Operations: ("submit", family, prompt, output), ("step", 0, 0, 0), ("abort", index, 0, 0)."""
    submit = st.tuples(st.just("submit"), st.integers(0, 2), st.integers(1, 40), st.integers(1, 24))
    step = st.just(("step", 0, 0, 0))
    abort = st.tuples(st.just("abort"), st.integers(0, 30), st.just(0), st.just(0))
    return draw(st.lists(st.one_of(submit, step, step, abort), max_size=40))


@settings(max_examples=200)
@given(workload=workloads())
def test_any_workload_conserves_tokens_and_blocks(workload: list[tuple[str, int, int, int]]) -> None:
    """Every survivor gets its tokens, hits obey their bound, no block leaks, events mirror the cache."""
    engine = Engine(SMALL)
    requests: dict[str, EngineRequest] = {}
    aborted: set[str] = set()
    tokens: Counter[str] = Counter()
    finished: list[str] = []
    firsts: list[str] = []
    copies: Counter[int] = Counter()

    def apply(step: StepResult) -> None:
        tokens.update(step.tokens)
        finished.extend(step.finished)
        firsts.extend(step.first_tokens)
        assert 0 < step.scheduled_tokens <= SMALL.max_num_batched_tokens
        assert len(step.tokens) <= SMALL.max_num_seqs
        for admission in step.admitted:
            prompt = requests[admission.request_id].prompt_tokens
            assert admission.cached_tokens <= (prompt - 1) // 4 * 4
        for event in step.events:
            if isinstance(event, BlocksStored):
                assert event.parent is None or copies[event.parent] > 0
                copies.update(event.keys)
            elif isinstance(event, BlocksRemoved):
                copies.subtract(event.keys)

    for kind, first, prompt, output in workload:
        due_s = engine.next_step_due()
        if kind == "submit":
            name = str(len(requests))
            requests[name] = _request(
                name, prompt, output, [first * 1000 + i for i in range((prompt + output) // 4)]
            )
            engine.submit(requests[name], 0.0)
        elif kind == "abort" and str(first) in requests and engine.abort(str(first)):
            aborted.add(str(first))
        elif kind == "step" and due_s is not None:
            apply(engine.step(due_s))
    for step in _run(engine):
        apply(step)
    assert sorted(finished) == sorted(requests.keys() - aborted)
    assert all(tokens[name] == requests[name].output_tokens for name in finished)
    assert len(firsts) == len(set(firsts))
    assert engine.cache.num_unreferenced == engine.cache.num_blocks
    assert min(copies.values(), default=0) >= 0
    assert engine.cache.num_keys == sum(1 for count in copies.values() if count)


@settings(max_examples=50)
@given(prompt=st.integers(1, 60))
def test_a_repeated_prompt_hits_exactly_the_usable_blocks(prompt: int) -> None:
    """With nothing evicted, the hit is min(matched, (n - 1) // block size) blocks."""
    engine = Engine(SMALL)
    keys = list(range(prompt // 4))
    for name in ("a", "b"):
        engine.submit(_request(name, prompt, 1, keys), 0.0)
        steps = _run(engine)
    assert steps[0].admitted == [Admission("b", min(prompt // 4, (prompt - 1) // 4) * 4)]


def test_equal_runs_are_equal() -> None:
    """The engine is deterministic: the same calls give the same steps."""
    runs = []
    for _ in range(2):
        engine = Engine(SMALL)
        for index in range(6):
            engine.submit(_request(str(index), 9 + index, 12, [index // 2, 10 + index]), 0.0)
        runs.append(_run(engine))
    assert runs[0] == runs[1]
