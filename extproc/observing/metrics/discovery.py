"""Series about sources of endpoints that have connections to control planes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from extproc.observing.metrics.family import Family, MetricType, Values

CONNECTED = Family(
    "tokenway_discovery_connected",
    MetricType.GAUGE,
    "1 while the source hears of changes as they happen; no series without such a source.",
    ("source",),
)
AGE = Family(
    "tokenway_discovery_age_seconds",
    MetricType.GAUGE,
    "Time since the source was last known to have all that its control plane lists, 0 while it has; what it "
    "listed last stays in force.",
    ("source",),
)
UPDATES = Family(
    "tokenway_discovery_updates_total",
    MetricType.COUNTER,
    "Reports of the source that listed other endpoints than before.",
    ("source",),
)
REJECTS = Family(
    "tokenway_discovery_rejects_total",
    MetricType.COUNTER,
    "What the control plane said that could not be used, and changed nothing.",
    ("source",),
)

FAMILIES: tuple[Family, ...] = (CONNECTED, AGE, UPDATES, REJECTS)


class Shown(Protocol):
    """What is shown of a source: `SourceStatus`."""

    @property
    def is_connected(self) -> bool:
        """It hears of changes as they happen."""

    @property
    def age_s(self) -> float:
        """Since it was last known to be in sync."""

    @property
    def updates(self) -> int:
        """Reports of other endpoints."""

    @property
    def rejects(self) -> int:
        """Words that could not be used."""


def discovery_values(sources: Mapping[str, Shown]) -> Values:
    """The series of the sources, by name."""
    return {
        CONNECTED: {(name,): source.is_connected for name, source in sources.items()},
        AGE: {(name,): source.age_s for name, source in sources.items()},
        UPDATES: {(name,): source.updates for name, source in sources.items()},
        REJECTS: {(name,): source.rejects for name, source in sources.items()},
    }
