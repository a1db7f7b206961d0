"""Series of endpoints: what each has to do now and what it has cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from extproc.observing.metrics.family import Family, MetricType, Values
from extproc.observing.metrics.health import ENDPOINT_DOUBTED
from metadata_center.load.kinds import KINDS, Amounts
from metadata_center.types import EndpointKey

LOADS: Final = {
    index: Family(kind.metric, MetricType.GAUGE, kind.meaning, ("cluster", "endpoint"))
    for index, kind in enumerate(KINDS)
    if kind.metric
}
"""Families of load, by where an `Amounts` has the kind."""

CACHED_BLOCKS = Family(
    "tokenway_cached_blocks",
    MetricType.GAUGE,
    "Blocks the prefix index believes the endpoint holds.",
    ("cluster", "endpoint"),
)
CAPACITY_BLOCKS = Family(
    "tokenway_cache_capacity_blocks",
    MetricType.GAUGE,
    "Blocks the prefix index allows the endpoint before it forgets the oldest.",
    ("cluster", "endpoint"),
)
ENDPOINT_AVAILABLE = Family(
    "tokenway_endpoint_available",
    MetricType.GAUGE,
    "1 if the endpoint may be chosen, 0 if it is ejected, draining, or not ready by its source's word.",
    ("cluster", "endpoint"),
)
ENDPOINT_ANNOUNCING = Family(
    "tokenway_endpoint_announcing",
    MetricType.GAUGE,
    "1 while the endpoint's own KV events say what it has cached, 0 while routing history does.",
    ("cluster", "endpoint"),
)
TTFT_EWMA = Family(
    "tokenway_endpoint_ttft_ewma_seconds",
    MetricType.GAUGE,
    "Moving average of the endpoint's time to first token; absent until one was seen.",
    ("cluster", "endpoint"),
)

FAMILIES: tuple[Family, ...] = (
    *LOADS.values(),
    CACHED_BLOCKS,
    CAPACITY_BLOCKS,
    ENDPOINT_AVAILABLE,
    ENDPOINT_ANNOUNCING,
    TTFT_EWMA,
)


@dataclass(frozen=True, slots=True)
class EndpointGauges:
    """What a scrape shows of one endpoint.

    Attributes:
        key: Its identity.
        cluster: A cluster that lists it.
        load: One number per kind of load.
        source: The source that lists it.
        weight: Relative capacity.
        labels: What rules select it by.

    The others mean what the families of the same name say.
    """

    key: EndpointKey
    cluster: str
    available: bool
    load: Amounts
    cached_blocks: int
    capacity_blocks: int
    ttft_ewma_s: float | None = None
    announcing: bool = False
    doubted: int = 0
    source: str = ""
    weight: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)


_COLUMNS: Mapping[Family, Callable[[EndpointGauges], float | None]] = {
    CACHED_BLOCKS: lambda row: row.cached_blocks,
    CAPACITY_BLOCKS: lambda row: row.capacity_blocks,
    ENDPOINT_AVAILABLE: lambda row: row.available,
    ENDPOINT_ANNOUNCING: lambda row: row.announcing,
    ENDPOINT_DOUBTED: lambda row: row.doubted,
    TTFT_EWMA: lambda row: row.ttft_ewma_s,
}


def values(endpoints: Iterable[EndpointGauges]) -> Values:
    """The series of the endpoints configured now."""
    rows = list(endpoints)
    loads: Values = {
        family: {(row.cluster, row.key): row.load[index] for row in rows} for index, family in LOADS.items()
    }
    return loads | {
        family: {(row.cluster, row.key): value for row in rows if (value := read(row)) is not None}
        for family, read in _COLUMNS.items()
    }
