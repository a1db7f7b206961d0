"""`least_completion` in the router: what it sees, what it learns, what its record says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.choose import choose
from extproc.choosing.completion import DECODE_TOKENS, TPOT_LIMIT_S
from extproc.choosing.deciding import Claim, SendNow, decide
from extproc.choosing.foreseen import foreseen_ttft_s
from extproc.choosing.holding import OPEN_STEPS, HoldQueue, Send
from extproc.choosing.least_completion import completion_costs, completion_terms
from extproc.choosing.limits import decode_limits_of, limit_s_of
from extproc.choosing.replay import ReplayRng
from extproc.choosing.rows import backlog, has_room, learned_of, open_until_s, row_times_s
from extproc.choosing.snapshots import Load, steps_s
from extproc.choosing.terms import total
from extproc.observing.explain import render, to_json, verdict
from extproc.predicting.ttft import TtftModel, step_s
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.choices import Learned, Snapshot
from extproc.values.prices import Prices
from metadata_center.types import MANY_ROWS, EndpointKey
from tests.conftest import CLUSTER, MODEL, Rig, build_rig, chat, endpoint

KEYS = tuple(EndpointKey(f"10.0.0.{row}:8000") for row in range(2))
GROUP = (MODEL, CLUSTER)


def completing() -> Rig:
    """Three equal endpoints under `least_completion`."""
    return build_rig(load_balancing=LoadBalancing(algorithm=Algorithm.LEAST_COMPLETION, fallbacks=1))


def snapshot(
    *,
    requests: list[int] | None = None,
    prefilling: list[int] | None = None,
    pending: list[int] | None = None,
    context: list[int] | None = None,
    cached: list[int] | None = None,
    weights: tuple[float, ...] = (1.0, 1.0),
    kv_tokens: list[int] | None = None,
    followers_per_s: float = 0.0,
) -> Snapshot:
    """Two endpoints and a prompt of 4,000 tokens."""
    zeros = [0, 0]
    return Snapshot(
        KEYS,
        requests or zeros,
        pending or zeros,
        context or zeros,
        zeros,
        1,
        weights,
        prefilling=prefilling or zeros,
        cached_tokens=cached or zeros,
        steps_s=[0.01, 0.01],
        kv_tokens=kv_tokens or zeros,
        prompt_tokens=4_000,
        output_tokens=200.0,
        learned=Learned(TtftModel().prices_s, followers_per_s, DECODE_TOKENS),
    )


def test_the_backlog_is_read_from_the_ledger() -> None:
    """Of three requests one prefills; its prompt is its share, and the others are half answered."""
    found = backlog(snapshot(requests=[3, 0], prefilling=[1, 0], pending=[500, 0], context=[9_000, 0]), 0)
    assert (found.prefilling, found.prefill_tokens, found.prompt_tokens) == (1, 500, 3_000)
    assert (found.decoding, found.context_tokens) == (2, 6_000 + 2 * 100)


def test_what_is_pending_is_never_more_than_its_prompts() -> None:
    """Shares are estimates; the tokens left to compute are counted."""
    found = backlog(snapshot(requests=[4, 0], prefilling=[1, 0], pending=[3_900, 0], context=[8_000, 0]), 0)
    assert found.prompt_tokens == 3_900


def test_a_cached_prompt_is_worth_waiting_for_as_long_as_it_takes_to_compute() -> None:
    """The holder is chosen until the prefill ahead of it costs more than the prompt elsewhere."""
    holder_s, other_s = completion_costs(snapshot(cached=[3_900, 0])).totals_s
    assert holder_s < other_s
    holder_s, other_s = completion_costs(
        snapshot(
            cached=[3_900, 0], requests=[2, 0], prefilling=[2, 0], pending=[9_000, 0], context=[9_000, 0]
        )
    ).totals_s
    assert holder_s > other_s


def test_the_fuller_the_fleet_the_dearer_is_work() -> None:
    """With followers behind it, the same wait is worth less than the work it saves."""

    def costs(followers_per_s: float) -> tuple[float, float]:
        found = completion_costs(
            snapshot(
                cached=[2_000, 0],
                requests=[2, 2],
                prefilling=[2, 2],
                pending=[9_000, 5_500],
                context=[9_000, 5_500],
                followers_per_s=followers_per_s,
            )
        )
        return found.totals_s[0], found.totals_s[1]

    holder_s, other_s = costs(0.0)
    assert holder_s > other_s
    holder_s, other_s = costs(20.0)
    assert holder_s < other_s


def test_twice_the_weight_takes_half_the_time() -> None:
    """An endpoint of weight 2 prefills twice as fast."""
    one, two = completion_costs(snapshot(weights=(1.0, 2.0), pending=[4_000, 4_000], prefilling=[1, 1]))
    assert two.wait_s == pytest.approx(one.wait_s / 2)
    assert two.work_s == pytest.approx(one.work_s / 2)


def test_a_full_cache_is_a_wait() -> None:
    """Where prompt and answers in flight exceed the cache, the request waits for some of them to end."""
    roomy, tight = completion_costs(
        snapshot(requests=[4, 4], context=[16_000, 16_000], kv_tokens=[100_000, 17_000])
    )
    assert roomy.room_s == 0.0 < tight.room_s
    unknown, _ = completion_costs(snapshot(requests=[4, 4], context=[16_000, 16_000]))
    assert unknown.room_s == 0.0


def test_a_full_engine_is_a_wait_for_a_sequence_to_end() -> None:
    """128 may run, 130 are in flight: two must end, one of which is ready to be followed."""
    free, full = completion_costs(replace(snapshot(requests=[127, 130]), max_num_seqs=[128, 128]))
    turn_s = 200.0 * 0.01 / 128
    assert (free.room_s, free.turn_s) == (0.0, 0.0)
    assert full.room_s == pytest.approx(2 * turn_s)
    assert full.turn_s == pytest.approx(turn_s)
    assert [
        has_room(replace(snapshot(requests=[127, 130]), max_num_seqs=[128, 128]), row) for row in (0, 1)
    ] == [
        True,
        False,
    ]


def test_prefill_ahead_is_done_while_sequences_end() -> None:
    """The longer of the two waits is the whole wait."""
    busy = snapshot(requests=[130, 0], prefilling=[3, 0], pending=[9_000, 0], context=[90_000, 0])
    without, _ = completion_costs(busy)
    within, _ = completion_costs(replace(busy, max_num_seqs=[128, 0]))
    assert within.wait_s == without.wait_s > 0.0
    assert within.room_s == 0.0
    assert within.turn_s > 0.0


def test_work_is_dear_where_many_sequences_run() -> None:
    """Nine in ten of `max_num_seqs` are a utilisation of 0.9, whatever prefill there is."""
    taken = replace(snapshot(requests=[90, 90]), max_num_seqs=[100, 100])
    assert taken.learned is not None
    learned = replace(taken.learned, rate_per_s=2.0)
    cost, _ = completion_costs(replace(taken, learned=learned))
    assert cost.others_s == pytest.approx(2.0 / (1.0 - 0.9) * cost.work_s * cost.work_s / 4)
    unknown, _ = completion_costs(replace(taken, learned=learned, max_num_seqs=[0, 0]))
    assert unknown.others_s == pytest.approx(2.0 * cost.work_s * cost.work_s / 4)


def test_the_engine_knows_its_cache_better_than_the_ledger() -> None:
    """Shared prompts are there once, and counted once per request here; one that says nothing is counted."""
    tight = snapshot(requests=[4, 4], context=[16_000, 16_000], kv_tokens=[17_000, 17_000])
    assert [cost.room_s > 0.0 for cost in completion_costs(tight)] == [True, True]
    known = replace(tight, kv_used=[5_000, None])
    assert [cost.room_s > 0.0 for cost in completion_costs(known)] == [False, True]
    assert [has_room(known, row) for row in (0, 1)] == [True, False]


def test_what_is_done_of_the_prefill_under_way_opens_an_endpoint() -> None:
    """A second of it done is a second less ahead."""
    fresh, _ = open_until_s(snapshot())
    going, _ = open_until_s(replace(snapshot(), under_way_s=[1.0, 0.0]))
    assert going - fresh == pytest.approx(1.0)


def test_rows_may_have_prices_of_their_own() -> None:
    """Another card, other prices: weights are then of no account."""
    plain = snapshot()
    assert plain.learned is not None
    prices_s = plain.learned.prefill_prices_s
    dear = tuple(3.0 * price_s for price_s in prices_s)
    mixed = replace(plain, learned=replace(plain.learned, row_prices_s=(prices_s, dear)))
    one, three = completion_costs(mixed)
    assert three.work_s == pytest.approx(3.0 * one.work_s)
    assert open_until_s(mixed)[1] == pytest.approx(3.0 * open_until_s(mixed)[0])


def test_what_is_held_makes_work_dearer() -> None:
    """Work that waits at gateways delays those that follow as much as what was sent."""
    none, _ = completion_costs(snapshot(followers_per_s=2.0))
    some, _ = completion_costs(replace(snapshot(followers_per_s=2.0), held_s=3.0))
    assert some.others_s - none.others_s == pytest.approx(2.0 * none.work_s * 3.0 / 2)


def test_an_endpoint_is_open_for_two_steps() -> None:
    """2,048 tokens each, slower beside decodes, quicker on a quicker endpoint."""
    idle_s, quick_s = open_until_s(snapshot(weights=(1.0, 2.0)))
    assert idle_s == pytest.approx(OPEN_STEPS * step_s(TtftModel().prices_s, backlog(snapshot(), 0)))
    assert quick_s == pytest.approx(idle_s / 2)
    busy_s, _ = open_until_s(snapshot(requests=[20, 0], context=[90_000, 0]))
    assert busy_s > idle_s


@given(
    pending=st.lists(st.integers(0, 9_000), min_size=2, max_size=2),
    decoding=st.integers(0, 60),
    under_way_s=st.floats(0.0, 2.0),
    max_num_seqs=st.sampled_from([(0, 0), (30, 30)]),
)
def test_what_goes_at_once_goes_as_the_queue_says(
    pending: list[int], decoding: int, under_way_s: float, max_num_seqs: tuple[int, int]
) -> None:
    """An open endpoint is found without asking the queue, which says the same of it and of a full one."""
    prefilling = [int(tokens > 0) for tokens in pending]
    shown = replace(
        snapshot(
            requests=[each + decoding for each in prefilling],
            prefilling=prefilling,
            pending=pending,
            context=[tokens + 900 * decoding for tokens in pending],
        ),
        under_way_s=[under_way_s, 0.0],
        max_num_seqs=max_num_seqs,
    )
    settings = LoadBalancing(algorithm=Algorithm.LEAST_COMPLETION, fallbacks=0)
    found = decide(shown, settings, ReplayRng((0.5,)), 0, 5.0, HoldQueue(), Claim(1, 5.0))
    row = choose(shown, settings, ReplayRng((0.5,)), 0).order[0]
    says = HoldQueue().decide(1, 5.0, 5.0, completion_costs(shown), open_until_s(shown), row)
    assert isinstance(found, SendNow) is isinstance(says, Send)


def test_without_prices_there_is_no_cost() -> None:
    """A snapshot of another policy is refused."""
    bare = replace(snapshot(), learned=None)
    for read in (completion_costs, open_until_s):
        with pytest.raises(ValueError):
            read(bare)


def test_a_decision_is_recorded_with_all_it_was_made_from() -> None:
    """The JSON recomputes it, and the page shows every part of every candidate's cost."""
    rig = completing()
    for number in range(6):
        rig.decide(f"r{number}", chat("x" * 3_000, stream=True))
    record = rig.record("r5")
    assert record.snapshot is not None
    assert record.snapshot.learned is not None
    assert record.snapshot.learned.followers_per_s > 0
    assert sum(record.snapshot.prefilling) == sum(record.snapshot.requests) == 5
    json = to_json(record)
    assert verdict(json) == "recomputed: same choice"
    page = render(json)
    terms = ("wait", "room", "work", "others", "stall", "decode", "place", "displacement")
    assert all(f"{term} term" in page for term in terms)


