"""An engine's limit on sequences, learned from what it says of itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.max_num_seqs import (
    FORGET_READINGS,
    FULL_CACHE_RATIO,
    SURE_VISITS,
    LimitSource,
    Reading,
    SequenceLimit,
    SequenceLimits,
)
from extproc.choosing.replacements import LEAST_ALONE, MOST_OF_ONE, SURE_REPLACEMENTS
from metadata_center.types import EndpointKey

A, B, C = (EndpointKey(name) for name in "abc")
LATER_S, NO_PREFILL_S = 1e6, 0.0
"""When first tokens come, and what prefill took of that time, where it does not matter."""


def reading(
    running: int, waiting: int = 3, kv_usage: float = 0.5, prompt_tokens: float | None = None
) -> Reading:
    """What an engine says."""
    return Reading(0, running, waiting, kv_usage, prompt_tokens)


def visited(times: int, most: int = 128, *, waiting: int = 3, kv_usage: float = 0.5) -> SequenceLimit:
    """An engine that was at `most` so often, and below it in between."""
    known = SequenceLimit()
    for _ in range(times):
        known.observe(A, reading(most, waiting, kv_usage))
        known.observe(A, reading(most - 1, waiting, kv_usage))
    return known


def test_an_engine_that_comes_back_to_the_same_number_is_full() -> None:
    """One time less is chance."""
    assert visited(SURE_VISITS - 1).limit == 0
    assert visited(SURE_VISITS).limit == 128


def test_staying_is_one_visit() -> None:
    """A number that is read again and again while nothing happens says nothing new."""
    known = SequenceLimit()
    for prompt_tokens in (None, 7_000.0):
        for _ in range(50):
            known.observe(A, reading(20, 4, 0.3, prompt_tokens))
    assert known.limit == 0


def test_staying_while_prompts_are_computed_is_a_visit_each() -> None:
    """Some ended and others took their place; the engine had no room for one more."""
    known = SequenceLimit()
    for number in range(SURE_VISITS):
        assert known.limit == 0
        known.observe(A, reading(128, prompt_tokens=1_000.0 * number))
    assert known.limit == 128


def test_what_a_real_engine_showed_while_it_prefilled_is_no_limit() -> None:
    """Of vLLM 0.32 with room for 128, three readings: 10 wait beside 14, for the tokens of a step."""
    limits = SequenceLimits()
    for running, waiting, usage, tokens in (
        (6, 18, 0.242, 9_046.0),
        (14, 10, 0.623, 23_094.0),
        (20, 4, 0.982, 37_142.0),
    ):
        limits.observe(A, reading(running, waiting, usage, tokens))
        assert limits.limit(A) == (0, LimitSource.UNKNOWN)


def test_no_request_waits_below_the_limit() -> None:
    """Without a queue the largest number is that of the traffic."""
    assert visited(20, waiting=0).limit == 0


def test_a_full_cache_says_nothing_of_the_limit() -> None:
    """A request that waits for blocks may be below the limit."""
    assert visited(20, kv_usage=FULL_CACHE_RATIO).limit == 0


def test_one_more_refutes_the_limit() -> None:
    """It is unknown again until the new number has proved itself."""
    known = visited(SURE_VISITS, 30)
    known.observe(A, reading(31, 0))
    assert known.limit == 0
    for _ in range(SURE_VISITS):
        known.observe(A, reading(31, 1))
        known.observe(A, reading(29, 1))
    assert known.limit == 31


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9), st.floats(0.0, 1.0))))
def test_a_limit_was_seen_and_the_last_reading_is_within(seen: list[tuple[int, int, float]]) -> None:
    """Or there is none."""
    known = SequenceLimit()
    for running, waiting, kv_usage in seen:
        known.observe(A, reading(running, waiting, kv_usage))
        assert not known.limit or running <= known.limit
    assert known.limit in {0, *(running for running, _, _ in seen)}


@pytest.mark.parametrize("lie", [129, 1 << 20])
def test_a_number_said_once_does_not_hide_the_limit_for_good(lie: int) -> None:
    """A busy engine's limit is known again some readings after one that was false."""
    known = visited(SURE_VISITS)
    known.observe(A, reading(lie, 0))
    assert known.limit == 0
    for _ in range(FORGET_READINGS // 2 + SURE_VISITS):
        known.observe(A, reading(128, 3))
        known.observe(A, reading(127, 1))
    assert known.limit == 128


def test_a_limit_that_proved_itself_is_not_forgotten() -> None:
    """Hours below it with others waiting (for prefill) change nothing."""
    known = visited(SURE_VISITS)
    for _ in range(10 * FORGET_READINGS):
        known.observe(A, reading(90, 2))
    assert known.limit == 128


def learn(limits: SequenceLimits, key: EndpointKey, most: int = 128, since: float = 0.0) -> None:
    """An engine shows its limit."""
    for number in range(SURE_VISITS):
        limits.observe(key, reading(most, prompt_tokens=since + number))


def alike(*keys: EndpointKey, configured: int = 0) -> SequenceLimits:
    """Endpoints that were started alike."""
    limits = SequenceLimits()
    for key in keys:
        limits.configure(key, "cluster/h100", configured)
    return limits


def test_what_one_engine_showed_is_likely_for_those_alike() -> None:
    """They need not be full first; an engine of another kind is not among them."""
    limits = alike(A, B)
    limits.configure(C, "cluster/a100")
    learn(limits, A)
    assert limits.limit(A) == (128, LimitSource.LEARNED)
    assert limits.limit(B) == (128, LimitSource.ALIKE)
    assert limits.column((A, B, C)) == (128, 128, 0)


@given(st.lists(st.tuples(st.integers(1, LEAST_ALONE - 1), st.integers(1, 9), st.booleans()), max_size=200))
def test_one_that_lies_has_no_others_stand_idle(said: list[tuple[int, int, bool]]) -> None:
    """Whatever small number it says runs while others wait, and however often it is another process."""
    limits = alike(A, B, C)
    for number, (running, times, is_another) in enumerate(said):
        if is_another:
            limits.restarted(A)
        for each in range(times):
            limits.observe(A, reading(running, prompt_tokens=1e4 * number + each))
        replace(limits, A, running, times)
        limits.observe(B, reading(1, 0))
        assert not any(limits.column((B, C)))


def test_two_that_show_a_small_limit_are_believed() -> None:
    """Operators do start engines with four."""
    limits = alike(A, B, C)
    learn(limits, A, 4)
    assert limits.column((A, B, C)) == (4, 0, 0)
    limits.observe(B, reading(4))
    assert limits.limit(C) == (4, LimitSource.ALIKE)
    limits = alike(A, B, C)
    replace(limits, A, 4)
    assert limits.column((A, B, C)) == (4, 0, 0)
    replace(limits, B, 4, times=MOST_OF_ONE)
    assert limits.limit(C) == (4, LimitSource.ALIKE)


def test_one_reading_of_each_is_enough() -> None:
    """Engines that are read every five seconds say together what each alone would say in half a minute."""
    limits = alike(A, B, C)
    for key in (A, B, C):
        assert not limits.column((A, B, C))
        limits.observe(key, reading(128))
    assert limits.column((A, B, C)) == (128,) * 3


def test_an_engine_that_was_seen_above_it_was_started_otherwise() -> None:
    """What its like showed does not hold for it, now or later."""
    limits = alike(A, B)
    limits.observe(B, reading(60, 0))
    learn(limits, A, 40)
    assert limits.limit(A) == (40, LimitSource.LEARNED)
    assert limits.limit(B) == (0, LimitSource.UNKNOWN)


def test_what_an_engine_shows_of_itself_goes_before_what_is_likely() -> None:
    """One of the group was started with less."""
    limits = alike(A, B)
    learn(limits, A)
    learn(limits, B, 64)
    assert limits.limit(B) == (64, LimitSource.LEARNED)


def test_what_the_operator_says_goes_first_until_it_is_refuted() -> None:
    """One more than that running: it is not believed of this process any more, but of the next it is."""
    limits = alike(A, B, configured=64)
    assert limits.limit(A) == limits.limit(B) == (64, LimitSource.CONFIGURED)
    limits.observe(A, reading(64))
    assert limits.limit(A) == (64, LimitSource.CONFIGURED)
    limits.observe(A, reading(65, 0))
    assert limits.limit(A) == (0, LimitSource.UNKNOWN)
    limits.observe(A, reading(3, 0))
    assert limits.limit(A) == (0, LimitSource.UNKNOWN)
    limits.restarted(A)
    assert limits.limit(A) == (64, LimitSource.CONFIGURED)
    limits.configure(A, "cluster/h100", 0)
    assert limits.limit(A) == (0, LimitSource.UNKNOWN)


def test_a_process_whose_counter_went_back_is_another() -> None:
    """SGLang does not say when its process began."""
    limits = SequenceLimits()
    learn(limits, A, since=1_000.0)
    assert limits.limit(A) == (128, LimitSource.LEARNED)
    limits.observe(A, reading(5, 0, prompt_tokens=10.0))
    assert limits.limit(A) == (0, LimitSource.UNKNOWN)
    assert not limits.column((A,))


def test_of_a_restarted_engine_what_its_like_show_is_likely() -> None:
    """Until it runs one more: then it holds for none that did not show it by itself."""
    limits = alike(A, B, C)
    learn(limits, A)
    learn(limits, B)
    limits.restarted(B)
    assert limits.limit(B) == (128, LimitSource.ALIKE)
    limits.observe(B, reading(129, 0))
    assert limits.column((A, B, C)) == (128, 0, 0)


def replace(
    limits: SequenceLimits, key: EndpointKey, most: int = 128, times: int = SURE_REPLACEMENTS
) -> None:
    """An engine with others waiting begins with one as another ends."""
    limits.first_token(key, most, 0.0, LATER_S, NO_PREFILL_S)
    for number in range(times):
        limits.ended(key, most - 1, 1.0 + number)
        limits.first_token(key, most, 0.5 + number, LATER_S, NO_PREFILL_S)


def test_first_tokens_show_a_limit_without_a_reading() -> None:
    """Of the engine and of those alike."""
    limits = alike(A, B)
    limits.configure(C, "cluster/a100")
    replace(limits, A)
    assert limits.limit(A) == (128, LimitSource.FIRST_TOKENS)
    assert limits.limit(B) == (128, LimitSource.ALIKE)
    assert limits.column((A, B, C)) == (128, 128, 0)


def test_those_alike_show_it_together() -> None:
    """Half of the first tokens each."""
    limits = alike(A, B)
    replace(limits, A, times=SURE_REPLACEMENTS // 2)
    assert not limits.column((A, B))
    replace(limits, B, times=SURE_REPLACEMENTS - SURE_REPLACEMENTS // 2)
    assert limits.limit(A) == limits.limit(B) == (128, LimitSource.ALIKE)


def test_a_reading_above_it_refutes_what_first_tokens_show() -> None:
    """Others send to the engine as well: what the gateway counts there is a part."""
    limits = alike(A, B)
    replace(limits, A, 60)
    limits.observe(A, reading(75, 0))
    assert limits.limit(A) == (0, LimitSource.UNKNOWN)
    assert limits.limit(B) == (60, LimitSource.ALIKE)


def test_what_readings_show_goes_first() -> None:
    """They are the engine's own count."""
    limits = alike(A)
    replace(limits, A, 127)
    learn(limits, A)
    assert limits.limit(A) == (128, LimitSource.LEARNED)


def test_one_more_decoding_refutes_it_for_all_alike() -> None:
    """At its first token, no reading is waited for; what was configured stands until a reading refutes it."""
    limits = alike(A, B)
    limits.configure(B, "cluster/h100", 64)
    replace(limits, A)
    limits.first_token(B, 129, 0.0, LATER_S, NO_PREFILL_S)
    assert limits.limit(A) == (128, LimitSource.FIRST_TOKENS)
    assert limits.limit(B) == (64, LimitSource.CONFIGURED)
    limits.first_token(A, 129, 0.0, LATER_S, NO_PREFILL_S)
    assert limits.limit(A) == (0, LimitSource.UNKNOWN)


def test_a_lie_hides_what_first_tokens_show_no_longer_than_it_is_believed() -> None:
    """A number that was said once is forgotten while the engine is busy below it."""
    limits = alike(A)
    replace(limits, A)
    limits.observe(A, reading(1 << 20, 0))
    assert limits.limit(A) == (0, LimitSource.UNKNOWN)
    for _ in range(FORGET_READINGS):
        limits.observe(A, reading(127, 1))
    assert limits.limit(A) == (128, LimitSource.FIRST_TOKENS)


def test_the_first_token_of_another_process_replaces_nothing() -> None:
    """Of its like neither."""
    limits = alike(A, B)
    replace(limits, A, times=SURE_REPLACEMENTS - 1)
    limits.ended(A, 127, 50.0)
    limits.restarted(A)
    limits.first_token(A, 128, 10.0, LATER_S, NO_PREFILL_S)
    assert not limits.column((A, B))


def test_another_process_shows_its_own() -> None:
    """Lower or higher than before: what its like show is likely until then."""
    limits = alike(A, B)
    replace(limits, A)
    replace(limits, B)
    for most in (64, 256):
        limits.restarted(A)
        assert limits.limit(A) == (128, LimitSource.ALIKE)
        replace(limits, A, most)
        assert limits.limit(A) == (most, LimitSource.FIRST_TOKENS)
    assert limits.limit(B) == (128, LimitSource.FIRST_TOKENS)


def test_nothing_is_kept_of_endpoints_that_are_gone() -> None:
    """Nor of a group without any."""
    limits = alike(A, B)
    learn(limits, A)
    limits.forget(A)
    assert limits.limit(B) == (128, LimitSource.ALIKE)
    limits.forget(B)
    assert not list(limits.keys)
    assert not limits.column((A, B))
    limits.configure(B, "cluster/h100")
    assert limits.limit(B) == (0, LimitSource.UNKNOWN)


OPERATIONS = st.one_of(
    st.tuples(
        st.just("observe"),
        st.sampled_from([A, B, C]),
        st.integers(0, 9),
        st.integers(0, 2),
        st.sampled_from([0.5, 0.95]),
        st.none() | st.integers(0, 50),
    ),
    st.tuples(st.just("configure"), st.sampled_from([A, B, C]), st.sampled_from("xy"), st.integers(0, 9)),
    st.tuples(st.sampled_from(["restarted", "forget"]), st.sampled_from([A, B, C])),
)


@given(st.lists(OPERATIONS, max_size=60))
def test_no_limit_is_below_what_its_process_was_seen_running(operations: list[tuple[object, ...]]) -> None:
    """Whatever it is from; and what is known is of endpoints that were named and not forgotten."""
    limits, seen, named = SequenceLimits(), dict.fromkeys((A, B, C), 0), set()
    counters: dict[EndpointKey, int] = {}
    for name, key, *rest in operations:
        assert isinstance(key, str)
        key = EndpointKey(key)
        if name in ("observe", "configure"):
            named.add(key)
        match name, rest:
            case "observe", [int(running), int(waiting), float(usage), tokens]:
                assert tokens is None or isinstance(tokens, int)
                if tokens is not None:
                    if tokens < counters.get(key, 0):
                        seen[key] = 0
                    counters[key] = tokens
                seen[key] = max(seen[key], running)
                limits.observe(key, reading(running, waiting, usage, tokens))
            case "configure", [str(group), int(configured)]:
                limits.configure(key, group, configured)
            case "restarted", _:
                seen[key] = counters[key] = 0
                limits.restarted(key)
            case _:
                seen[key] = counters[key] = 0
                limits.forget(key)
                named.discard(key)
        for each in (A, B, C):
            limit, source = limits.limit(each)
            assert (limit == 0) == (source is LimitSource.UNKNOWN)
            assert limit == 0 or (limit >= seen[each] and each in named)
        assert set(limits.keys) == named
