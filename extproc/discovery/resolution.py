"""Endpoint addresses as configured, and what names resolved to → endpoints Envoy can be told: `ip:port` only.

Rules:
    1. A literal address costs no look-up; a host name becomes one endpoint per A and AAAA record.
    2. A name without an address has no endpoint; its cluster keeps the others.
    3. Within a cluster a key occurs once; the first mention keeps its weight and labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from extproc.config.clusters import ClusterSpec
from extproc.values.endpoints import Endpoint
from metadata_center.types import EndpointKey


@dataclass(frozen=True, slots=True)
class Resolution:
    """Clusters with addresses resolved, valid until a name's records change (no TTL is known here).

    Attributes:
        clusters: Cluster name to its endpoints, in configuration order.
    """

    clusters: Mapping[str, tuple[Endpoint, ...]]

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints of all clusters; one that serves two clusters occurs twice."""
        return tuple(endpoint for endpoints in self.clusters.values() for endpoint in endpoints)


def host_names(clusters: Iterable[ClusterSpec]) -> list[str]:
    """The names that have to be looked up, each once, in the order of the file."""
    names = (spec.address for cluster in clusters for spec in cluster.endpoints if spec.is_host_name)
    return list(dict.fromkeys(names))


def resolved(clusters: Iterable[ClusterSpec], addresses: Mapping[str, Sequence[str]]) -> Resolution:
    """The endpoints of clusters.

    Args:
        clusters: As written.
        addresses: IP addresses of host names; a name that is missing has none.
    """
    by_name: dict[str, tuple[Endpoint, ...]] = {}
    for cluster in clusters:
        endpoints: dict[EndpointKey, Endpoint] = {}
        for spec in cluster.endpoints:
            for address in addresses.get(spec.address, ()) if spec.is_host_name else (spec.address,):
                key = _key(address, spec.port)
                endpoints.setdefault(
                    key,
                    Endpoint(
                        key=key,
                        cluster=cluster.name,
                        weight=spec.weight,
                        labels=spec.labels,
                        metadata=spec.metadata,
                        draining=spec.draining,
                    ),
                )
        by_name[cluster.name] = tuple(endpoints.values())
    return Resolution(by_name)


def _key(address: str, port: int) -> EndpointKey:
    return EndpointKey(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