def test_first_tokens_and_answers_are_learned_from() -> None:
    """A slow engine raises the price of prefill; long answers raise the expected length."""
    rig = completing()
    predictor = rig.scheduling.predictor
    before, traffic = predictor.prices(GROUP).ttft_prices_s, predictor.traffic(GROUP)
    expected = traffic.output_tokens
    for number in range(20):
        rig.decide(str(number), chat(f"{number} " + "x" * 3_000, stream=True))
        rig.clock.advance(5.0)
        rig.gateway.first_token(str(number), late=False)
        rig.end(
            str(number),
            ttft_s=5.0,
            duration_s=9.0,
            prompt_tokens=1_000,
            cached_tokens=0,
            completion_tokens=900,
            stream_s=4.0,
        )
    assert traffic.output_tokens > expected
    assert predictor.prices(GROUP).ttft_prices_s[1] > before[1]


def test_prefill_stalls_what_decodes_by_hand() -> None:
    """3 sequences decode per endpoint, answers have 200 tokens; at a tenth of its limit a token counts 5."""
    busy = snapshot(requests=[5, 3], prefilling=[1, 1], pending=[10, 10], context=[9_000, 9_000])
    assert busy.learned is not None
    for cost in completion_costs(busy):
        assert cost.stall_s == pytest.approx(3 * 5.0 / 200.0 * cost.work_s)
        assert cost.decode_s == pytest.approx(5.0 * 0.01)
    strict = replace(busy, learned=replace(busy.learned, decode_tokens=100.0, tpot_limit_s=0.02))
    for cost in completion_costs(strict):  # its own limits say what its own pace is worth to it
        assert cost.stall_s == pytest.approx(3 * 5.0 / 200.0 * cost.work_s)
        assert cost.decode_s == pytest.approx(100.0 * 0.5 * 0.01)


