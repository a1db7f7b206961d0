"""What a prompt displaces from a cache: learned by what is computed once more, and charged by own prefill."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.choosing.completion import Costs, cost_columns
from extproc.choosing.displacing import displaced, teach_recomputed
from extproc.choosing.least_completion import completion_costs, completion_terms
from extproc.choosing.places import saved_s
from extproc.choosing.rows import learned_of
from extproc.predicting.traffic import CACHE_MEMORY_S, Traffic
from extproc.predicting.ttft import TtftModel
from extproc.values.choices import Learned, Snapshot
from metadata_center.history.seen_prefixes import SeenPrefixes
from metadata_center.types import EndpointKey


def snapshot(*cached: int, recomputed_ratio: float = 0.0) -> Snapshot:
    """A prompt of 40,000 tokens; the first endpoint has 2 s of prefill ahead, nothing decodes."""
    rows = len(cached)
    return Snapshot(
        keys=tuple(EndpointKey(str(row)) for row in range(rows)),
        requests=[1, *[0] * (rows - 1)],
        prefill_tokens=[20_000, *[0] * (rows - 1)],
        context_tokens=[20_000, *[0] * (rows - 1)],
        matched_blocks=[0] * rows,
        num_blocks=1,
        weights=[1.0] * rows,
        prefilling=[1, *[0] * (rows - 1)],
        cached_tokens=cached,
        steps_s=[0.02] * rows,
        prompt_tokens=40_000,
        output_tokens=200.0,
        learned=Learned((0.0, 0.1, 0.0, 0.0, 0.0, 0.0), 0.0, 50.0, 0.0, (), 0.1, 0.0, recomputed_ratio),
    )


def test_a_share_goes_on_and_on() -> None:
    """A third, a ninth and so on are a half; more than one for one is not believed."""
    assert displaced(0.0) == 0.0
    assert displaced(1 / 3) == pytest.approx(sum(3.0**-power for power in range(1, 40)))
    assert displaced(0.5) == displaced(0.9) == 1.0


def test_it_is_charged_by_own_prefill_but_for_what_is_computed_there_in_any_case() -> None:
    """Of 2 s half a second each is displaced; of the second row three quarters are sunk."""
    costs = cost_columns(
        [0.0] * 2, [2.0, 2.0], [0.0] * 2, [0.0] * 2, 0.0, 0.0, 0.0, (), (), [0.0, 0.75], (), 0.5
    )
    assert list(costs.displacements_s) == [1.0, 0.25]
    assert list(costs.totals_s) == [3.0, 2.25]
    assert [cost.displacement_s for cost in costs] == [1.0, 0.25]
    assert list(costs.behind([1.0, 2.0]).totals_s) == [4.0, 4.25]


def test_a_conversation_stays_where_moving_it_has_others_computed_once_more() -> None:
    """Its endpoint has all of it and 2 s of prefill ahead; half of it would be computed elsewhere, in 2 s."""
    stays = snapshot(39_000, 20_000)
    at_home_s, elsewhere_s = completion_costs(stays).totals_s
    assert at_home_s > elsewhere_s
    charged = replace(stays, learned=replace(learned_of(stays), recomputed_ratio=0.25))
    at_home_s, elsewhere_s = completion_costs(charged).totals_s
    assert at_home_s < elsewhere_s
    assert completion_terms(stays)["displacement"] == [0.0, 0.0]
    assert completion_terms(charged)["displacement"] == pytest.approx([-0.1 / 3, -2.0 / 3])


def test_it_is_a_part_of_what_a_place_saves() -> None:
    """Who is kept from where its prompt is cached displaces others as well."""
    none = [0.0, 0.0]
    costs = Costs(none, none, [0.1, 0.5], none, none, none, [], displacements_s=[0.05, 0.25])
    assert saved_s(costs, 0, [900, 0]) == pytest.approx(0.6)


def test_the_share_is_learned_and_forgotten() -> None:
    """Of 300,000 tokens a third were computed before; a few say little, and old ones fade."""
    traffic = Traffic()
    traffic.placed(0.0, 0.1, 0.0)
    traffic.computed(10_000, 10_000, 0)
    assert traffic.recomputed_ratio == pytest.approx(0.1)
    traffic.computed(290_000, 70_000, 20_000)
    assert traffic.recomputed_ratio == pytest.approx(1 / 3)
    traffic.placed(CACHE_MEMORY_S * 20, 0.1, 0.0)
    traffic.computed(100_000, 0, 0)
    assert traffic.recomputed_ratio == pytest.approx(0.0, abs=1e-6)


def test_copies_count_for_no_more_than_what_was_evicted() -> None:
    """While caches hold all of them they displace nothing, however many there are."""
    traffic = Traffic()
    traffic.computed(100_000, 0, 60_000)
    assert traffic.recomputed_ratio == 0.0
    traffic.computed(100_000, 20_000, 0)
    assert traffic.recomputed_ratio == pytest.approx(0.2)
    traffic.computed(0, 60_000, 0)
    assert traffic.recomputed_ratio == pytest.approx(0.7)


def test_what_was_sent_before_and_is_not_cached_is_computed_once_more() -> None:
    """First all of it is new; then seven eighths are not, or as far as they are cached where it goes."""
    traffic, seen = Traffic(), SeenPrefixes()
    first, longer = list(range(28)), list(range(32))
    fresh = replace(snapshot(0, 0), prompt_tokens=140_000)
    teach_recomputed(traffic, seen, first, fresh, 1)
    assert traffic.recomputed_ratio == 0.0
    again = replace(snapshot(0, 0), prompt_tokens=160_000)
    teach_recomputed(traffic, seen, longer, again, 0)
    assert traffic.recomputed_ratio == pytest.approx(140 / 300)
    had = replace(snapshot(150_000, 0), prompt_tokens=160_000)
    teach_recomputed(traffic, seen, longer, had, 0)
    assert traffic.recomputed_ratio == pytest.approx((140 + 10) / 310)
    teach_recomputed(traffic, seen, [], had, 0)
    assert traffic.recomputed_ratio == pytest.approx((140 + 10) / 310)
    teach_recomputed(traffic, seen, longer, had, 1)  # a copy of 150,000, and 10,000 that none has
    assert traffic.recomputed_ratio == pytest.approx((140 + 10 + 10 + 150) / 470)


def test_nothing_displaced_is_nothing_charged() -> None:
    """Whatever prefill costs: there is no column then."""
    real = replace(snapshot(0, 0), learned=Learned(TtftModel().prices_s, 0.0, 50.0))
    assert completion_costs(real).displacements_s == ()
