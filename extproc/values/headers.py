"""Names of the headers by which Tokenway and Envoy talk about a request."""

from __future__ import annotations

from typing import Final

REQUEST_ID_HEADER: Final = "x-tokenway-request-id"
"""Set by Envoy at the edge on every request (a UUID); a client's own value is overwritten."""

OWNER_HEADER: Final = "x-tokenway-owner"
"""Set by the worker that decided; says which process holds the request's charge. Routes are matched by it;
Envoy takes it off before the request goes to an engine."""

OWNER_TAG_HEADER: Final = ":tokenway-owner"
"""The same for the access logs, which see the headers as they went to the engine. Envoy's HTTP/1 codec, the
only one towards engines, sends no header whose name begins with a colon, and no client gets one in."""

CLUSTER_HEADER: Final = "x-tokenway-cluster"
"""Set by the decision where Envoy takes the cluster from a header, as an Istio gateway does; no client's, and
no engine sees it."""

DEBUG_HEADER: Final = "x-tokenway-debug"
"""An operator's token; asks for the decision id in the answer."""

SLO_TTFT_HEADER: Final = "x-slo-ttft-ms"
"""A request's own limit on the time to its first token, in milliseconds."""

SLO_TPOT_HEADER: Final = "x-slo-tpot-ms"
"""Likewise on the time of each further token."""

CONTENT_ENCODING: Final = "content-encoding"
"""How the client's body is compressed."""

CONTENT_TYPE: Final = "content-type"
"""What the client's body is, and how its parts are told apart."""