def test_lost_cache_has_the_same_price_at_a_slow_endpoint() -> None:
    """Of 6 that decode, weights of 1 and 0.5 have 4 and 2; a prefill twice as long stalls half as many."""
    uneven = snapshot(
        requests=[5, 3], prefilling=[1, 1], pending=[10, 10], context=[9_000, 9_000], weights=(1.0, 0.5)
    )
    quick, slow = completion_costs(uneven)
    assert quick.stall_s == pytest.approx(4 * 5.0 / 200.0 * quick.work_s)
    assert slow.stall_s == pytest.approx(2 * 5.0 / 200.0 * slow.work_s)
    alike = replace(uneven, requests=[4, 4], weights=[1.0, 0.5])
    quick, slow = completion_costs(alike)
    assert slow.work_s == pytest.approx(2.0 * quick.work_s)
    assert slow.stall_s == pytest.approx(quick.stall_s)


def test_of_equal_costs_the_cached_endpoint_is_taken() -> None:
    """Where prefill was learned to cost nothing, a cache costs as much as none: no draw, and it is first."""
    free = replace(learned_of(snapshot()), prefill_prices_s=(0.01, 0.0, 0.0, 0.0, 0.0, 0.0))
    settings = LoadBalancing(algorithm=Algorithm.LEAST_COMPLETION, fallbacks=1)
    for cached, order in (([0, 4_000], (1, 0)), ([4_000, 0], (0, 1))):
        equal = replace(snapshot(cached=cached), learned=free)
        costs = completion_costs(equal)
        assert costs.totals_s[0] == costs.totals_s[1]
        sent = decide(equal, settings, ReplayRng([]), 0, 0.0)
        assert isinstance(sent, SendNow)
        assert sent.choice.order == order
        assert choose(equal, settings, ReplayRng([]), 0).order == order
    alike = replace(snapshot(cached=[4_000, 4_000]), learned=free)
    assert choose(alike, settings, ReplayRng([0.9]), 0).order == (1, 0)


