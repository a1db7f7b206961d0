"""An engine's limit on sequences, learned from first tokens that come only as other sequences end."""

from collections import deque
from math import inf
from random import Random

import pytest

from extproc.choosing.replacements import MOST_OF_ONE, SURE_REPLACEMENTS, Replacements
from metadata_center.types import EndpointKey

A, B = EndpointKey("a"), EndpointKey("b")
LATER_S, NO_PREFILL_S = 1e6, 0.0
"""When first tokens come, and what prefill took of that time, where it does not matter."""


def replaced(known: Replacements, times: int, most: int = 128, key: EndpointKey = A) -> None:
    """An engine with one that waits at all times replaces `times` sequences."""
    known.first_token(key, most, 0.0, LATER_S, NO_PREFILL_S)
    for number in range(times):
        known.ended(key, most - 1, 1.0 + number)
        known.first_token(key, most, 0.5 + number, LATER_S, NO_PREFILL_S)


def test_an_engine_that_begins_only_as_another_ends_is_full() -> None:
    """One time less is chance."""
    known = Replacements()
    replaced(known, SURE_REPLACEMENTS - 1)
    assert known.limit == 0
    replaced(known, 1)
    assert known.limit == 128


def test_what_came_after_the_end_waited_for_nothing() -> None:
    """A closed loop of clients sends the next request when an answer is whole."""
    known = Replacements()
    known.first_token(A, 20, 0.0, LATER_S, NO_PREFILL_S)
    for number in range(10 * SURE_REPLACEMENTS):
        known.ended(A, 19, 1.0 + number)
        known.first_token(A, 20, 1.0 + number, LATER_S, NO_PREFILL_S)
    assert known.limit == 0


def test_a_place_is_taken_once() -> None:
    """Of two first tokens behind one end the second has waited for another."""
    known = Replacements()
    known.first_token(A, 9, 0.0, LATER_S, NO_PREFILL_S)
    known.ended(A, 8, 1.0)
    for _ in range(2 * SURE_REPLACEMENTS):
        known.first_token(A, 9, 0.5, LATER_S, NO_PREFILL_S)
    assert known.limit == 0


def test_below_the_most_nothing_shows() -> None:
    """Prompts are computed one after another while answers end: an engine with room does that too."""
    known = Replacements()
    known.first_token(A, 30, 0.0, LATER_S, NO_PREFILL_S)
    for number in range(10 * SURE_REPLACEMENTS):
        known.ended(A, 27, 1.0 + number)
        known.first_token(A, 28, 0.5 + number, LATER_S, NO_PREFILL_S)
    assert known.limit == 0


def test_the_end_that_counts_is_that_of_a_full_engine() -> None:
    """What came while there was a place free waited for nothing, whatever ended later."""
    known = Replacements()
    known.first_token(A, 30, 0.0, LATER_S, NO_PREFILL_S)
    for number in range(10 * SURE_REPLACEMENTS):
        known.ended(A, 29, number + 0.1)
        known.ended(A, 28, number + 0.3)
        known.first_token(A, 29, number + 0.2, LATER_S, NO_PREFILL_S)
        known.first_token(A, 30, number + 0.2, LATER_S, NO_PREFILL_S)
    assert known.limit == 0


def test_one_more_refutes_the_limit() -> None:
    """At once; the new most proves itself as the first did."""
    known = Replacements()
    replaced(known, SURE_REPLACEMENTS, 97)
    assert known.limit == 97
    known.ended(A, 96, 20.0)
    known.first_token(A, 97, 0.0, LATER_S, NO_PREFILL_S)
    known.first_token(A, 98, 0.0, LATER_S, NO_PREFILL_S)
    assert known.limit == 0
    known.first_token(A, 98, 0.0, LATER_S, NO_PREFILL_S)
    assert known.limit == 0
    replaced(known, SURE_REPLACEMENTS, 98)
    assert known.limit == 98


def test_several_that_are_alike_show_it_together() -> None:
    """Each counts at the most of all, and what one was before its end says nothing of another."""
    known = Replacements()
    replaced(known, SURE_REPLACEMENTS - 1)
    known.ended(A, 127, 50.0)
    known.first_token(B, 128, 10.0, LATER_S, NO_PREFILL_S)
    assert known.limit == 0
    replaced(known, 1, key=B)
    assert known.limit == 128


def test_none_of_several_shows_a_small_one_alone() -> None:
    """However often it replaces, and however often it says that it is another process."""
    known = Replacements(MOST_OF_ONE)
    for _ in range(5):
        replaced(known, 4 * SURE_REPLACEMENTS, 2)
        known.restarted(A)
    assert known.limit == 0
    replaced(known, SURE_REPLACEMENTS - MOST_OF_ONE - 1, 2, key=B)
    assert known.limit == 0
    replaced(known, 1, 2, key=B)
    assert known.limit == 2


def test_what_ended_in_another_process_is_nobodys_place() -> None:
    """A first token of the new process is no replacement."""
    known = Replacements()
    replaced(known, SURE_REPLACEMENTS - 1)
    known.ended(A, 127, 50.0)
    known.restarted(A)
    known.first_token(A, 128, 10.0, LATER_S, NO_PREFILL_S)
    assert known.limit == 0


def served(
    limit: int,
    load: float,
    seed: int,
    ends: int = 2_000,
    prefill: tuple[float, float] = (0.2, 1.2),
    answer_s: float | None = None,
) -> Replacements:
    """What an engine shows: first come, first served, one prompt at a time, answers of any length or one."""
    draws, known, waiting, now_s = Random(seed), Replacements(), deque[float](), 0.0
    running: list[float] = []  # when their answers end
    arrives_s, prompt, ready_s = 0.0, 0.0, inf
    while ends:
        now_s = min(arrives_s, ready_s, *running)
        if now_s == arrives_s:
            waiting.append(now_s)
            arrives_s += draws.expovariate(load)
        elif now_s == ready_s:
            length_s = draws.expovariate(0.02) if answer_s is None else answer_s
            running.append(now_s + length_s)
            known.first_token(A, len(running), waiting.popleft(), now_s, prompt)
            ready_s = inf
        else:
            running.remove(now_s)
            ends -= 1
            known.ended(A, len(running), now_s)
        if ready_s == inf and waiting and len(running) < limit:
            prompt = draws.uniform(*prefill)
            ready_s = now_s + prompt
    return known


@pytest.mark.parametrize("seed", range(5))
def test_a_full_engine_shows_its_limit(seed: int) -> None:
    """Whatever the order of arrivals, ends and prompts."""
    assert served(40, 1.2, seed).limit == 40


@pytest.mark.parametrize("answer_s", [None, 2.5, 7.9, 31.0])
def test_an_engine_whose_prefill_binds_shows_none(answer_s: float | None) -> None:
    """Requests wait at all times, for prompts ahead; what decodes is at its most by chance, or always."""
    for seed in range(10):
        assert not served(10_000, 2.0, seed, answer_s=answer_s).limit
        assert not served(10_000, 2.0, seed, prefill=(0.7, 0.7), answer_s=answer_s).limit


def test_prefill_that_is_not_known_shows_nothing() -> None:
    """Nor does one that took most of the time since the one before."""
    for prefill_s, shown in ((inf, 0), (0.9, 0), (0.5, 9)):
        known = Replacements()
        known.first_token(A, 9, 0.0, 0.5, prefill_s)
        for number in range(SURE_REPLACEMENTS):
            known.ended(A, 8, 1.0 + number)
            known.first_token(A, 9, 0.5, 1.5 + number, prefill_s)
        assert known.limit == shown
