"""What a metric family is: its row in the documentation and its shape in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class MetricType(StrEnum):
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
    kind: MetricType
    doc: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    start: tuple[tuple[str, ...], ...] = field(default=(), repr=False)


Values = dict[Family, Mapping[tuple[str, ...], float]]
"""What a scrape shows of some families: label values, in the order of `Family.labels`, to the sample."""


def closed(values: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """`Family.start` of a family with one label that takes these values and no others."""
    return tuple((str(value),) for value in values)


def doubling(first: float, count: int) -> tuple[float, ...]:
    """Bucket bounds: `first` and `count - 1` more, each twice the one before."""
    return tuple(first * 2**power for power in range(count))