def test_full_by_number_counts_as_nearly_full() -> None:
    """All but a twentieth: work of w seconds delays rate · w / 2n later requests per second, twenty times."""
    full = replace(snapshot(requests=[10, 10]), max_num_seqs=[10, 10])
    learned = replace(learned_of(full), rate_per_s=3.0)
    for cost in completion_costs(replace(full, learned=learned)):
        assert cost.others_s == pytest.approx(3.0 / (1.0 - 0.95) * cost.work_s * (cost.work_s / 4.0))


def test_what_does_not_decode_is_not_stalled() -> None:
    """Nor is anything where no answer's length is known."""
    prefilling = snapshot(requests=[5, 3], prefilling=[5, 3], pending=[10, 10], context=[9_000, 9_000])
    unknown = replace(prefilling, prefilling=[0, 0], output_tokens=0.0)
    for nothing in (snapshot(), prefilling, unknown):
        assert [cost.stall_s for cost in completion_costs(nothing)] == [0.0, 0.0]


def test_a_cache_is_left_for_a_quicker_pace_only_while_little_decodes() -> None:
    """The holder decodes at 30 ms a token, the other at 24 ms: what it saves itself, it costs the others."""
    few = replace(snapshot(cached=[3_000, 0], requests=[6, 0], context=[9_000, 0]), steps_s=[0.030, 0.015])
    holder_s, other_s = completion_costs(few).totals_s
    assert holder_s > other_s
    many = replace(
        snapshot(cached=[3_000, 0], requests=[66, 60], context=[99_000, 90_000]), steps_s=[0.030, 0.015]
    )
    holder_s, other_s = completion_costs(many).totals_s
    assert holder_s < other_s


