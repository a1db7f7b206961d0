"""Series of the process itself."""

from __future__ import annotations

from extproc.observing.metrics.family import Family, MetricType

EXPLAIN_RECORDS = Family(
    "tokenway_explain_records",
    MetricType.GAUGE,
    "Decisions held for `tokenway explain`; bounded by configuration.",
)
BUILD_INFO = Family("tokenway_build_info", MetricType.GAUGE, "Always 1.", ("version", "python"))
