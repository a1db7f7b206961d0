"""Explaining a decision: complete JSON, the same choice again, and a page that hides nothing."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.choose import choose, terms_of
from extproc.choosing.foreseen import foreseen_tpot_s, foreseen_ttft_s
from extproc.choosing.replay import RecordingRng, ReplayRng
from extproc.choosing.snapshots import Demand, Engines, Load, Prompt, completion_snapshot, plain_snapshot
from extproc.choosing.terms import total
from extproc.errors import Reason
from extproc.observing.explain import recompute, render, to_json, verdict
from extproc.predicting.predictor import Predictor
from extproc.predicting.ttft import IDLE, TtftModel
from extproc.routing.keeping import ints, kept
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.choices import Learned, Snapshot
from extproc.values.decisions import CacheSource, DecisionRecord
from extproc.values.outcomes import Ended, Outcome
from extproc.values.prices import Prices
from extproc.values.requests import Operation
from metadata_center.types import MANY_ROWS, EndpointKey, RequestId
from tests.admin_answers import answering
from tokenway.cli.explain import explain

KEYS = tuple(EndpointKey(f"10.0.0.{host}:8000") for host in range(1, 5))
GONE = EndpointKey("10.0.0.9:8000")
KEY = ("qwen-int8", "chat")
PRICES = Prices((0.3, 0.01, 0.0, 0.0, 0.0, 0.0), ((0.001, 0.0, 0.009),), ())
"""300 ms and 10 us per token computed, ahead or own; 10 ms per token, 1 ms per request more."""

AIGW = LoadBalancing(algorithm=Algorithm.INFERENCE_LB)


def decided(
    snapshot: Snapshot,
    settings: LoadBalancing,
    seed: int = 0,
    turn: int = 0,
    model: str = "qwen",
    prices: Prices = PRICES,
) -> DecisionRecord:
    """Make a decision as the router does and record it."""
    rng = RecordingRng(random.Random(seed))
    choice = choose(snapshot, settings, rng, turn)
    return DecisionRecord(
        request_id=RequestId("r-1"),
        time_unix_s=1_700_000_000.5,
        data_age_s={"load": 0.0, "health": 1.2, "cache": float("inf")},
        operation=Operation.CHAT,
        model=model,
        upstream_model="qwen-int8",
        cluster="chat",
        route_name="default",
        settings=settings,
        stream=True,
        prompt_bytes=4096,
        prompt_tokens=1000,
        num_blocks=snapshot.num_blocks,
        block_bytes=64,
        snapshot=snapshot,
        choice=choice,
        draws=rng.draws,
        turn=turn,
        prices=(prices,),
        cached_tokens=[row * 16 for row in range(len(snapshot.keys))],
        filtered=((GONE, "ejected"),),
        decision_us=41.0,
    )


def fixed_snapshot() -> Snapshot:
    """Four candidates, the third idle with the whole prompt cached."""
    load = Load([4, 2, 0, 1], [1, 1, 0, 1], [8000, 100, 0, 5], [9000, 700, 0, 6])
    prompt = Prompt(1_000, [row * 16 for row in range(4)], [0, 3, 64, 1], 64)
    return plain_snapshot(KEYS, (1.0, 1.0, 1.0, 2.0), load, prompt, (PRICES,), 200.0)


@pytest.fixture
def record() -> DecisionRecord:
    """A decision that ended well."""
    made = decided(fixed_snapshot(), AIGW)
    made.outcome = Outcome(
        Ended.COMPLETED,
        1.5,
        KEYS[2],
        attempts=1,
        status=200,
        ttft_s=0.25,
        prompt_tokens=1010,
        completion_tokens=20,
        cached_tokens=992,
        predicted_ttft_s=0.3,
        predicted_cached_tokens=1000,
    )
    return made


def through_json(record: DecisionRecord) -> dict[str, Any]:
    """The record as it arrives at the other end of the admin port."""
    decoded: dict[str, Any] = orjson.loads(orjson.dumps(to_json(record)))
    return decoded


@st.composite
def decisions(draw: st.DrawFn) -> DecisionRecord:
    """Any decision over up to eight endpoints."""
    n, num_blocks = draw(st.integers(1, 8)), draw(st.integers(0, 50))

    def column(most: int) -> list[int]:
        return draw(st.lists(st.integers(0, most), min_size=n, max_size=n))

    weights = draw(st.lists(st.floats(0.1, 10.0), min_size=n, max_size=n))
    snapshot = Snapshot(
        keys=tuple(EndpointKey(f"h{row}:1") for row in range(n)),
        requests=column(20),
        prefill_tokens=column(100_000),
        context_tokens=column(1_000_000),
        matched_blocks=column(num_blocks),
        num_blocks=num_blocks,
        weights=tuple(weights),
        prefilling=column(5),
        cached_tokens=column(999),
        steps_s=draw(st.lists(st.floats(0.001, 1.0), min_size=n, max_size=n)),
        kv_tokens=column(1_000_000),
        prompt_tokens=draw(st.integers(1000, 100_000)),
        output_tokens=draw(st.floats(1.0, 2000.0)),
        learned=Learned(TtftModel().prices_s, draw(st.floats(0.0, 50.0)), draw(st.floats(1.0, 100.0))),
    )
    settings = LoadBalancing(
        algorithm=draw(st.sampled_from(Algorithm)),
        load_aware_enable=draw(st.booleans()),
        cache_aware_enable=draw(st.booleans()),
        candidate_percent=draw(st.integers(0, 100)),
        request_load_weight=draw(st.floats(0.0, 10.0)),
        fallbacks=draw(st.integers(0, 8)),
    )
    predictor = Predictor(tpot_thresholds=(5, 10))
    for actual_s in draw(st.lists(st.floats(0.001, 10.0), max_size=3)):
        predictor.observe_ttft(KEY, IDLE, uncached=9, cached=9, predicted_s=None, actual_s=actual_s)
        predictor.observe_tpot(KEY, batch=7, context=9, predicted_s=None, actual_s=actual_s)
    seed, turn = draw(st.integers(0, 1000)), draw(st.integers(0, 1000))
    return decided(snapshot, settings, seed, turn, prices=predictor.prices(KEY))


@given(decisions())
def test_any_decision_is_recomputed_from_its_json(record: DecisionRecord) -> None:
    """The JSON alone gives the same order under every algorithm, and the page says so."""
    assert record.choice is not None
    shown = through_json(record)
    assert recompute(shown) == record.choice.order
    assert render(shown).endswith("\nrecomputed: same choice\n")


@given(decisions())
def test_predictions_and_scores_survive_the_json(record: DecisionRecord) -> None:
    """Every candidate's TTFT, TPOT, score and score parts arrive exactly as the decision had them."""
    assert record.snapshot is not None
    assert record.choice is not None
    assert record.settings is not None
    shown, rows = through_json(record), range(len(record.snapshot.keys))
    assert shown["predicted_ttft_s"] == [foreseen_ttft_s(record, row) for row in rows]
    assert shown["predicted_tpot_s"] == [foreseen_tpot_s(record, row) for row in rows]
    assert shown["choice"]["scores"] == record.choice.scores
    assert shown["choice"]["terms"] == terms_of(record.snapshot, record.settings)
    assert total(shown["choice"]["terms"]) == record.choice.scores


