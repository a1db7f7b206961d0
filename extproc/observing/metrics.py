"""Every Prometheus series of the gateway, in one table and one class.

The table `FAMILIES` is the truth: storage, exposition and `docs/metrics.md` all derive from it.
`Metrics` keeps its own counters and histograms and hands them to prometheus_client when scraped:
one event loop writes them, so they need no lock, and a bisect into a list costs a third of
prometheus_client's `Histogram.observe` (which walks the buckets one by one under a lock).

Label values come from closed enums or from the configuration. A value that is neither (a model a
client made up, an endpoint removed while it still answers) is counted under `other`.

`python -m extproc.observing.metrics` prints the documentation page.
"""

from __future__ import annotations

import platform
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from extproc.errors import Reason
from extproc.observing.family import Family, Kind
from extproc.observing.shared_metrics import FAMILIES as SHARED_FAMILIES
from extproc.predicting.predictor import KeyCalibration, ModelKey
from extproc.values.balancing import Algorithm
from extproc.values.decisions import HoldEnding, HoldReason
from extproc.values.outcomes import Ended, Outcome
from extproc.values.requests import Operation
from metadata_center.types import EndpointKey

OTHER = "other"
"""The label value of whatever the configuration does not name."""


def _doubling(first: float, count: int) -> tuple[float, ...]:
    return tuple(first * 2**power for power in range(count))


