"""Endpoint addresses as configured, and what names resolved to → endpoints Envoy can take: `ip:port` only.

Rules:
    1. A literal address costs no look-up; a host name becomes one endpoint per A and AAAA record.
    2. A name without an address has no endpoint; its cluster keeps the others.
    3. Within a cluster an address occurs once; the first mention keeps its weight and labels.
    4. A file knows nothing of a replica but its address, so the address is also its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from extproc.config.clusters import ClusterSpec
from extproc.discovery.listed import Clusters, Listed
from metadata_center.addresses import Address

FILES: Final = "files"
"""What the fleet calls this source."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """Clusters with addresses resolved, valid until a name's records change (no TTL is known here).

    Attributes:
        clusters: Cluster name to its endpoints, in configuration order.
    """

    clusters: Clusters

    @property
    def endpoints(self) -> tuple[Listed, ...]:
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
    by_name: dict[str, tuple[Listed, ...]] = {}
    for cluster in clusters:
        endpoints: dict[Address, Listed] = {}
        for spec in cluster.endpoints:
            for host in addresses.get(spec.address, ()) if spec.is_host_name else (spec.address,):
                address = Address.of(host, spec.port)
                endpoints.setdefault(
                    address,
                    Listed(str(address), address, spec.weight, spec.labels, spec.metadata, spec.draining),
                )
        by_name[cluster.name] = tuple(endpoints.values())
    return Resolution(by_name)
