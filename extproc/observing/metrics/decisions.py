"""Series of choices: the endpoint, how long the decision took, on what grounds, and waits before it."""

from __future__ import annotations

from extproc.observing.metrics.family import Family, MetricType, closed, doubling

# 10 us (a decision over a handful of endpoints) to 82 ms (long enough to have stalled every stream).
_DECISION_BUCKETS = tuple(round(bound, 6) for bound in doubling(0.00001, 14))
# From one engine step to twice the longest wait by default.
_HOLD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# A chosen inference_lb score is mostly within -4..2 under the default weights (`policies.inference_lb`);
# least_request and prefix_cache count in requests and blocks.
_SCORE_STEPS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 10.0, 30.0, 100.0)
_SCORE_BUCKETS = (*(-step for step in reversed(_SCORE_STEPS)), 0.0, *_SCORE_STEPS)
_RATIO_BUCKETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

DECISIONS = Family(
    "tokenway_decisions_total",
    MetricType.COUNTER,
    "Endpoint choices, by the endpoint named first.",
    ("model", "algorithm", "endpoint"),
)
DECISION_SECONDS = Family(
    "tokenway_decision_seconds",
    MetricType.HISTOGRAM,
    "From the whole request body to the decision.",
    buckets=_DECISION_BUCKETS,
)
UNLOCKED_DECISIONS = Family(
    "tokenway_decisions_unlocked_total",
    MetricType.COUNTER,
    "Decisions, those to wait included, made without the lock of the counters that workers share, because "
    "the worker that held it did not go on for 50 ms: two of them may have met at one endpoint.",
)
HELD = Family(
    "tokenway_held_requests",
    MetricType.GAUGE,
    "Requests that wait here now, by what their endpoint is short of: time for `prefill`, room in its "
    "`kv_cache`, or `max_num_seqs` (it runs as many at once as it can).",
    ("reason",),
)
HOLDS = Family(
    "tokenway_holds_total",
    MetricType.COUNTER,
    "Requests that had to wait here, by what their endpoint was short of at first.",
    ("model", "reason"),
)
HOLD_SECONDS = Family(
    "tokenway_hold_seconds",
    MetricType.HISTOGRAM,
    "How long requests waited here that did; `ending` says whether they were `placed`, `refused` with status "
    "429, or their client had `gone`.",
    ("model", "ending"),
    _HOLD_BUCKETS,
)
SCORE = Family(
    "tokenway_score",
    MetricType.HISTOGRAM,
    "Score of the chosen endpoint; higher is better. Policies without scores leave none. Scores may be "
    "negative, so there is no `_sum`, and `_count` is the `+Inf` bucket.",
    ("algorithm",),
    _SCORE_BUCKETS,
)
MATCH_RATIO = Family(
    "tokenway_match_ratio",
    MetricType.HISTOGRAM,
    "Share of the prompt's blocks the chosen endpoint is believed to have cached.",
    ("model",),
    _RATIO_BUCKETS,
)
CACHE_VIEWS = Family(
    "tokenway_cache_views_total",
    MetricType.COUNTER,
    "Decisions by the view that said what the chosen endpoint has cached: `announced` by the engine's KV "
    "events, `history` of what was routed there, `running` prompts of requests in flight.",
    ("view",),
    start=closed(("announced", "history", "running")),
)
FALLBACKS = Family(
    "tokenway_fallbacks_total",
    MetricType.COUNTER,
    "Requests answered by another endpoint than the one named first.",
    ("cluster",),
)

FAMILIES: tuple[Family, ...] = (
    DECISIONS,
    DECISION_SECONDS,
    UNLOCKED_DECISIONS,
    HELD,
    HOLDS,
    HOLD_SECONDS,
    SCORE,
    MATCH_RATIO,
    CACHE_VIEWS,
    FALLBACKS,
)