# OpenTelemetry semantic conventions for generative AI, "Metrics", `gen_ai.client.token.usage`: 4^0 .. 4^13.
_TOKEN_BUCKETS = tuple(float(4**power) for power in range(14))
# Same page, `gen_ai.server.request.duration` (10 ms .. 82 s), doubled three more times: long generations.
_DURATION_BUCKETS = tuple(round(bound, 2) for bound in _doubling(0.01, 17))
# Same page, `gen_ai.server.time_to_first_token` ends at 10 s; a queue in front of a cold prefill is longer.
_OTEL_TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
_TTFT_BUCKETS = (*_OTEL_TTFT_BUCKETS, 20.0, 40.0, 60.0, 120.0)
# Same page, `gen_ai.server.time_per_output_token`.
_TPOT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
# 10 us (a decision over a handful of endpoints) to 82 ms (long enough to have stalled every stream).
_DECISION_BUCKETS = tuple(round(bound, 6) for bound in _doubling(0.00001, 14))
# From one engine step to twice the longest wait by default.
_HOLD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# A chosen inference_lb score is mostly within -4..2 under the default weights (`policies.inference_lb`);
# least_request and prefix_cache count in requests and blocks.
_SCORE_STEPS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 10.0, 30.0, 100.0)
_SCORE_BUCKETS = (*(-step for step in reversed(_SCORE_STEPS)), 0.0, *_SCORE_STEPS)
_RATIO_BUCKETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# A prediction off by 10 ms does not change a choice; one off by a minute is a different engine.
_ERROR_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RELATIVE_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
# 16 tokens is vLLM's default block; 131,072 a long context.
_CACHED_ERROR_BUCKETS = (0.0, *_doubling(16.0, 14))
# Envoy's access log service flushes every second by default (`buffer_flush_interval`).
_LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def _closed(values: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((str(value),) for value in values)


_GEN_AI = ("gen_ai_request_model", "gen_ai_operation_name")
_STATUS_CLASSES = {None: "none", 1: "1xx", 2: "2xx", 3: "3xx", 4: "4xx", 5: "5xx"}

TOKEN_USAGE = Family(
    "gen_ai_client_token_usage",
    Kind.HISTOGRAM,
    "Tokens of one answered request as its engine counted them, by type: `input` (the prompt), `output`, "
    "and `cached`, the part of `input` taken from the prefix cache.",
    ("gen_ai_token_type", *_GEN_AI),
    _TOKEN_BUCKETS,
)
REQUEST_DURATION = Family(
    "gen_ai_server_request_duration_seconds",
    Kind.HISTOGRAM,
    "From the first byte of the request to the last byte of the answer, as Envoy saw it; `error_type` is "
    "empty for a completed request, else how it ended.",
    (*_GEN_AI, "error_type"),
    _DURATION_BUCKETS,
)
TIME_TO_FIRST_TOKEN = Family(
    "gen_ai_server_time_to_first_token_seconds",
    Kind.HISTOGRAM,
    "From the request, the time it was held included, to the first byte of a streamed, completed answer.",
    _GEN_AI,
    _TTFT_BUCKETS,
)
TIME_PER_OUTPUT_TOKEN = Family(
    "gen_ai_server_time_per_output_token_seconds",
    Kind.HISTOGRAM,
    "Mean time between output tokens after the first, of a streamed, completed answer.",
    _GEN_AI,
    _TPOT_BUCKETS,
)
REQUESTS = Family(
    "tokenway_requests_total",
    Kind.COUNTER,
    "Requests that ended, by the class of the status the client saw (`none`: it saw none) and how.",
    ("model", "status_class", "outcome"),
)
REJECTIONS = Family(
    "tokenway_rejections_total",
    Kind.COUNTER,
    "Requests the gateway refused itself, by error code.",
    ("reason",),
    start=_closed(Reason),
)
DECISIONS = Family(
    "tokenway_decisions_total",
    Kind.COUNTER,
    "Endpoint choices, by the endpoint named first.",
    ("model", "algorithm", "endpoint"),
)
DECISION_SECONDS = Family(
    "tokenway_decision_seconds",
    Kind.HISTOGRAM,
    "From the whole request body to the decision.",
    buckets=_DECISION_BUCKETS,
)
HELD = Family(
    "tokenway_held_requests",
    Kind.GAUGE,
    "Requests that wait here now, by what their endpoint is short of: time for `prefill`, room in its "
    "`kv_cache`, or `seats` (it runs as many at once as it can).",
    ("reason",),
)
HOLDS = Family(
    "tokenway_holds_total",
    Kind.COUNTER,
    "Requests that had to wait here, by what their endpoint was short of at first.",
    ("model", "reason"),
)
HOLD_SECONDS = Family(
    "tokenway_hold_seconds",
    Kind.HISTOGRAM,
    "How long requests waited here that did; `ending` says whether they were `placed`, `refused` with status "
    "429, or their client had `gone`.",
    ("model", "ending"),
    _HOLD_BUCKETS,
)
SCORE = Family(
    "tokenway_score",
    Kind.HISTOGRAM,
    "Score of the chosen endpoint; higher is better. Policies without scores leave none. Scores may be "
    "negative, so there is no `_sum`, and `_count` is the `+Inf` bucket.",
    ("algorithm",),
    _SCORE_BUCKETS,
)
MATCH_RATIO = Family(
    "tokenway_match_ratio",
    Kind.HISTOGRAM,
    "Share of the prompt's blocks the chosen endpoint is believed to have cached.",
    ("model",),
    _RATIO_BUCKETS,
)
CACHE_VIEWS = Family(
    "tokenway_cache_views_total",
    Kind.COUNTER,
    "Decisions by the view that told what the chosen endpoint has cached: `announced` by the engine's KV "
    "events, `history` of what was routed there, `running` prompts of requests in flight.",
    ("view",),
    start=_closed(("announced", "history", "running")),
)
FALLBACKS = Family(
    "tokenway_fallbacks_total",
    Kind.COUNTER,
    "Requests answered by another endpoint than the one named first.",
    ("cluster",),
)
USAGE_UNKNOWN = Family(
    "tokenway_usage_unknown_total",
    Kind.COUNTER,
    "Completed answers whose token usage is unknown, so that nothing was learned from it: `absent` where the "
    "engine told none, or neither within 16 KiB of its end nor of its beginning; `encoded` where the answer "
    "was compressed.",
    ("model", "reason"),
)
TTFT_ERROR = Family(
    "tokenway_ttft_prediction_error_seconds",
    Kind.HISTOGRAM,
    "Distance between predicted and actual time to first token; `side` says whether the token came `early` "
    "or `late`.",
    ("model", "side"),
    _ERROR_BUCKETS,
)
TTFT_RELATIVE_ERROR = Family(
    "tokenway_ttft_prediction_relative_error_ratio",
    Kind.HISTOGRAM,
    "The same distance divided by the actual time to first token.",
    ("model", "side"),
    _RELATIVE_BUCKETS,
)
CACHED_TOKENS_ERROR = Family(
    "tokenway_cached_tokens_error_tokens",
    Kind.HISTOGRAM,
    "Distance between the cached tokens expected and those the engine reported; `side` is `over` if the "
    "engine had fewer than expected, else `under`.",
    ("model", "side"),
    _CACHED_ERROR_BUCKETS,
)
REQUESTS_IN_FLIGHT = Family(
    "tokenway_requests_in_flight",
    Kind.GAUGE,
    "Requests charged to the endpoint now.",
    ("cluster", "endpoint"),
)
PREFILL_PENDING = Family(
    "tokenway_prefill_tokens_pending",
    Kind.GAUGE,
    "Uncached prompt tokens charged to the endpoint and not yet known to be prefilled.",
    ("cluster", "endpoint"),
)
CONTEXT_TOKENS = Family(
    "tokenway_context_tokens",
    Kind.GAUGE,
    "Prompt tokens of the requests in flight at the endpoint.",
    ("cluster", "endpoint"),
)
CACHED_BLOCKS = Family(
    "tokenway_cached_blocks",
    Kind.GAUGE,
    "Blocks the prefix index believes the endpoint holds.",
    ("cluster", "endpoint"),
)
CAPACITY_BLOCKS = Family(
    "tokenway_cache_capacity_blocks",
    Kind.GAUGE,
    "Blocks the prefix index allows the endpoint before it forgets the oldest.",
    ("cluster", "endpoint"),
)
ENDPOINT_AVAILABLE = Family(
    "tokenway_endpoint_available",
    Kind.GAUGE,
    "1 if the endpoint may be chosen, 0 if it is ejected or draining.",
    ("cluster", "endpoint"),
)
ENDPOINT_ANNOUNCING = Family(
    "tokenway_endpoint_announcing",
    Kind.GAUGE,
    "1 while the endpoint's own KV events say what it has cached, 0 while routing history does.",
    ("cluster", "endpoint"),
)
TTFT_EWMA = Family(
    "tokenway_endpoint_ttft_ewma_seconds",
    Kind.GAUGE,
    "Moving average of the endpoint's time to first token; absent until one was seen.",
    ("cluster", "endpoint"),
)
PREDICTION_RELATIVE_ERROR = Family(
    "tokenway_prediction_median_relative_error_ratio",
    Kind.GAUGE,
    "Median distance between predicted and actual, over the actual, of the last 256 predictions; `target` is "
    "`ttft` or `tpot`, `group` the endpoint group that shares the model.",
    ("model", "group", "target"),
)
PREDICTION_BIAS = Family(
    "tokenway_prediction_bias_seconds",
    Kind.GAUGE,
    "Decayed mean of predicted minus actual: above zero the predictor is too pessimistic.",
    ("model", "group", "target"),
)
PREDICTION_BELOW = Family(
    "tokenway_prediction_actual_below_ratio",
    Kind.GAUGE,
    "Share of actuals that came in below their prediction; 0.5 is a calibrated median.",
    ("model", "group", "target"),
)
TOKENS_PER_BYTE = Family(
    "tokenway_tokens_per_byte_ratio",
    Kind.GAUGE,
    "Learned tokens per prompt byte; the estimate behind every token count before the engine's own.",
    ("model",),
)
EJECTIONS = Family(
    "tokenway_ejections_total",
    Kind.COUNTER,
    "Times the endpoint stopped being chosen, by cause.",
    ("endpoint", "reason"),
)
ENDPOINT_FAILURES = Family(
    "tokenway_endpoint_failures_total",
    Kind.COUNTER,
    "Requests that failed at the endpoint, by kind; one that several failed at counts at each.",
    ("endpoint", "kind"),
)
ENDPOINT_DOUBTED = Family(
    "tokenway_endpoint_doubted",
    Kind.GAUGE,
    "Models for which the endpoint is left out of the choice: it fails more than its peers, or lacks them.",
    ("cluster", "endpoint"),
)
EJECTIONS_WITHHELD = Family(
    "tokenway_ejections_withheld_total",
    Kind.COUNTER,
    "Failures that would have ejected an endpoint, but for `health.min_available_ratio`.",
)
POISON_REQUESTS = Family(
    "tokenway_poison_requests_total",
    Kind.COUNTER,
    "Requests that several endpoints failed at: evidence against none of them.",
)
STREAMS_ACTIVE = Family(
    "tokenway_streams_active", Kind.GAUGE, "ext_proc streams open now; one per request in Envoy."
)
STREAM_ENDINGS = Family(
    "tokenway_stream_endings_total",
    Kind.COUNTER,
    "ext_proc streams that ended, by the phase reached and how.",
    ("phase", "how"),
)
ACCESS_LOG_LAG = Family(
    "tokenway_access_log_lag_seconds",
    Kind.HISTOGRAM,
    "From the end of a request to the arrival of its access log entry, the oldest of each batch; load is "
    "held that much too long.",
    buckets=_LAG_BUCKETS,
)
ACCESS_LOG_ENTRIES = Family(
    "tokenway_access_log_entries_total", Kind.COUNTER, "Access log entries received, by kind.", ("kind",)
)
ACCESS_LOG_UNMATCHED = Family(
    "tokenway_access_log_unmatched_total",
    Kind.COUNTER,
    "Access log entries of requests this process neither holds nor can hand over.",
)
LEASE_EXPIRATIONS = Family(
    "tokenway_lease_expirations_total",
    Kind.COUNTER,
    "Charges released because no end was reported in time; a steady rate means lost access logs.",
)
HANDOVERS = Family(
    "tokenway_handovers_total",
    Kind.COUNTER,
    "Access log entries handed to the worker that made the decision.",
)
BUS_DROPPED = Family(
    "tokenway_bus_dropped_total",
    Kind.COUNTER,
    "Messages to another worker that were dropped because it was away or did not keep up.",
)
ADS_UPDATES = Family(
    "tokenway_ads_updates_total",
    Kind.COUNTER,
    "Discovery responses sent to Envoy, by resource type.",
    ("type",),
)
ADS_NACKS = Family(
    "tokenway_ads_nacks_total",
    Kind.COUNTER,
    "Discovery responses Envoy refused, by resource type.",
    ("type",),
)
RELOADS = Family(
    "tokenway_reloads_total",
    Kind.COUNTER,
    "Attempts to load a changed file; `failure` leaves the previous content in force.",
    ("file", "result"),
)
RELOAD_SUCCESSFUL = Family(
    "tokenway_config_last_reload_successful",
    Kind.GAUGE,
    "1 if the file can be used as it is now, else 0: what was good before stays in force. Series are those "
    "of the files that are needed now.",
    ("file",),
)
RELOAD_TIME = Family(
    "tokenway_config_last_reload_success_timestamp_seconds",
    Kind.GAUGE,
    "Unix time the content now in force was loaded.",
    ("file",),
)
HOST_NAME_RESOLVED = Family(
    "tokenway_host_name_resolved",
    Kind.GAUGE,
    "1 if the last look-up of a host name in the clusters file gave an address, else 0: it then keeps the "
    "addresses it had, if any.",
    ("name",),
)
EXPLAIN_RECORDS = Family(
    "tokenway_explain_records", Kind.GAUGE, "Decisions held for `tokenway explain`; bounded by configuration."
)
BUILD_INFO = Family("tokenway_build_info", Kind.GAUGE, "Always 1.", ("version", "python"))

FAMILIES: tuple[Family, ...] = (
    TOKEN_USAGE,
    REQUEST_DURATION,
    TIME_TO_FIRST_TOKEN,
    TIME_PER_OUTPUT_TOKEN,
    REQUESTS,
    REJECTIONS,
    DECISIONS,
    DECISION_SECONDS,
    HELD,
    HOLDS,
    HOLD_SECONDS,
    SCORE,
    MATCH_RATIO,
    CACHE_VIEWS,
    FALLBACKS,
    USAGE_UNKNOWN,
    TTFT_ERROR,
    TTFT_RELATIVE_ERROR,
    CACHED_TOKENS_ERROR,
    REQUESTS_IN_FLIGHT,
    PREFILL_PENDING,
    CONTEXT_TOKENS,
    CACHED_BLOCKS,
    CAPACITY_BLOCKS,
    ENDPOINT_AVAILABLE,
    ENDPOINT_ANNOUNCING,
    TTFT_EWMA,
    PREDICTION_RELATIVE_ERROR,
    PREDICTION_BIAS,
    PREDICTION_BELOW,
    TOKENS_PER_BYTE,
    EJECTIONS,
    ENDPOINT_FAILURES,
    ENDPOINT_DOUBTED,
    EJECTIONS_WITHHELD,
    POISON_REQUESTS,
    STREAMS_ACTIVE,
    STREAM_ENDINGS,
    ACCESS_LOG_LAG,
    ACCESS_LOG_ENTRIES,
    ACCESS_LOG_UNMATCHED,
    LEASE_EXPIRATIONS,
    HANDOVERS,
    BUS_DROPPED,
    ADS_UPDATES,
    ADS_NACKS,
    RELOADS,
    RELOAD_SUCCESSFUL,
    RELOAD_TIME,
    HOST_NAME_RESOLVED,
    EXPLAIN_RECORDS,
    *SHARED_FAMILIES,
    BUILD_INFO,
)


@dataclass(frozen=True, slots=True)
class EndpointGauges:
    """What a scrape shows of one endpoint; the fields mean what the families of the same name say."""

    key: EndpointKey
    cluster: str
    available: bool
    requests: int
    prefill_tokens: int
    context_tokens: int
    cached_blocks: int
    capacity_blocks: int
    ttft_ewma_s: float | None = None
    announcing: bool = False
    doubted: int = 0


@dataclass(frozen=True, slots=True)
class LiveGauges:
    """State read when scraped rather than counted as it changes.

    Attributes:
        endpoints: Every endpoint configured now.
        streams_active: Open ext_proc streams.
        explain_records: Decision records held.
        held: Requests that wait, by reason.
        tokens_per_byte: Learned ratio by model; configured models only are shown.
        calibrations: How good predictions have been, by model and endpoint group.
        bus_dropped: Messages to other workers dropped so far.
        shared: What is told of other gateways and of engines' announcements (`shared_metrics.values`).
        files: Each configuration file that is needed: is it good? None shows the last attempts.
        host_names: Each host name in use: did its last look-up give an address?
        ejections_withheld: By the floor so far.
    """

    endpoints: Iterable[EndpointGauges] = ()
    streams_active: int = 0
    explain_records: int = 0
    held: Mapping[HoldReason, int] = field(default_factory=dict)
    tokens_per_byte: Mapping[str, float] = field(default_factory=dict)
    calibrations: Iterable[tuple[ModelKey, KeyCalibration]] = ()
    bus_dropped: int = 0
    shared: Mapping[Family, Mapping[tuple[str, ...], float]] = field(default_factory=dict)
    files: Mapping[str, bool] | None = None
    host_names: Mapping[str, bool] = field(default_factory=dict)
    ejections_withheld: int = 0


class _Histogram:
    """Counts per bucket and their sum, for one set of label values."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value` in the first bucket whose bound is not below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' form: (bound, observations up to it) ascending with +Inf last, and the sum."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(repr, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets, self._sum


class _Histograms(dict[tuple[str, ...], _Histogram]):
    """The histograms of one family by label values, made when first used."""

    __slots__ = ("_bounds",)

    def __init__(self, bounds: tuple[float, ...]) -> None:
        super().__init__()
        self._bounds = bounds

    def __missing__(self, labels: tuple[str, ...]) -> _Histogram:
        made = self[labels] = _Histogram(self._bounds)
        return made


class _Ends:
    """The histograms one model and operation's requests end in, looked up once instead of per request."""

    __slots__ = (
        "cached",
        "cached_over",
        "cached_under",
        "completed",
        "early",
        "early_ratio",
        "input",
        "late",
        "late_ratio",
        "output",
        "tpot",
        "ttft",
    )

    def __init__(self, of: Mapping[Family, _Histograms], model: str, operation: str) -> None:
        gen_ai = (model, operation)
        self.input = of[TOKEN_USAGE]["input", *gen_ai]
        self.output = of[TOKEN_USAGE]["output", *gen_ai]
        self.cached = of[TOKEN_USAGE]["cached", *gen_ai]
        self.completed = of[REQUEST_DURATION][*gen_ai, ""]
        self.ttft = of[TIME_TO_FIRST_TOKEN][gen_ai]
        self.tpot = of[TIME_PER_OUTPUT_TOKEN][gen_ai]
        self.early = of[TTFT_ERROR][model, "early"]
        self.late = of[TTFT_ERROR][model, "late"]
        self.early_ratio = of[TTFT_RELATIVE_ERROR][model, "early"]
        self.late_ratio = of[TTFT_RELATIVE_ERROR][model, "late"]
        self.cached_over = of[CACHED_TOKENS_ERROR][model, "over"]
        self.cached_under = of[CACHED_TOKENS_ERROR][model, "under"]


class Metrics(Collector):
    """Counts events as they happen and shows them, with the live gauges, when `registry` is scraped.

    Written to from one event loop; a scrape may come from it or from another thread.

    Args:
        registry: Where to appear; nothing touches prometheus_client's global registry.
        version: The package version, for `tokenway_build_info`.
    """

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        self._values: dict[Family, defaultdict[tuple[str, ...], float]] = {}
        self._histograms: dict[Family, _Histograms] = {}
        for family in FAMILIES:
            if family.kind is Kind.HISTOGRAM:
                histograms = self._histograms[family] = _Histograms(family.buckets)
                if not family.labels:
                    histograms[()]  # an unlabelled series exists, at zero, from the start
            else:
                start = family.start if family.labels else ((),)
                self._values[family] = defaultdict(float, dict.fromkeys(start, 0.0))
        self._values[BUILD_INFO][version, platform.python_version()] = 1.0
        self._models: frozenset[str] = frozenset()
        self._clusters: frozenset[str] = frozenset()
        self._endpoints: frozenset[str] = frozenset()
        self._ends: dict[tuple[str, str], _Ends] = {}
        self._live: Callable[[], LiveGauges] = LiveGauges
        self._decisions = self._values[DECISIONS]
        self._requests = self._values[REQUESTS]
        self._decision_seconds = self._histograms[DECISION_SECONDS][()]
        self._scores = self._histograms[SCORE]
        self._match_ratios = self._histograms[MATCH_RATIO]
        self._views = self._values[CACHE_VIEWS]
        registry.register(self)

    def watch(self, live: Callable[[], LiveGauges]) -> None:
        """Read the gauges from `live` at each scrape; it may be called from the scraping thread."""
        self._live = live

    def configure(
        self, *, models: Iterable[str], clusters: Iterable[str], endpoints: Iterable[EndpointKey]
    ) -> None:
        """Name the label values in use; series of any other model, cluster or endpoint are dropped."""
        self._models = frozenset(models)
        self._clusters = frozenset(clusters)
        self._endpoints = frozenset(str(endpoint) for endpoint in endpoints)
        bounded = {
            "model": self._models,
            "gen_ai_request_model": self._models,
            "cluster": self._clusters,
            "endpoint": self._endpoints,
        }
        stores: list[tuple[Family, dict[tuple[str, ...], float] | _Histograms]] = [
            *self._values.items(),
            *self._histograms.items(),
        ]
        for family, series in stores:
            known = [bounded.get(label) for label in family.labels]
            for labels in list(series):
                if any(
                    allowed is not None and value != OTHER and value not in allowed
                    for value, allowed in zip(labels, known, strict=True)
                ):
                    del series[labels]
        self._ends.clear()

    def observe_decision(
        self,
        model: str,
        algorithm: Algorithm,
        endpoint: EndpointKey,
        decision_s: float,
        score: float | None,
        match_ratio: float,
        view: str,
    ) -> None:
        """Count one choice.

        Args:
            model: The client's model.
            algorithm: The policy that chose.
            endpoint: Named first.
            decision_s: Seconds from the whole body to the decision.
            score: Of the chosen endpoint; None for policies without scores.
            match_ratio: Cached share of the prompt's blocks at the chosen endpoint, 0..1.
            view: Who told that.
        """
        if model not in self._models:
            model = OTHER
        self._decisions[model, algorithm, endpoint if endpoint in self._endpoints else OTHER] += 1
        self._decision_seconds.observe(decision_s)
        if score is not None:
            self._scores[algorithm,].observe(score)
        self._match_ratios[model,].observe(match_ratio)
        self._views[view,] += 1

    def held(self, model: str, reason: HoldReason) -> None:
        """Count one request that has to wait."""
        self._values[HOLDS][model if model in self._models else OTHER, reason] += 1

    def hold_ended(self, model: str, ending: HoldEnding, held_s: float) -> None:
        """Count the end of one wait."""
        labels = (model if model in self._models else OTHER, ending)
        self._histograms[HOLD_SECONDS][labels].observe(held_s)

    def observe_end(self, operation: Operation, model: str, outcome: Outcome, held_s: float = 0.0) -> None:
        """Count one request that was sent upstream and ended, with all it tells about our predictions.

        Args:
            operation: What was asked for.
            model: The client's model.
            outcome: How it ended.
            held_s: How long it waited here before it was sent.
        """
        if model not in self._models:
            model = OTHER
        ends = self._ends.get((model, operation))
        if ends is None:
            ends = self._ends[model, operation] = _Ends(self._histograms, model, operation)
        ended = outcome.ended
        status = outcome.status
        status_class = _STATUS_CLASSES.get(status if status is None else status // 100, OTHER)
        self._requests[model, status_class, ended] += 1
        prompt_tokens, completion_tokens = outcome.prompt_tokens, outcome.completion_tokens
        cached_tokens = outcome.cached_tokens
        if prompt_tokens is not None:
            ends.input.observe(prompt_tokens)
        if completion_tokens is not None:
            ends.output.observe(completion_tokens)
        if cached_tokens is not None:
            ends.cached.observe(cached_tokens)
            expected_tokens = outcome.predicted_cached_tokens
            if expected_tokens is not None:
                if expected_tokens > cached_tokens:
                    ends.cached_over.observe(expected_tokens - cached_tokens)
                else:
                    ends.cached_under.observe(cached_tokens - expected_tokens)
        if ended is not Ended.COMPLETED:
            self._histograms[REQUEST_DURATION][model, operation, ended].observe(outcome.duration_s)
            return
        ends.completed.observe(outcome.duration_s)
        ttft_s = outcome.ttft_s
        if ttft_s is None:
            return
        first_s = held_s + ttft_s
        ends.ttft.observe(first_s)
        if completion_tokens is not None and completion_tokens > 1:
            ends.tpot.observe((outcome.duration_s - first_s) / (completion_tokens - 1))
        predicted_s = outcome.predicted_ttft_s
        if predicted_s is not None and ttft_s > 0:
            if ttft_s < predicted_s:
                ends.early.observe(predicted_s - ttft_s)
                ends.early_ratio.observe((predicted_s - ttft_s) / ttft_s)
            else:
                ends.late.observe(ttft_s - predicted_s)
                ends.late_ratio.observe((ttft_s - predicted_s) / ttft_s)

    def rejected(self, reason: Reason, model: str, status: int) -> None:
        """Count one request the gateway refused itself."""
        self._values[REJECTIONS][reason,] += 1
        labels = (model if model in self._models else OTHER, _STATUS_CLASSES[status // 100], Ended.REJECTED)
        self._requests[labels] += 1

    def fell_back(self, cluster: str) -> None:
        """Count one request answered by another endpoint than the one named first."""
        self._values[FALLBACKS][cluster if cluster in self._clusters else OTHER,] += 1

    def usage_unknown(self, model: str, reason: str) -> None:
        """Count one completed answer without usage; `reason` is `absent` or `encoded`."""
        self._values[USAGE_UNKNOWN][model if model in self._models else OTHER, reason] += 1

    def ejected(self, endpoint: EndpointKey, reason: StrEnum) -> None:
        """Count one ejection."""
        self._values[EJECTIONS][endpoint if endpoint in self._endpoints else OTHER, reason] += 1

    def endpoint_failed(self, endpoint: EndpointKey, kind: StrEnum) -> None:
        """Count one request that failed at an endpoint."""
        self._values[ENDPOINT_FAILURES][endpoint if endpoint in self._endpoints else OTHER, kind] += 1

    def poison(self) -> None:
        """Count one request that several endpoints failed at."""
        self._values[POISON_REQUESTS][()] += 1

    def stream_ended(self, phase: StrEnum, how: StrEnum) -> None:
        """Count one closed ext_proc stream."""
        self._values[STREAM_ENDINGS][phase, how] += 1

    def access_log_entry(self, kind: StrEnum) -> None:
        """Count one access log entry."""
        self._values[ACCESS_LOG_ENTRIES][kind,] += 1

    def access_log_lag(self, lag_s: float) -> None:
        """Note that the oldest entry of a batch arrived `lag_s` after its request ended."""
        self._histograms[ACCESS_LOG_LAG][()].observe(max(0.0, lag_s))

    def access_log_unmatched(self) -> None:
        """Count one access log entry that belongs to no request known here."""
        self._values[ACCESS_LOG_UNMATCHED][()] += 1

    def leases_expired(self, count: int) -> None:
        """Count charges released because no end was reported."""
        self._values[LEASE_EXPIRATIONS][()] += count

    def handed_over(self) -> None:
        """Count one access log entry given to the worker that decided."""
        self._values[HANDOVERS][()] += 1

    def ads_updated(self, resource_type: str) -> None:
        """Count one discovery response sent; `resource_type` is short ("CDS", "EDS")."""
        self._values[ADS_UPDATES][resource_type,] += 1

    def ads_refused(self, resource_type: str) -> None:
        """Count one discovery response Envoy refused."""
        self._values[ADS_NACKS][resource_type,] += 1

    def reloaded(self, file: str, now_unix_s: float) -> None:
        """Count one successful load of a configuration file, named without its directory."""
        self._values[RELOADS][file, "success"] += 1
        self._values[RELOAD_SUCCESSFUL][file,] = 1.0
        self._values[RELOAD_TIME][file,] = now_unix_s

    def reload_failed(self, file: str) -> None:
        """Count one load that failed; the previous content stays in force."""
        self._values[RELOADS][file, "failure"] += 1
        self._values[RELOAD_SUCCESSFUL][file,] = 0.0

    def describe(self) -> Iterator[Metric]:
        """Names only: lets the registry refuse duplicates without reading live state."""
        for family in FAMILIES:
            yield _exposed(family)

    def collect(self) -> Iterator[Metric]:
        """Every family in the table's order, the live gauges read now."""
        live = self._live_values()
        for family in FAMILIES:
            metric = _exposed(family)
            if isinstance(metric, HistogramMetricFamily):
                for labels, histogram in list(self._histograms[family].items()):
                    buckets, total = histogram.cumulative()
                    metric.add_metric(labels, buckets, total)
            else:
                values = live[family] if family in live else self._values[family]
                for labels, value in list(values.items()):
                    metric.add_metric(labels, value)
            yield metric

    def _live_values(self) -> dict[Family, dict[tuple[str, ...], float]]:
        live = self._live()
        values: dict[Family, dict[tuple[str, ...], float]] = {
            STREAMS_ACTIVE: {(): live.streams_active},
            EXPLAIN_RECORDS: {(): live.explain_records},
            HELD: {(reason,): count for reason, count in live.held.items()},
            BUS_DROPPED: {(): live.bus_dropped},
            EJECTIONS_WITHHELD: {(): live.ejections_withheld},
            TOKENS_PER_BYTE: {
                (model,): ratio for model, ratio in live.tokens_per_byte.items() if model in self._models
            },
        }
        values.update({family: dict(series) for family, series in live.shared.items()})
        values[HOST_NAME_RESOLVED] = {(name,): has for name, has in live.host_names.items()}
        if live.files is not None:
            values[RELOAD_SUCCESSFUL] = {(file,): is_good for file, is_good in live.files.items()}
            times = self._values[RELOAD_TIME]
            values[RELOAD_TIME] = {(file,): times[file,] for file in live.files if (file,) in times}
        rows = list(live.endpoints)
        columns: dict[Family, Callable[[EndpointGauges], float | None]] = {
            REQUESTS_IN_FLIGHT: lambda row: row.requests,
            PREFILL_PENDING: lambda row: row.prefill_tokens,
            CONTEXT_TOKENS: lambda row: row.context_tokens,
            CACHED_BLOCKS: lambda row: row.cached_blocks,
            CAPACITY_BLOCKS: lambda row: row.capacity_blocks,
            ENDPOINT_AVAILABLE: lambda row: row.available,
            ENDPOINT_ANNOUNCING: lambda row: row.announcing,
            ENDPOINT_DOUBTED: lambda row: row.doubted,
            TTFT_EWMA: lambda row: row.ttft_ewma_s,
        }
        for family, read in columns.items():
            values[family] = {
                (row.cluster, row.key): value for row in rows if (value := read(row)) is not None
            }
        for family in (PREDICTION_RELATIVE_ERROR, PREDICTION_BIAS, PREDICTION_BELOW):
            values[family] = {}
        for (model, group), calibration in live.calibrations:
            for target, summary in (("ttft", calibration.ttft), ("tpot", calibration.tpot)):
                if summary is not None and model in self._models:
                    labels = (model, group, target)
                    values[PREDICTION_RELATIVE_ERROR][labels] = summary.median_relative_error_ratio
                    values[PREDICTION_BIAS][labels] = summary.mean_error_s
                    values[PREDICTION_BELOW][labels] = summary.below_ratio
        return values


def _exposed(family: Family) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    if family.kind is Kind.COUNTER:
        return CounterMetricFamily(family.name, family.doc, labels=family.labels)
    if family.kind is Kind.GAUGE:
        return GaugeMetricFamily(family.name, family.doc, labels=family.labels)
    return HistogramMetricFamily(family.name, family.doc, labels=family.labels)


def document() -> str:
    """The text of `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m extproc.observing.metrics > docs/metrics.md`; edit the table there.",
        "",
        "Label values come from closed enums or from the configuration; anything else is counted under "
        f"`{OTHER}`. Series of removed endpoints, clusters and models disappear with the next reload. With "
        "several workers every series carries a `worker` label.",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        lines.append(f"| `{family.name}` | {family.kind} | {labels} | {family.doc} |")
    lines += ["", "## Buckets", "", "| histogram | upper bounds |", "|---|---|"]
    for family in FAMILIES:
        if family.buckets:
            bounds = ", ".join(f"{bound:g}" for bound in family.buckets)
            lines.append(f"| `{family.name}` | {bounds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