def test_limits_of_the_request_weigh_decoding() -> None:
    """The limit on TTFT over that on TPOT, where it has both and they make sense."""
    rig = completing()
    rig.decide("slo", chat(), x_slo_ttft_ms="2000", x_slo_tpot_ms="20")
    record = rig.record("slo")
    assert record.snapshot is not None
    assert record.snapshot.learned is not None
    assert record.snapshot.learned.decode_tokens == 100.0
    assert record.snapshot.learned.tpot_limit_s == 0.02
    for ttft_ms, tpot_ms in (
        (None, "20"),
        ("2000", None),
        ("soon", "20"),
        ("2000", "0"),
        ("-1", "5"),
        ("nan", "1"),
        ("2000", "inf"),
        ("2_000", "20"),
        ("٢٠٠٠", "20"),
        ("1e9", "1"),
    ):
        assert decode_limits_of(ttft_ms, tpot_ms) == (DECODE_TOKENS, TPOT_LIMIT_S)


def test_a_limit_is_a_number_of_milliseconds() -> None:
    """Anything else is none; `1_000` and other scripts' digits, which Python takes, as well."""
    assert limit_s_of("1500") == limit_s_of(" 1500.0 ") == 1.5
    for nothing in (None, "", "soon", "0", "-1", "inf", "nan", "1_000", "٢٠٠٠", "1e400"):
        assert limit_s_of(nothing) is None


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_what_is_shown_is_what_decides(algorithm: Algorithm) -> None:
    """Under every policy one model foresees the first token: explain, record and costs say the same."""
    rig = build_rig([endpoint(0)], load_balancing=LoadBalancing(algorithm=algorithm))
    rig.decide("before", chat("y" * 2_000, stream=True))
    rig.decide("r", chat("x" * 3_000, stream=True))
    record = rig.record("r")
    assert record.snapshot is not None
    cost = completion_costs(replace(record.snapshot, steps_s=record.snapshot.steps_s or [0.01]))[0]
    expected_s = cost.wait_s + cost.room_s + cost.work_s
    assert cost.wait_s > 0.0
    assert foreseen_ttft_s(record, 0) == pytest.approx(expected_s)
    assert to_json(record)["predicted_ttft_s"] == [foreseen_ttft_s(record, 0)]


