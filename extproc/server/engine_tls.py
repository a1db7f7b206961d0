"""TLS of Tokenway's own requests to engines: probes, metrics, discovery of events, tokenizer checks."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

from extproc.config.sections.engines import EngineTls
from extproc.values.endpoints import Endpoint
from metadata_center.types import EndpointKey

_log = logging.getLogger("tokenway.engine_tls")


def request_tls(
    settings: Mapping[str, EngineTls], clusters: Mapping[str, Sequence[Endpoint]]
) -> dict[EndpointKey, Mapping[str, Any]]:
    """What aiohttp is to be told with a request to each endpoint of a cluster with TLS; others are left out.

    Files that cannot be read are logged; their engines then fail every probe, which is better than being
    spoken to without a check.
    """
    found: dict[EndpointKey, Mapping[str, Any]] = {}
    for cluster, tls in settings.items():
        request = {"ssl": _context(cluster, tls), "server_hostname": tls.server_name}
        found.update((endpoint.key, request) for endpoint in clusters.get(cluster, ()))
    return found


def _context(cluster: str, tls: EngineTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(tls.ca_file)
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except OSError as error:  # ssl.SSLError is one
        _log.error("engine_tls cannot be used", extra={"cluster": cluster, "reason": str(error)})
    return context
