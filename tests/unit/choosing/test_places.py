"""What the last places of an engine cost those who come later."""

from __future__ import annotations

import pytest

from extproc.choosing.completion import Costs
from extproc.choosing.least_completion import completion_costs
from extproc.choosing.places import places_s, saved_s, squarings
from extproc.predicting.traffic import MEMORY_S, Traffic
from extproc.predicting.ttft import TtftModel
from extproc.values.choices import Learned, Snapshot
from metadata_center.types import EndpointKey


def test_the_power_is_near_the_root_of_twice_the_limit() -> None:
    """Exactly that for 2, 8, 32, 128 and 512; a power of two in any case, so that all compute it alike."""
    assert [1 << squarings(limit) for limit in (2, 8, 32, 128, 512)] == [2, 4, 8, 16, 32]
    for limit in range(1, 5_000):
        assert 0.7 <= (1 << squarings(limit)) / (2 * limit) ** 0.5 <= 1.42


def test_a_place_costs_what_it_is_worth_by_the_chance_that_they_run_out() -> None:
    """Of 128 places all, seven eighths, and half are taken, and nobody knows how many the last has."""
    found = places_s([1.0, 0.875, 0.5, 0.0], [128, 128, 128, 0], 2.0)
    assert found == pytest.approx([2.0, 2.0 * 0.875**16, 2.0 * 0.5**16, 0.0])


def test_more_places_run_out_later_at_the_same_share() -> None:
    """With a tenth free: one of ten is soon taken, a hundred of a thousand are not."""
    few, many, _ = places_s([0.9, 0.9, 0.0], [10, 1000, 0], 1.0)
    assert (few, many) == pytest.approx((0.9**4, 0.9**32))


def test_where_all_are_full_no_place_is_dearer_than_another() -> None:
    """Nobody is kept from a better endpoint that has room."""
    assert list(places_s([1.0, 1.0], [8, 128], 2.0)) == [0.0, 0.0]
    nearly = places_s([1.0, 0.99], [128, 128], 2.0)
    assert nearly[0] == pytest.approx(2.0 * (1.0 - 0.99**16))


def test_what_saves_nothing_is_worth_nothing() -> None:
    """Where all endpoints are as good, places are counted by the wait for them alone."""
    assert list(places_s([1.0, 0.5], [128, 128], 0.0)) == []


def test_saved_is_the_difference_to_the_next_best() -> None:
    """By own prefill, what others pay for it, and what it stalls; waits, room and decoding are no part."""
    costs = Costs(
        [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.1, 0.4, 0.5], [0.2, 0.2, 0.2], [0.0, 0.1, 0.0], [0.0] * 3, []
    )
    assert saved_s(costs, 0, [900, 0, 0]) == pytest.approx(0.7 - 0.3)
    assert saved_s(costs, 1, [900, 950, 0]) == 0.0
    assert saved_s(Costs([0.0], [0.0], [1.0], [0.0], [0.0], [0.0], []), 0, [900]) == 0.0


def test_what_is_quicker_with_no_more_cached_saves_nothing() -> None:
    """Endpoints differ by what decodes there as well: that is gone with the next request."""
    costs = Costs([0.0] * 2, [0.0] * 2, [0.1, 0.5], [0.2, 0.2], [0.0, 0.0], [0.0] * 2, [])
    assert saved_s(costs, 0, [500, 500]) == saved_s(costs, 0, [0, 0]) == 0.0
    assert saved_s(costs, 0, [500, 400]) == pytest.approx(0.4)


def test_the_worth_of_a_place_is_learned_and_forgotten() -> None:
    """A mean over what was placed; of five requests a quarter is believed, and old ones fade."""
    traffic = Traffic()
    for _ in range(5):
        traffic.placed(0.0, 0.1, 0.8)
    assert traffic.place_s == pytest.approx(0.2)
    for _ in range(95):
        traffic.placed(0.0, 0.1, 0.8)
    assert traffic.place_s == pytest.approx(0.8)
    for _ in range(400):
        traffic.placed(10 * MEMORY_S, 0.1, 0.0)
    assert traffic.place_s == pytest.approx(0.0, abs=1e-3)


def test_the_last_places_are_kept_for_whom_they_are_worth_most() -> None:
    """Of 128 the holder runs 126: a prompt that it has goes there, and one that nobody has goes elsewhere."""

    def seen(cached: int, place_s: float) -> Snapshot:
        return Snapshot(
            keys=(EndpointKey("holder"), EndpointKey("other")),
            requests=[126, 116],
            prefill_tokens=[0, 0],
            context_tokens=[126_000, 116_000],
            matched_blocks=[0, 0],
            num_blocks=1,
            weights=(1.0, 1.0),
            prefilling=[0, 0],
            cached_tokens=[cached, 0],
            steps_s=[0.02, 0.02],
            kv_tokens=[],
            prompt_tokens=4_000,
            output_tokens=200.0,
            learned=Learned(TtftModel().prices_s, 0.0, 50.0, 0.0, (), 0.1, place_s),
            max_num_seqs=[128, 128],
        )

    holder_s, other_s = completion_costs(seen(3_900, 0.1)).totals_s
    assert holder_s < other_s
    few = 300  # cached tokens that are not worth one of two last places
    holder_s, other_s = completion_costs(seen(few, 0.0)).totals_s
    assert holder_s < other_s
    holder_s, other_s = completion_costs(seen(few, 0.1)).totals_s
    assert holder_s > other_s
