"""How many endpoints of a cluster stay available, whatever speaks against them."""

from __future__ import annotations

from collections.abc import Iterable

from extproc.health.records import ROUNDING, Record, Records
from extproc.health.states import BELOW_THE_FLOOR, HealthState, Transition


class Floors:
    """The floors of all clusters.

    Args:
        records: The endpoints.
        min_available_ratio: Share of a cluster that stays available, one at least.

    Attributes:
        withheld: Ejections that a floor prevented.
    """

    __slots__ = ("_min_available_ratio", "_records", "withheld")

    def __init__(self, records: Records, min_available_ratio: float) -> None:
        self._records = records
        self._min_available_ratio = min_available_ratio
        self.withheld = 0

    def configure(self, min_available_ratio: float) -> None:
        """Go by this share from now on."""
        self._min_available_ratio = min_available_ratio

    def may_go(self, record: Record) -> bool:
        """Whether enough of its clusters stay available without it."""
        if record.is_withdrawn:
            return True
        for cluster in record.clusters:
            available, floor = self._available(cluster)
            if available - 1 < floor:
                self.withheld += 1
                return False
        return True

    def hold(self, clusters: Iterable[str], now_s: float) -> list[Transition]:
        """Bring back endpoints that may be well where refused connections took a cluster below its floor."""
        changes = []
        for cluster in clusters:
            available, floor = self._available(cluster)
            if available >= floor:
                continue
            out = [
                key
                for key in self._records.members[cluster]
                if (record := self._records.by_key[key]).ejected is not None
                and not record.is_withdrawn
                and record.cause not in BELOW_THE_FLOOR
            ]
            out.sort(key=lambda key: self._records.by_key[key].ejected_until_s)
            for key in out[: floor - available]:
                self._records.by_key[key].readmit(now_s)
                self._records.changed(self._records.by_key[key].clusters)
                changes.append(
                    Transition(key, HealthState.EJECTED, HealthState.HEALTHY, "too few others are left")
                )
        return changes

    def _available(self, cluster: str) -> tuple[int, int]:
        """How many endpoints of a cluster are available, and how many have to be."""
        available = members = 0
        for key in self._records.members.get(cluster, ()):
            record = self._records.by_key[key]
            if not record.is_withdrawn:
                members += 1
                available += record.ejected is None
        return available, max(1, int(members * self._min_available_ratio + ROUNDING))