def test_prices_by_kind_survive_the_json() -> None:
    """A decision over many endpoints of two kinds is made again of its JSON."""
    rows, predictor = range(MANY_ROWS), Predictor()
    predictor.observe_ttft(("m", "c/a"), IDLE, uncached=9, cached=9, predicted_s=None, actual_s=3.0)
    groups = tuple(f"c/{'ab'[row % 2]}" for row in rows)
    column = [row % 3 for row in rows]
    snapshot = completion_snapshot(
        tuple(EndpointKey(f"h{row}:1") for row in rows),
        (1.0,) * len(rows),
        Load(column, [0] * len(rows), [0] * len(rows), [100 * each for each in column]),
        Prompt(1_000, [0] * len(rows), [0] * len(rows), 64),
        predictor.row_prices("m", groups),
        Engines(),
        Demand(predictor.traffic(("m", "c")), 1.0, len(rows)),
    )
    record = decided(snapshot, LoadBalancing(algorithm=Algorithm.LEAST_COMPLETION))
    assert record.choice is not None
    shown = through_json(record)
    assert len({tuple(row) for row in shown["snapshot"]["learned"]["row_prices_s"]}) == 2
    assert len(shown["snapshot"]["learned"]["row_prices_s"]) == len(rows)
    assert recompute(shown) == record.choice.order


