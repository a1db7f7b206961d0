"""The dialect of an Istio gateway: its clusters are istiod's, and a header names the one.

Rules:
    1. All is as in the dialect of our bootstrap but for the cluster: istio-proxy has no priority groups, so
       that each attempt goes to the same cluster and takes the next endpoint of the list.
    2. Envoy reads the cluster's name when it chooses the route anew, from the headers of the same answer.
"""

from __future__ import annotations

from extproc.protocol.bootstrap_dialect import BootstrapDialect, routed
from extproc.values.headers import CLUSTER_HEADER


class IstioDialect(BootstrapDialect):
    """See `extproc.protocol.dialect.Dialect`."""

    def route(
        self,
        field: str,
        owner: str,
        cluster: str,
        attempts: int,  # noqa: ARG002 - each of them goes to the one cluster
        policy: tuple[tuple[str, str], ...],
    ) -> bytes:
        """An answer but for its endpoints."""
        return bytes(routed(field, owner, ((CLUSTER_HEADER, cluster), *policy)).SerializeToString())
