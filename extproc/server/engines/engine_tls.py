"""TLS of Tokenway's own requests to engines: probes, metrics, discovery of events, tokenizer checks."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from typing import Any

from extproc.config.sections.engines import EngineTls
from extproc.discovery.fleet import Fleet
from metadata_center.files import require_regular
from metadata_center.types import EndpointKey

_log = logging.getLogger("tokenway.engine_tls")


class RequestTls:
    """What aiohttp gets with a request to an endpoint.

    Args:
        fleet: Knows which cluster an endpoint is in.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._by_cluster: Mapping[str, Mapping[str, Any]] = {}

    def configure(self, settings: Mapping[str, EngineTls]) -> None:
        """Clusters with TLS. Their files are read now.

        Files that cannot be read are logged; their engines then fail every probe, which is better than being
        spoken to without a check.
        """
        self._by_cluster = {
            cluster: {"ssl": _context(cluster, tls), "server_hostname": tls.server_name}
            for cluster, tls in settings.items()
        }

    def of(self, key: EndpointKey) -> Mapping[str, Any] | None:
        """For an endpoint of a cluster with TLS; None for any other."""
        if not self._by_cluster:
            return None
        clusters = [endpoint.cluster for endpoint in self._fleet.of(key)]
        return next((self._by_cluster[name] for name in clusters if name in self._by_cluster), None)


def _context(cluster: str, tls: EngineTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        require_regular(tls.ca_file, tls.cert_file, tls.key_file)
        context.load_verify_locations(tls.ca_file)
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")  # none, and no question for one
    except (OSError, ValueError) as error:  # ssl.SSLError is one; a NUL in a name is the other
        _log.error("engine_tls cannot be used", extra={"cluster": cluster, "reason": str(error)})
    return context