@given(decisions())
def test_columns_as_a_record_keeps_them_show_the_same(record: DecisionRecord) -> None:
    """To the last digit, and the decision is made again of them."""
    assert record.snapshot is not None
    assert record.choice is not None
    assert record.settings is not None
    record.views = [CacheSource.HISTORY] * len(record.snapshot.keys)
    made = orjson.dumps(to_json(record))
    terms = terms_of(record.snapshot, record.settings)
    record.snapshot, record.choice, record.views = kept(record.snapshot, record.choice, record.views)
    assert isinstance(record.snapshot.steps_s, array)
    assert orjson.dumps(to_json(record)) == made
    assert terms_of(record.snapshot, record.settings) == terms
    assert choose(record.snapshot, record.settings, ReplayRng(record.draws), record.turn) == replace(
        record.choice, scores=None if record.choice.scores is None else list(record.choice.scores)
    )


@pytest.mark.parametrize("most", [0, 2**31 - 1, 2**31, 2**63 - 1, 2**63, None])
def test_no_number_is_too_large_to_be_kept(most: int | None) -> None:
    """Nor is one that is unknown; few take more than 4 bytes each."""
    column = [1, most, -3]
    assert list(ints(column)) == column
    assert getattr(ints([1, most]), "itemsize", None) == (
        None if most is None or most >= 2**63 else 4 if most < 2**31 else 8
    )


def test_json_holds_every_field_of_the_record(record: DecisionRecord) -> None:
    """No field is forgotten, and arrays arrive with exactly their values."""
    shown = through_json(record)
    predicted = {"predicted_ttft_s", "predicted_tpot_s"}
    assert set(shown) == set(DecisionRecord.__dataclass_fields__) - {"prices"} | predicted
    assert shown["snapshot"]["prefill_tokens"] == [8000, 100, 0, 5]
    assert shown["predicted_ttft_s"] == pytest.approx([0.39, 0.31084, 0.30968, 0.154785])
    assert shown["predicted_tpot_s"] == pytest.approx([0.014, 0.012, 0.01, 0.0055])
    assert shown["cached_tokens"] == [0, 16, 32, 48]
    assert shown["settings"]["prefill_load_weight"] == 3.0
    assert shown["filtered"] == [{"endpoint": GONE, "reason": "ejected"}]
    assert shown["data_age_s"] == {"load": 0.0, "health": 1.2, "cache": None}
    assert shown["outcome"]["ended"] == "completed"
    assert set(shown["outcome"]) == set(Outcome.__dataclass_fields__)
    assert set(shown["snapshot"]) == set(Snapshot.__dataclass_fields__)


def test_page_shows_the_chosen_candidate_first_and_every_other(record: DecisionRecord) -> None:
    """The table starts with the chosen endpoint, then fallbacks, then the rest, then the filtered ones."""
    lines = render(through_json(record)).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("endpoint"))
    for name in ("cached tok", "matched", "prefill tok", "TTFT ms", "requests", "prefill term", "score"):
        assert name in lines[start]
    table = lines[start + 1 : start + 6]
    assert table[0].startswith(KEYS[2])
    assert table[0].endswith("chosen")
    assert "64/64" in table[0]
    assert "309.7" in table[0]
    assert "-0.0000" not in table[0]
    assert [line.split()[-2:] for line in table[1:3]] == [["fallback", "1"], ["fallback", "2"]]
    assert {line.split()[0] for line in table[1:4]} == {KEYS[0], KEYS[1], KEYS[3]}
    assert table[4].startswith(GONE)
    assert table[4].endswith("filtered: ejected")


