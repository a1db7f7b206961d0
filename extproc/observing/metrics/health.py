"""Series of failures and of what they lead to."""

from __future__ import annotations

from extproc.observing.metrics.family import Family, MetricType

EJECTIONS = Family(
    "tokenway_ejections_total",
    MetricType.COUNTER,
    "Times the endpoint stopped being chosen, by cause.",
    ("endpoint", "reason"),
)
ENDPOINT_FAILURES = Family(
    "tokenway_endpoint_failures_total",
    MetricType.COUNTER,
    "Requests that failed at the endpoint, by kind; one that several failed at counts at each.",
    ("endpoint", "kind"),
)
ENDPOINT_DOUBTED = Family(
    "tokenway_endpoint_doubted",
    MetricType.GAUGE,
    "Models for which the endpoint is left out of the choice: it fails more than its peers, or lacks them.",
    ("cluster", "endpoint"),
)
EJECTIONS_WITHHELD = Family(
    "tokenway_ejections_withheld_total",
    MetricType.COUNTER,
    "Failures that would have ejected an endpoint, but for `health.min_available_ratio`.",
)
POISON_REQUESTS = Family(
    "tokenway_poison_requests_total",
    MetricType.COUNTER,
    "Requests that several endpoints failed at: evidence against none of them.",
)

FAMILIES: tuple[Family, ...] = (
    EJECTIONS,
    ENDPOINT_FAILURES,
    ENDPOINT_DOUBTED,
    EJECTIONS_WITHHELD,
    POISON_REQUESTS,
)
