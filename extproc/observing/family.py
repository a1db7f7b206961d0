"""What a metric family is: its row in the documentation and its shape in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """Prometheus metric types in use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """One metric family: its row in the documentation and its shape in memory.

    Attributes:
        name: As scraped; counters end in `_total`.
        kind: Prometheus type.
        doc: What one sample means.
        labels: Label names, in the order of the value tuples.
        buckets: Upper bounds of a histogram, ascending, without +Inf.
        start: Label value tuples that exist at zero from the start (closed enums), so that the first
            increase is visible to `rate()`.
    """

    name: str
    kind: Kind
    doc: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    start: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
