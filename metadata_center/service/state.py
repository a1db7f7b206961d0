"""What the metadata-center service remembers: load, cached prefixes, members' shares."""

from __future__ import annotations

from metadata_center.service.cluster_caches import ClusterCaches
from metadata_center.service.cluster_loads import ClusterLoads, Limits
from metadata_center.service.rendezvous import Rendezvous


class ServiceState:
    """All the metadata center knows, as one thing to hand to its HTTP API.

    Args:
        limits: Lifetimes and bounds.
        zero_unix_ns: Unix time in nanoseconds at which `now_s` is 0; no two runs of a service have the same.
    """

    def __init__(self, limits: Limits, *, zero_unix_ns: int = 0) -> None:
        self.loads = ClusterLoads(limits)
        self.caches = ClusterCaches(limits)
        self.rendezvous = Rendezvous(self.loads, str(zero_unix_ns))
        self._zero_unix_ns = zero_unix_ns

    def unix_ns(self, at_s: float) -> int:
        """A time on the clock of `now_s` as Unix nanoseconds; wrong by what the wall clock was set since."""
        return self._zero_unix_ns + int(at_s * 1e9)

    def advance(self, now_s: float) -> None:
        """End and drop what is due by `now_s`."""
        self.caches.advance(now_s)
        self.rendezvous.advance(now_s)
