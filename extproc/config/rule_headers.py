"""Request headers that a rule cannot match, because they never reach Tokenway, and why.

What Envoy withholds for no other reason than that it has no reader (`forward_rules` of its bootstrap), a rule
can have: `tokenway bootstrap` forwards what the rules match.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum, auto

from extproc.request.sanitize import STEERING_HEADERS

SECRET_HEADERS = (
    "authorization",
    "proxy-authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "x-auth-token",
    "x-amz-security-token",
    "cookie",
)
"""What clients prove themselves with, at the providers whose APIs are served here and at common proxies.

No rule and no Tokenway sees them, and no engine unless `request.forward_credentials` says so.
"""

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
        "expect",
    }
)
"""RFC 9110, 7.6.1, and `Expect`, which Envoy answers itself."""

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_PSEUDO = (":authority", ":method", ":path", ":scheme")
"""Of requests: RFC 9113, 8.3.1."""

_CLIENT_ADDRESS = "x-envoy-external-address"
"""The one header of Envoy's own that it makes for every request."""

_CLIENT_CERTIFICATE = "x-forwarded-client-cert"
"""Envoy takes it away unless it is told to say it, as Istio's gateways are."""


class Edge(Enum):
    """Which Envoy clients meet."""

    OWN = auto()
    ISTIO = auto()
    FOREIGN = auto()
    """A gateway that asks an endpoint picker; what it refuses or adds is its own matter."""


def never_arrives(name: str, allowed: Collection[str], edge: Edge = Edge.OWN) -> str | None:
    """Why no rule can match a header, with what to do instead; None if one can.

    Args:
        name: Lower case.
        allowed: `request.allow_headers`, lower case.
        edge: Whose rules the header has to pass first.
    """
    if name in SECRET_HEADERS:
        return (
            f"`{name}` is a secret, which Envoy keeps from Tokenway; "
            "accepted: a header that reveals nothing else, such as x-tier"
        )
    if name == "host":
        return "`host` arrives under another name; accepted: `:authority`"
    if name == "x-request-id":
        return f"`{name}` is made anew by Envoy for each request; accepted: a header of the client's own"
    if name == "x-forwarded-for":
        return (
            f"`{name}` arrives with what Envoy adds behind what the client said, so no value is equal; "
            f"accepted: `{_CLIENT_ADDRESS}`, the client's address by edge.trusted_hops"
        )
    if "_" in name and edge is not Edge.FOREIGN:
        return f"`{name}` has Envoy refuse the request, for its underscore; accepted: names without one"
    if name == _CLIENT_CERTIFICATE and edge is Edge.OWN:
        return f"`{name}` is taken from clients at Envoy's edge; accepted: a header of the client's own"
    if name.startswith(":") and name not in _PSEUDO:
        return f"`{name}` is no header of a request; accepted: {', '.join(_PSEUDO)}"
    if name in _HOP_BY_HOP:
        return f"`{name}` is of one connection and never arrives; accepted: end-to-end headers"
    if name in STEERING_HEADERS and name not in allowed:
        return f"`{name}` is taken from clients at Envoy's edge; accepted: names in request.allow_headers"
    if name.startswith("x-tokenway-") or (name.startswith("x-envoy-") and name != _CLIENT_ADDRESS):
        return (
            f"`{name}` is this gateway's or Envoy's own, and taken from clients; "
            f"accepted: other names, and {_CLIENT_ADDRESS}"
        )
    return None


def never_said(value: str) -> str | None:
    """Why no header has a value, likewise. Envoy takes blanks off its ends and refuses controls."""
    if value.strip(" \t") != value:
        return "a value with blanks at its ends, which no header has; accepted: the same without them"
    if _CONTROL.search(value) is not None:
        return "a value with a control character, which no header has; accepted: text in one line"
    return None