def test_page_compares_prediction_and_outcome(record: DecisionRecord) -> None:
    """Predicted and actual TTFT, cached tokens and status stand side by side."""
    page = render(through_json(record))
    assert "TTFT       predicted 300.0 ms   actual 250.0 ms" in page
    assert "cached: predicted 1000, reported 992" in page
    assert "prompt 1010 (estimated 1000)" in page
    assert "happened   completed   status 200   served by 10.0.0.3:8000" in page
    assert "data age   load 0.000 s, health 1.200 s, cache never" in page
    assert "model qwen -> qwen-int8" in page


def test_a_changed_record_is_reported_as_different(record: DecisionRecord) -> None:
    """If the recorded choice is not what the recorded inputs give, the page says what they give."""
    shown = through_json(record)
    shown["choice"]["order"] = [0, 1, 3]
    assert verdict(shown) == f"recomputed: DIFFERENT ({', '.join(KEYS[row] for row in recompute(shown))})"
    assert recompute(shown)[0] == 2


def test_missing_draws_are_reported_as_different() -> None:
    """A record whose random numbers ran out cannot have been made by this policy."""
    shown = through_json(decided(fixed_snapshot(), LoadBalancing(algorithm=Algorithm.RANDOM)))
    assert shown["draws"] != []
    shown["draws"] = []
    verdict_text = verdict(shown)
    assert verdict_text is not None
    assert verdict_text.startswith("recomputed: DIFFERENT (more draws")


def test_a_running_request_has_no_outcome_yet() -> None:
    """Before its end the page says that nothing happened yet."""
    assert "happened   nothing yet" in render(through_json(decided(fixed_snapshot(), AIGW)))


def test_a_rejected_request_shows_its_reason_and_what_was_filtered() -> None:
    """A refusal has no candidates and nothing to recompute, but says why and lists the filtered endpoints."""
    refused = DecisionRecord(
        request_id=RequestId("r"),
        time_unix_s=1.0,
        data_age_s={},
        filtered=((GONE, "draining"),),
        rejected=Reason.NO_HEALTHY_ENDPOINT,
    )
    shown = through_json(refused)
    for name in ("snapshot", "choice", "cached_tokens", "predicted_ttft_s", "predicted_tpot_s"):
        assert shown[name] is None
    page = render(shown)
    assert "rejected   no_healthy_endpoint" in page
    assert f"{GONE}  draining" in page
    assert "recomputed" not in page
    with pytest.raises(ValueError, match="rejected"):
        recompute(shown)


def test_control_characters_never_reach_the_terminal() -> None:
    """A model name with an escape sequence is shown as text."""
    page = render(through_json(decided(fixed_snapshot(), AIGW, model="m\x1b[2J\n\x9b1mchosen")))
    assert "m\\x1b[2J\\x0a\\x9b1mchosen" in page
    assert page.replace("\n", "").isprintable()


@pytest.fixture
def admin_url(record: DecisionRecord) -> Iterator[str]:
    """A server that holds one record, under an id that needs quoting."""
    answers = {
        "/explain/a%2Fb": to_json(record),
        "/explain?last=1": {"records": [to_json(record)]},
        "/explain?last=2": {"records": [to_json(record), to_json(record)]},
        "/explain?last=9": {"records": []},
    }
    pages = {path: (200, orjson.dumps(answer)) for path, answer in answers.items()}
    with answering({**pages, "/explain/broken": (500, b"null")}) as url:
        yield url