amounts = st.integers(0, 200_000)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Any state, of one to four endpoints."""
    rows = draw(st.integers(1, 4))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=rows, max_size=rows))

    requests = column(st.integers(0, 300))
    pending, context = ([draw(amounts) if count else 0 for count in requests] for _ in range(2))
    prompt_tokens = draw(st.integers(1, 100_000))
    prices_s = st.tuples(*[st.floats(1e-6, 0.1)] * 6)
    return Snapshot(
        tuple(EndpointKey(f"10.0.0.{row}:1") for row in range(rows)),
        requests,
        pending,
        context,
        [0] * rows,
        1,
        column(st.floats(0.1, 10.0)),
        prefilling=[min(count, draw(st.integers(0, 20))) for count in requests],
        cached_tokens=column(st.integers(0, prompt_tokens - 1)),
        steps_s=column(st.floats(0.001, 0.1)),
        kv_tokens=column(st.sampled_from([0, 100_000])),
        prompt_tokens=prompt_tokens,
        output_tokens=draw(st.floats(1.0, 1_000.0)),
        learned=Learned(
            draw(prices_s), 1.0, 50.0, 2.0, draw(st.one_of(st.just([]), st.just(column(prices_s))))
        ),
        max_num_seqs=draw(st.sampled_from([[], [0] * rows, [64] * rows])),
        kv_used=draw(st.one_of(st.just([]), st.just(column(st.one_of(st.none(), amounts))))),
    )


@given(snapshots())
def test_columns_are_what_their_rows_say(any_snapshot: Snapshot) -> None:
    """The quick way over all rows gives the times of each row to the last bit."""
    found = completion_costs(any_snapshot)
    for row, cost in enumerate(found):
        assert (cost.wait_s, cost.work_s, cost.room_s) == row_times_s(any_snapshot, row)
    terms = completion_terms(any_snapshot)
    assert total(terms) == [-each for each in found.totals_s]


@given(snapshots())
def test_many_rows_cost_what_few_do(few: Snapshot) -> None:
    """Arrays give each row what the loops give it, to the last bit."""
    times = -(-MANY_ROWS // len(few.keys))
    assert few.learned is not None
    of_rows = (
        *("requests", "prefill_tokens", "context_tokens", "matched_blocks", "weights", "prefilling"),
        *("cached_tokens", "steps_s", "kv_tokens", "max_num_seqs", "kv_used"),
    )
    columns: dict[str, Any] = {name: list(getattr(few, name)) * times for name in of_rows}
    keys = tuple(EndpointKey(f"10.0.0.1:{row}") for row in range(len(few.keys) * times))
    learned = replace(few.learned, row_prices_s=list(few.learned.row_prices_s) * times)
    many = replace(few, keys=keys, learned=learned, **columns)
    some, all_of_them = completion_costs(few), completion_costs(many)
    for name in ("waits_s", "works_s", "rooms_s"):
        assert list(getattr(all_of_them, name)) == getattr(some, name) * times
    for name in ("stalls_s", "decodes_s"):  # of means over rows, which sums of other lengths round otherwise
        assert list(getattr(all_of_them, name)) == pytest.approx(getattr(some, name) * times)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), amounts, st.floats(0.1, 10.0)), min_size=1),
    st.integers(1, 100_000),
    st.floats(1.0, 5_000.0),
    st.tuples(*[st.floats(0.0, 10.0)] * 3),
)
def test_the_quick_way_over_paces_is_the_long_one(
    rows: list[tuple[int, int, int, float]],
    prompt_tokens: int,
    output_tokens: float,
    tpot_prices_s: tuple[float, float, float],
) -> None:
    """One set of prices for all rows gives each row what that row alone would get, to the last bit."""
    requests, prefilling, context, weights = map(list, zip(*rows, strict=True))
    load = Load(requests, prefilling, [0] * len(rows), context)
    prices = Prices((), (tpot_prices_s,), ())
    once = steps_s((prices,), weights, load, prompt_tokens, output_tokens)
    assert once == steps_s((prices,) * len(rows), weights, load, prompt_tokens, output_tokens)
    many = Load(*([*column] * MANY_ROWS for column in (requests, prefilling, [0] * len(rows), context)))
    found = steps_s((prices,), weights * MANY_ROWS, many, prompt_tokens, output_tokens)
    assert list(found) == list(once) * MANY_ROWS
