"""Metrics: what each event counts, what a scrape shows, and that the documentation says so."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from extproc.build_kind import build_kind
from extproc.errors import Reason
from extproc.observing.metrics.collector import Metrics
from extproc.observing.metrics.decisions import DECISION_SECONDS
from extproc.observing.metrics.endpoints import EndpointGauges
from extproc.observing.metrics.exposition import SAMPLES_AT_ONCE, in_pieces
from extproc.observing.metrics.family import MetricType
from extproc.observing.metrics.live import LiveGauges
from extproc.observing.metrics.merge import merge
from extproc.observing.metrics.table import FAMILIES, document
from extproc.predicting.calibration import CalibrationSummary
from extproc.predicting.predictor import KeyCalibration
from extproc.values.balancing import Algorithm
from extproc.values.outcomes import Ended, Outcome
from extproc.values.requests import Operation
from metadata_center.load.kinds import NOTHING
from metadata_center.types import EndpointKey

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")
GEN_AI = {"gen_ai_request_model": "m", "gen_ai_operation_name": "chat"}


class Word(StrEnum):
    """Stands for another module's closed enum."""

    ONE = "one"
    TWO = "two"


class Scraped:
    """Metrics on a registry of their own, read back through a scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, version="1.2.3")
        self.metrics.configure(models=["m"], clusters=["c"], endpoints=[A, B])

    def text(self) -> str:
        """The exposition."""
        return generate_latest(self.registry).decode()

    def value(self, name: str, **labels: str) -> float | None:
        """The sample with exactly these labels, None if there is none."""
        return self.registry.get_sample_value(name, labels)

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """Label values to value, of every sample of this name."""
        return {
            tuple(sample.labels.values()): sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name
        }


@pytest.fixture
def scraped() -> Scraped:
    """Fresh metrics that know model `m`, cluster `c` and two endpoints."""
    return Scraped()


def test_documentation_is_current() -> None:
    """`docs/metrics.md` is what the table generates."""
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == document()


def test_every_documented_family_is_scraped(scraped: Scraped) -> None:
    """A scrape has HELP and TYPE of every family in the table, and no other family."""
    lines = scraped.text().splitlines()
    helps = [line.split(" ", 3)[2:] for line in lines if line.startswith("# HELP")]
    types = [tuple(line.split(" ")[2:]) for line in lines if line.startswith("# TYPE")]
    assert helps == [[family.name, family.doc] for family in FAMILIES]
    assert types == [(family.name, family.kind) for family in FAMILIES]


def test_an_exposition_in_pieces_is_the_same(scraped: Scraped) -> None:
    """However many series a family has: no piece has more than some, and each family is headed once."""
    keys = [EndpointKey(f"10.0.{i // 250}.{i % 250}:8000") for i in range(2 * SAMPLES_AT_ONCE + 1)]
    scraped.metrics.configure(models=["m"], clusters=["c"], endpoints=keys)
    for key in keys:
        scraped.metrics.observe_decision("m", Algorithm.RANDOM, key, 0.001, None, 0.0, "history")
    pieces = list(in_pieces(scraped.registry))
    assert b"".join(pieces) == scraped.text().encode()
    assert max(piece.count(b"\n") for piece in pieces) <= SAMPLES_AT_ONCE + 2


def test_table_follows_the_naming_rules() -> None:
    """Names are distinct, counters end in `_total`, buckets ascend, no label is `worker` or `le`."""
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.name.endswith("_total") == (family.kind is MetricType.COUNTER), family.name
        assert list(family.buckets) == sorted(set(family.buckets)), family.name
        assert bool(family.buckets) == (family.kind is MetricType.HISTOGRAM), family.name
        assert not {"worker", "le"} & set(family.labels), family.name
        assert family.doc.endswith("."), family.name
        assert "|" not in family.doc, family.name


def test_a_second_instance_on_one_registry_is_refused(scraped: Scraped) -> None:
    """The registry sees our names, so duplicates fail at construction instead of corrupting scrapes."""
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(scraped.registry, version="1")


def test_a_decision_counts_endpoint_time_score_and_match(scraped: Scraped) -> None:
    """One decision is one count at its endpoint and one observation of duration, score and match ratio."""
    scraped.metrics.observe_decision("m", Algorithm.INFERENCE_LB, A, 0.00003, -0.3, 0.75, "history")
    labels = {"model": "m", "algorithm": "inference_lb", "endpoint": A}
    assert scraped.value("tokenway_decisions_total", **labels) == 1
    assert scraped.value("tokenway_decision_seconds_bucket", le="2e-05") == 0
    assert scraped.value("tokenway_decision_seconds_bucket", le="4e-05") == 1
    assert scraped.value("tokenway_score_bucket", algorithm="inference_lb", le="-0.5") == 0
    assert scraped.value("tokenway_score_bucket", algorithm="inference_lb", le="-0.25") == 1
    assert scraped.samples("tokenway_score_sum") == {}
    assert scraped.value("tokenway_match_ratio_sum", model="m") == 0.75


def test_a_policy_without_scores_observes_none(scraped: Scraped) -> None:
    """A None score leaves no observation; zero would be read as a bad score."""
    scraped.metrics.observe_decision("m", Algorithm.RANDOM, A, 0.00003, None, 0.0, "history")
    assert scraped.samples("tokenway_score_bucket") == {}


def test_a_completed_stream_fills_the_gen_ai_series(scraped: Scraped) -> None:
    """Tokens by type, duration, TTFT and time per output token after the first come from one outcome."""
    outcome = Outcome(
        Ended.COMPLETED,
        2.2,
        A,
        attempts=1,
        status=200,
        ttft_s=0.2,
        prompt_tokens=100,
        completion_tokens=11,
        cached_tokens=64,
    )
    scraped.metrics.observe_end(Operation.CHAT, "m", outcome, 0.5, 0.02)
    tokens = scraped.samples("gen_ai_client_token_usage_sum")
    assert tokens == {("input", "m", "chat"): 100, ("output", "m", "chat"): 11, ("cached", "m", "chat"): 64}
    duration = scraped.value("gen_ai_server_request_duration_seconds_sum", **GEN_AI, error_type="")
    assert duration == 2.2
    assert scraped.value("gen_ai_server_time_to_first_token_seconds_sum", **GEN_AI) == 0.7
    assert scraped.value("gen_ai_server_time_per_output_token_seconds_sum", **GEN_AI) == 0.02
    requests = scraped.samples("tokenway_requests_total")
    assert requests == {("m", "2xx", "completed"): 1}


def test_an_answer_without_stream_or_usage_leaves_those_series_empty(scraped: Scraped) -> None:
    """Absent measurements are not observed as zeros."""
    scraped.metrics.observe_end(
        Operation.CHAT, "m", Outcome(Ended.COMPLETED, 2.0, A, status=200, predicted_ttft_s=0.1)
    )
    assert set(scraped.samples("gen_ai_client_token_usage_count").values()) == {0}
    assert scraped.value("gen_ai_server_time_to_first_token_seconds_count", **GEN_AI) == 0
    assert set(scraped.samples("tokenway_ttft_prediction_error_seconds_count").values()) == {0}


def test_an_unknown_time_per_output_token_is_not_observed(scraped: Scraped) -> None:
    """Without a second token there is no interval to measure."""
    outcome = Outcome(Ended.COMPLETED, 2.0, A, status=200, ttft_s=2.0, completion_tokens=1)
    scraped.metrics.observe_end(Operation.CHAT, "m", outcome)
    assert scraped.value("gen_ai_server_time_per_output_token_seconds_count", **GEN_AI) == 0


@pytest.mark.parametrize(
    ("ended", "status", "status_class"),
    [
        (Ended.CLIENT_ABORT, None, "none"),
        (Ended.UPSTREAM_RESET, 503, "5xx"),
        (Ended.UPSTREAM_ERROR, 400, "4xx"),
        (Ended.TIMEOUT, 999, "other"),
    ],
)
def test_a_failed_request_is_kept_out_of_latency(
    scraped: Scraped, ended: Ended, status: int | None, status_class: str
) -> None:
    """A failure counts under its status class and error type, and teaches nothing about TTFT."""
    outcome = Outcome(ended, 0.5, A, status=status, ttft_s=0.1, predicted_ttft_s=0.2)
    scraped.metrics.observe_end(Operation.CHAT, "m", outcome)
    assert scraped.samples("tokenway_requests_total") == {("m", status_class, ended): 1}
    durations = scraped.samples("gen_ai_server_request_duration_seconds_count")
    assert durations == {("m", "chat", ""): 0, ("m", "chat", ended): 1}
    assert scraped.value("gen_ai_server_time_to_first_token_seconds_count", **GEN_AI) == 0
    assert set(scraped.samples("tokenway_ttft_prediction_error_seconds_count").values()) == {0}


@pytest.mark.parametrize(
    ("predicted_s", "side", "error_s", "ratio"), [(0.5, "early", 0.25, 1.0), (0.125, "late", 0.125, 0.5)]
)
def test_prediction_error_says_its_side(
    scraped: Scraped, predicted_s: float, side: str, error_s: float, ratio: float
) -> None:
    """An earlier token than predicted is `early`; distances are positive, absolute and relative."""
    outcome = Outcome(Ended.COMPLETED, 1.0, A, status=200, ttft_s=0.25, predicted_ttft_s=predicted_s)
    scraped.metrics.observe_end(Operation.CHAT, "m", outcome)
    other = "late" if side == "early" else "early"
    sums = scraped.samples("tokenway_ttft_prediction_error_seconds_sum")
    assert sums == {("m", side): error_s, ("m", other): 0}
    counts = scraped.samples("tokenway_ttft_prediction_error_seconds_count")
    assert counts == {("m", side): 1, ("m", other): 0}
    assert scraped.value("tokenway_ttft_prediction_relative_error_ratio_sum", model="m", side=side) == ratio


@pytest.mark.parametrize(("expected", "side"), [(96, "over"), (32, "under")])
def test_cached_tokens_error_says_its_side(scraped: Scraped, expected: int, side: str) -> None:
    """An engine that cached less than we believed is `over`."""
    outcome = Outcome(Ended.COMPLETED, 1.0, A, status=200, cached_tokens=64, predicted_cached_tokens=expected)
    scraped.metrics.observe_end(Operation.CHAT, "m", outcome)
    assert scraped.value("tokenway_cached_tokens_error_tokens_sum", model="m", side=side) == 32


def test_made_up_label_values_are_counted_as_other(scraped: Scraped) -> None:
    """No client and no late answer of a removed endpoint can create a series."""
    gone = EndpointKey("gone:1")
    for made_up in ("x", "y"):
        scraped.metrics.observe_decision(made_up, Algorithm.RANDOM, gone, 0.1, None, 0.0, "history")
        scraped.metrics.observe_end(Operation.CHAT, made_up, Outcome(Ended.COMPLETED, 1.0, status=200))
        scraped.metrics.rejected(Reason.MODEL_NOT_FOUND, made_up, 404)
        scraped.metrics.fell_back(made_up)
        scraped.metrics.ejected(gone, Word.ONE)
    assert scraped.samples("tokenway_decisions_total") == {("other", "random", "other"): 2}
    assert scraped.samples("tokenway_requests_total") == {
        ("other", "2xx", "completed"): 2,
        ("other", "4xx", "rejected"): 2,
    }
    assert scraped.samples("tokenway_fallbacks_total") == {("other",): 2}
    assert scraped.samples("tokenway_ejections_total") == {("other", "one"): 2}


def test_rejections_exist_at_zero_for_every_reason(scraped: Scraped) -> None:
    """Each reason has a series from the start, so that its first increase is seen."""
    scraped.metrics.rejected(Reason.BODY_TOO_LARGE, "m", 413)
    rejections = scraped.samples("tokenway_rejections_total")
    assert rejections == {(reason,): float(reason is Reason.BODY_TOO_LARGE) for reason in Reason}


def test_removed_endpoints_and_models_lose_their_series(scraped: Scraped) -> None:
    """Only configured labels are scraped; what stays keeps counting, what returns starts anew."""
    for endpoint in (A, B):
        scraped.metrics.observe_decision("m", Algorithm.RANDOM, endpoint, 0.1, None, 0.5, "history")
        scraped.metrics.ejected(endpoint, Word.ONE)
    scraped.metrics.fell_back("c")
    end = Outcome(Ended.COMPLETED, 1.0, A, status=200, ttft_s=0.5)
    scraped.metrics.observe_end(Operation.CHAT, "m", end)

    scraped.metrics.configure(models=["m"], clusters=["c"], endpoints=[A])
    assert B not in scraped.text()
    assert scraped.samples("tokenway_decisions_total") == {("m", "random", A): 1}

    scraped.metrics.observe_end(Operation.CHAT, "m", end)
    assert scraped.value("gen_ai_server_time_to_first_token_seconds_count", **GEN_AI) == 2

    scraped.metrics.configure(models=["n"], clusters=["d"], endpoints=[A])
    assert '"m"' not in scraped.text()
    assert '"c"' not in scraped.text()
    scraped.metrics.observe_end(Operation.CHAT, "n", end)
    assert scraped.samples("gen_ai_server_time_to_first_token_seconds_count") == {("n", "chat"): 1}

    scraped.metrics.configure(models=["m"], clusters=["c"], endpoints=[A])
    scraped.metrics.observe_end(Operation.CHAT, "m", end)
    assert scraped.samples("gen_ai_server_time_to_first_token_seconds_count") == {("m", "chat"): 1}


def test_live_gauges_are_read_at_each_scrape(scraped: Scraped) -> None:
    """Gauges show the state of the moment, without endpoints gone and measurements never made."""
    rows = [
        EndpointGauges(A, "c", True, (1, 0, 2, 3, 0), 4, 5),
        EndpointGauges(B, "c", False, NOTHING, 0, 0, 0.25),
    ]
    summary = CalibrationSummary(9, 0.2, -0.1, 0.3, 0.6)
    live = LiveGauges(
        rows,
        streams_active=7,
        explain_records=9,
        endpoints_left_out=11,
        unlocked_decisions=13,
        tokens_per_byte={"m": 0.25, "x": 1.0},
        calibrations=[
            (("m", "g"), KeyCalibration(summary, None)),
            (("x", "g"), KeyCalibration(summary, summary)),
        ],
    )
    scraped.metrics.watch(lambda: live)
    assert scraped.samples("tokenway_requests_in_flight") == {("c", A): 1, ("c", B): 0}
    assert scraped.samples("tokenway_prefill_tokens_pending") == {("c", A): 2, ("c", B): 0}
    assert scraped.samples("tokenway_context_tokens") == {("c", A): 3, ("c", B): 0}
    assert scraped.samples("tokenway_cached_blocks") == {("c", A): 4, ("c", B): 0}
    assert scraped.samples("tokenway_cache_capacity_blocks") == {("c", A): 5, ("c", B): 0}
    assert scraped.samples("tokenway_endpoint_available") == {("c", A): 1, ("c", B): 0}
    assert scraped.samples("tokenway_endpoint_ttft_ewma_seconds") == {("c", B): 0.25}
    assert scraped.samples("tokenway_prediction_median_relative_error_ratio") == {("m", "g", "ttft"): 0.3}
    assert scraped.samples("tokenway_prediction_bias_seconds") == {("m", "g", "ttft"): -0.1}
    assert scraped.samples("tokenway_prediction_actual_below_ratio") == {("m", "g", "ttft"): 0.6}
    assert scraped.samples("tokenway_tokens_per_byte_ratio") == {("m",): 0.25}
    assert scraped.value("tokenway_streams_active") == 7
    assert scraped.value("tokenway_explain_records") == 9
    assert scraped.value("tokenway_endpoints_left_out") == 11
    assert scraped.value("tokenway_decisions_unlocked_total") == 13
    live = LiveGauges(rows[:1])
    assert scraped.samples("tokenway_endpoint_available") == {("c", A): 1}


def test_plain_events_count_once_each(scraped: Scraped) -> None:
    """Each remaining event method moves exactly its own series."""
    metrics = scraped.metrics
    metrics.fell_back("c")
    metrics.ejected(A, Word.TWO)
    metrics.stream_ended(Word.ONE, Word.TWO)
    metrics.access_log_entry(Word.ONE)
    metrics.access_log_lag(0.02)
    metrics.access_log_entry(Word.ONE)
    metrics.access_log_lag(-0.5)
    metrics.access_log_unmatched()
    metrics.leases_expired(3)
    metrics.handed_over()
    metrics.ads_updated("CDS")
    metrics.ads_refused("EDS")
    assert scraped.samples("tokenway_fallbacks_total") == {("c",): 1}
    assert scraped.samples("tokenway_ejections_total") == {(A, "two"): 1}
    assert scraped.samples("tokenway_stream_endings_total") == {("one", "two"): 1}
    assert scraped.samples("tokenway_access_log_entries_total") == {("one",): 2}
    assert scraped.value("tokenway_access_log_lag_seconds_sum") == 0.02
    assert scraped.value("tokenway_access_log_unmatched_total") == 1
    assert scraped.value("tokenway_lease_expirations_total") == 3
    assert scraped.value("tokenway_handovers_total") == 1
    assert scraped.samples("tokenway_ads_updates_total") == {("CDS",): 1}
    assert scraped.samples("tokenway_ads_nacks_total") == {("EDS",): 1}


def test_a_failed_reload_keeps_the_time_of_the_last_good_one(scraped: Scraped) -> None:
    """Success sets the gauge and the time; a failure clears only the gauge."""
    scraped.metrics.reloaded("tokenway.yaml", 1_000.0)
    assert scraped.value("tokenway_config_last_reload_successful", file="tokenway.yaml") == 1
    scraped.metrics.reload_failed("tokenway.yaml")
    assert scraped.value("tokenway_config_last_reload_successful", file="tokenway.yaml") == 0
    time_s = scraped.value("tokenway_config_last_reload_success_timestamp_seconds", file="tokenway.yaml")
    assert time_s == 1_000.0
    assert scraped.samples("tokenway_reloads_total") == {
        ("tokenway.yaml", "success"): 1,
        ("tokenway.yaml", "failure"): 1,
    }


def test_build_info_names_the_version(scraped: Scraped) -> None:
    """And how it was built: labels of a gauge that is always 1."""
    ((version, _, build),) = scraped.samples("tokenway_build_info")
    assert (version, build) == ("1.2.3", build_kind())


@given(st.lists(st.floats(0.0, 1.0) | st.sampled_from(DECISION_SECONDS.buckets), max_size=30))
def test_buckets_count_values_up_to_and_including_their_bound(values_s: list[float]) -> None:
    """Every bucket equals the number of observations not above its bound; count and sum are exact."""
    scraped = Scraped()
    for value_s in values_s:
        scraped.metrics.observe_decision("m", Algorithm.RANDOM, A, value_s, None, 0.0, "history")
    buckets = scraped.samples("tokenway_decision_seconds_bucket")
    for (bound,), count in buckets.items():
        assert count == sum(value_s <= float(bound) for value_s in values_s)
    assert scraped.value("tokenway_decision_seconds_count") == len(values_s)
    assert scraped.value("tokenway_decision_seconds_sum") == pytest.approx(sum(values_s))


def parsed(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of an exposition by name and labels; fails on a duplicate."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, key
            samples[key] = sample.value
    return samples


def test_merge_keeps_every_sample_under_its_worker() -> None:
    """The merged exposition is valid, groups families, and holds each worker's samples with their values."""
    texts: dict[int, str] = {}
    expected = {}
    for worker in range(3):
        scraped = Scraped()
        for _ in range(worker + 1):
            scraped.metrics.observe_decision("m", Algorithm.RANDOM, A, 0.1, None, 0.5, "history")
            scraped.metrics.handed_over()
        texts[worker] = scraped.text()
        for (name, labels), value in parsed(texts[worker]).items():
            expected[name, labels | {("worker", str(worker))}] = value
    merged = merge(texts)
    assert parsed(merged) == expected
    heads = [line for line in merged.splitlines() if line.startswith("# TYPE")]
    assert heads == [line for line in texts[0].splitlines() if line.startswith("# TYPE")]


@given(st.lists(st.text(), unique=True, min_size=1, max_size=5))
def test_merge_preserves_any_label_value(values: list[str]) -> None:
    """Braces, quotes, spaces, line breaks and separators inside label values survive the merge."""
    registry = CollectorRegistry()
    counter = Counter("things", "With { and } inside.", ["what"], registry=registry)
    for value in values:
        counter.labels(value).inc()
    text = generate_latest(registry).decode()
    expected = {(name, labels | {("worker", "4")}): value for (name, labels), value in parsed(text).items()}
    assert parsed(merge({4: text})) == expected


def test_merge_of_nothing_is_empty_and_headless_samples_are_refused() -> None:
    """No workers give no text; a sample without a family is not silently misplaced."""
    assert merge({}) == ""
    with pytest.raises(ValueError, match="TYPE"):
        merge({0: "lonely 1\n"})
