"""What is known of all endpoints: one record each, and which endpoints are peers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from extproc.health.levels import Level
from extproc.health.states import Cause, HealthState
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey

ROUNDING: Final = 1e-9
"""Shares are sums of floats: those less than this apart are the same."""


@dataclass(slots=True)
class Record:
    """What is known of one endpoint; times are the caller's monotonic seconds.

    Attributes:
        draining: Its source says that it goes away.
        ready: False if its source says that it takes no new requests for now.
        probe_failures: Consecutive, 0 after a success.
        patience: Doublings of the next probe's time-out.
        alive_s: When real traffic last had bytes of an answer from there, or None.
        levels: How it does, by model.
        ejected: Reason while ejected, else None.
        cause: What that rests on; None while not ejected.
        ejected_until_s: Earliest recovery, meaningful while ejected.
        ejections_in_a_row: Ejections by traffic, each less than `max_ejection_s` after the last recovery.
        recovered_s: End of the last ejection, or None.
        next_probe_s: When to probe again; -inf before the first probe.
    """

    clusters: frozenset[str]
    draining: bool
    ready: bool
    probe_failures: int = 0
    patience: int = 0
    alive_s: float | None = None
    levels: dict[str, Level] = field(default_factory=dict)
    ejected: str | None = None
    cause: Cause | None = None
    ejected_until_s: float = 0.0
    ejections_in_a_row: int = 0
    recovered_s: float | None = None
    next_probe_s: float = float("-inf")

    @property
    def is_withdrawn(self) -> bool:
        """Its source takes it out of the choice: no floor brings it back."""
        return self.draining or not self.ready

    @property
    def state(self) -> HealthState:
        """What it is to the router."""
        if self.draining:
            return HealthState.DRAINING
        if not self.ready:
            return HealthState.NOT_READY
        return HealthState.HEALTHY if self.ejected is None else HealthState.EJECTED

    def eject(self, cause: Cause, reason: str, until_s: float) -> None:
        """Not to be chosen, until `until_s` at least."""
        self.ejected, self.cause, self.ejected_until_s = reason, cause, until_s

    def readmit(self, now_s: float) -> None:
        """Back; whatever it is doubted for goes on with a trial at once."""
        self.ejected = self.cause = None
        self.recovered_s = now_s
        for level in self.levels.values():
            if level.doubted is not None and level.doubted is not FailureKind.MISSING_MODEL:
                level.try_now(now_s)


class Records:
    """The endpoints that are configured.

    Attributes:
        by_key: Their records.
        members: Keys by cluster; one that several clusters list stands in each.
        generation: Grows whenever a state, a doubt or an endpoint changes, and only then.
    """

    __slots__ = ("_changed", "by_key", "generation", "members")

    def __init__(self) -> None:
        self.by_key: dict[EndpointKey, Record] = {}
        self.members: dict[str, dict[EndpointKey, None]] = {}
        self.generation = 0
        self._changed: dict[str, int] = {}

    def changed(self, clusters: Iterable[str]) -> None:
        """A state, a doubt or an endpoint of these clusters is another."""
        self.generation += 1
        for cluster in clusters:
            if cluster in self.members:
                self._changed[cluster] = self.generation
            else:
                self._changed.pop(cluster, None)

    def generation_of(self, cluster: str) -> int:
        """`generation` when something of that cluster changed last; the latest for one without endpoints."""
        return self._changed.get(cluster, self.generation)

    def place(self, key: EndpointKey, clusters: frozenset[str], *, draining: bool, ready: bool) -> Record:
        """An endpoint is in these clusters now, and in no others."""
        record = self.by_key.get(key)
        if record is None:
            record = self.by_key[key] = Record(clusters, draining, ready)
        else:
            self._leave(key, record.clusters - clusters)
            record.clusters, record.draining, record.ready = clusters, draining, ready
        for cluster in clusters:
            self.members.setdefault(cluster, {})[key] = None
        return record

    def remove(self, key: EndpointKey) -> None:
        """An endpoint is configured no more."""
        self._leave(key, self.by_key.pop(key).clusters)

    def _leave(self, key: EndpointKey, clusters: Iterable[str]) -> None:
        for cluster in clusters:
            members = self.members[cluster]
            del members[key]
            if not members:
                del self.members[cluster]

    def others(self, key: EndpointKey, record: Record) -> Iterator[tuple[EndpointKey, Record]]:
        """Endpoints of the same clusters; one that shares two of them comes twice."""
        for cluster in record.clusters:
            for other in self.members.get(cluster, ()):
                if other != key:
                    yield other, self.by_key[other]
