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
from types import MappingProxyType
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


@dataclass(frozen=True, slots=True)
class Literal:
    """A cluster all of whose addresses are literal, and its endpoints, which no answer changes.

    Attributes:
        cluster: As written.
        endpoints: Of it.
    """

    cluster: ClusterSpec
    endpoints: tuple[Listed, ...]


Literals = Mapping[str, Literal]
"""By the name of the cluster."""


def literals(clusters: Iterable[ClusterSpec], before: Literals) -> Literals:
    """The clusters without host names.

    Args:
        clusters: As written.
        before: Those of an earlier file: what is written alike stays the same object, which is quickly seen.
    """
    found: dict[str, Literal] = {}
    for cluster in clusters:
        known = before.get(cluster.name)
        if known is not None and known.cluster == cluster:
            found[cluster.name] = known
        elif not any(spec.is_host_name for spec in cluster.endpoints):
            found[cluster.name] = Literal(cluster, _endpoints(cluster, {}))
    return found


def resolved(
    clusters: Iterable[ClusterSpec],
    addresses: Mapping[str, Sequence[str]],
    known: Literals = MappingProxyType({}),
) -> Resolution:
    """The endpoints of clusters.

    Args:
        clusters: As written.
        addresses: IP addresses of host names; a name that is missing has none.
        known: Those of these clusters whose endpoints are known.
    """
    return Resolution(
        {
            cluster.name: literal.endpoints
            if (literal := known.get(cluster.name)) is not None
            else _endpoints(cluster, addresses)
            for cluster in clusters
        }
    )


def _endpoints(cluster: ClusterSpec, addresses: Mapping[str, Sequence[str]]) -> tuple[Listed, ...]:
    endpoints: dict[Address, Listed] = {}
    for spec in cluster.endpoints:
        for host in addresses.get(spec.address, ()) if spec.is_host_name else (spec.address,):
            address = Address.of(host, spec.port)
            endpoints.setdefault(
                address,
                Listed(str(address), address, spec.weight, spec.labels, spec.metadata, spec.draining),
            )
    return tuple(endpoints.values())
