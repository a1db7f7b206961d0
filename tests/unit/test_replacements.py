"""An engine's limit on sequences, learned from first tokens that come only as other sequences end."""

from collections import deque
from random import Random

import pytest

from extproc.choosing.replacements import SURE_REPLACEMENTS, Replacements
from metadata_center.types import EndpointKey

A, B = EndpointKey("a"), EndpointKey("b")


def replaced(known: Replacements, times: int, most: int = 128, key: EndpointKey = A) -> None:
    """An engine with one that waits at all times replaces `times` sequences."""
    known.first_token(key, 0.0, most)
    for number in range(times):
        known.ended(key, most - 1, 1.0 + number)
        known.first_token(key, 0.5 + number, most)


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
    known.first_token(A, 0.0, 20)
    for number in range(10 * SURE_REPLACEMENTS):
        known.ended(A, 19, 1.0 + number)
        known.first_token(A, 1.0 + number, 20)
    assert known.limit == 0


def test_a_place_is_taken_once() -> None:
    """Of two first tokens behind one end the second has waited for another."""
    known = Replacements()
    known.first_token(A, 0.0, 9)
    known.ended(A, 8, 1.0)
    for _ in range(2 * SURE_REPLACEMENTS):
        known.first_token(A, 0.5, 9)
    assert known.limit == 0


def test_below_the_most_nothing_shows() -> None:
    """Prompts are computed one after another while answers end: an engine with room does that too."""
    known = Replacements()
    known.first_token(A, 0.0, 30)
    for number in range(10 * SURE_REPLACEMENTS):
        known.ended(A, 27, 1.0 + number)
        known.first_token(A, 0.5 + number, 28)
    assert known.limit == 0


def test_the_end_that_counts_is_that_of_a_full_engine() -> None:
    """What came while there was a place free waited for nothing, whatever ended later."""
    known = Replacements()
    known.first_token(A, 0.0, 30)
    for number in range(10 * SURE_REPLACEMENTS):
        known.ended(A, 29, number + 0.1)
        known.ended(A, 28, number + 0.3)
        known.first_token(A, number + 0.2, 29)
        known.first_token(A, number + 0.2, 30)
    assert known.limit == 0


def test_one_more_refutes_the_limit() -> None:
    """At once; the new most proves itself as the first did."""
    known = Replacements()
    replaced(known, SURE_REPLACEMENTS, 97)
    assert known.limit == 97
    known.ended(A, 96, 20.0)
    known.first_token(A, 0.0, 97)
    known.first_token(A, 0.0, 98)
    assert known.limit == 0
    known.first_token(A, 0.0, 98)
    assert known.limit == 0
    replaced(known, SURE_REPLACEMENTS, 98)
    assert known.limit == 98


def test_several_that_are_alike_show_it_together() -> None:
    """Each counts at the most of all, and what one was before its end says nothing of another."""
    known = Replacements()
    replaced(known, SURE_REPLACEMENTS - 1)
    known.ended(A, 127, 50.0)
    known.first_token(B, 10.0, 128)
    assert known.limit == 0
    replaced(known, 1, key=B)
    assert known.limit == 128


def test_what_ended_in_another_process_is_nobodys_place() -> None:
    """A first token of the new process is no replacement."""
    known = Replacements()
    replaced(known, SURE_REPLACEMENTS - 1)
    known.ended(A, 127, 50.0)
    known.forget(A)
    known.first_token(A, 10.0, 128)
    assert known.limit == 0


def served(limit: int, load: float, seed: int, ends: int = 2_000) -> Replacements:
    """What an engine shows: first come, first served, one prompt at a time, answers of any length."""
    draws, known, waiting, decoding, now_s = Random(seed), Replacements(), deque[float](), 0, 0.0
    busy_until_s = 0.0
    while ends:
        rates = [load, 0.02 * decoding]
        now_s += draws.expovariate(sum(rates))
        if draws.random() * sum(rates) < load:
            waiting.append(now_s)
        elif decoding:
            decoding, ends = decoding - 1, ends - 1
            known.ended(A, decoding, now_s)
        while waiting and decoding < limit and busy_until_s <= now_s:
            decoding += 1
            known.first_token(A, waiting.popleft(), decoding)
            busy_until_s = now_s + draws.uniform(0.2, 1.2)
    return known


@pytest.mark.parametrize("seed", range(5))
def test_a_full_engine_shows_its_limit(seed: int) -> None:
    """Whatever the order of arrivals, ends and prompts."""
    assert served(40, 1.2, seed).limit == 40


def test_an_engine_whose_prefill_binds_shows_one_seldom() -> None:
    """Requests wait at all times, for the prompts ahead; what decodes is at its most again by chance."""
    found = [served(10_000, 2.0, seed).limit for seed in range(20)]
    assert sum(map(bool, found)) <= 2