@pytest.mark.parametrize(
    ("algorithm", "idle", "said"),
    [
        (Algorithm.INFERENCE_LB, 0, "the best of 4"),
        (Algorithm.INFERENCE_LB, 4, "drawn from 4 equal ones of 4"),
        (Algorithm.ROUND_ROBIN, 0, "of 4"),
    ],
)
def test_what_the_first_was_taken_from(algorithm: Algorithm, idle: int, said: str) -> None:
    """Where endpoints are equal, the page says that one of them was drawn."""
    snapshot = fixed_snapshot()
    if idle:
        nothing = [0] * idle
        load = Load(nothing, nothing, nothing, nothing)
        prompt = Prompt(1_000, nothing, nothing, 64)
        snapshot = plain_snapshot(KEYS, (1.0,) * idle, load, prompt, (PRICES,), 200.0)
    page = render(through_json(decided(snapshot, LoadBalancing(algorithm=algorithm))))
    (chosen,) = [line for line in page.splitlines() if line.startswith("chosen ")]
    assert chosen.split("   ")[-2] == said


def test_the_best_few_are_drawn_from() -> None:
    """AIGW's score takes one of its best five per cent, here one of two."""
    settings = LoadBalancing(algorithm=Algorithm.INFERENCE_LB, candidate_percent=50)
    page = render(through_json(decided(fixed_snapshot(), settings)))
    assert "   drawn from the best 2 of 4   " in page


@pytest.mark.parametrize("row", range(4))
def test_a_response_is_tried_at_its_holder_and_one_other(row: int) -> None:
    """The page names no fallbacks that are none: the policy's others are not tried."""
    made = decided(fixed_snapshot(), AIGW)
    assert made.choice is not None
    made.holder = KEYS[row]
    page = render(through_json(made))
    other = next(KEYS[each] for each in made.choice.order if each != row)
    (placed,) = [line for line in page.splitlines() if "fallbacks" in line]
    assert placed.startswith(f"placed     {KEYS[row]} ")
    assert placed.endswith(f"fallbacks {other}")


def test_command_renders_one_record(
    admin_url: str, record: DecisionRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request id is quoted into the path and its page printed."""
    assert explain(["a/b", "--admin", admin_url]) == 0
    assert capsys.readouterr().out == render(to_json(record)) + "\n"


@pytest.mark.parametrize(("args", "count"), [([], 1), (["--last"], 1), (["--last", "2"], 2)])
def test_command_renders_the_last_records(
    args: list[str], count: int, admin_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an id the most recent decisions are shown, one unless a number is given."""
    assert explain([*args, "--admin", admin_url]) == 0
    assert capsys.readouterr().out.count("recomputed: same choice") == count


def test_command_passes_json_on(
    admin_url: str, record: DecisionRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` prints the record as the gateway holds it."""
    assert explain(["a/b", "--json", "--admin", admin_url]) == 0
    assert json.loads(capsys.readouterr().out) == through_json(record)


def test_command_says_when_nothing_is_held(admin_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty ring is a sentence, not an empty screen."""
    assert explain(["--last", "9", "--admin", admin_url]) == 0
    assert capsys.readouterr().out == "no decision is remembered\n"


@pytest.mark.parametrize(
    ("request_id", "message"),
    [
        ("other", "no decision of that id is remembered"),
        ("broken", "admin port URL answers with status 500; is it a gateway's?"),
    ],
)
def test_command_fails_with_the_admin_ports_answer(
    request_id: str, message: str, admin_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown id and a failing gateway are distinguished; both exit 1."""
    assert explain([request_id, "--admin", admin_url]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{message.replace('URL', admin_url)}\n")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "file:///etc/hosts"])
def test_command_fails_without_an_admin_port(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused connection or an unsupported URL is one line on stderr and exit code 1."""
    assert explain(["r", "--admin", url]) == 1
    assert capsys.readouterr().err.startswith(f"admin port {url} does not answer")
