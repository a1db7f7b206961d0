"""Series of the process itself."""

from __future__ import annotations

from extproc.observing.metrics.family import Family, Kind

EXPLAIN_RECORDS = Family(
    "tokenway_explain_records", Kind.GAUGE, "Decisions held for `tokenway explain`; bounded by configuration."
)
BUILD_INFO = Family("tokenway_build_info", Kind.GAUGE, "Always 1.", ("version", "python"))
