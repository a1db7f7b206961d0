"""Envoy towards clients, with Tokenway and without."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from extproc.config.sections.fields import DAY_S, AdminPath, FileName, HeaderNames, Seconds, Section
from extproc.config.sections.listening import GatewayAddress

Origin = Annotated[
    str,
    Field(
        pattern=r"^(\*|[a-z][a-z0-9+.-]*://[!-.0-~]+)$", max_length=256, examples=["https://chat.example.com"]
    ),
]


class Away(Section):
    """What Envoy does with a request that Tokenway did not answer. In Envoy's bootstrap: render it again."""

    gone: Literal["open", "refuse"] = "open"
    """No worker was there to ask: open serves inference for models open to all; refuse is 503."""
    late: Literal["open", "refuse"] = "open"
    """A worker was asked and did not answer within `after_s`: the same choice."""
    after_s: float = Field(default=0.5, ge=0.5, le=60)
    """How long Envoy waits for an answer, in seconds."""
    max_requests_per_endpoint: int = Field(default=1_024, ge=1, le=100_000)
    """Bound on what Envoy alone sends to one endpoint at a time; the rest is 503. Applies at once."""


class EdgeTls(Section):
    """TLS for clients. The files are read by Envoy, on its host, once unless `tokenway bootstrap --sds`."""

    cert_file: FileName
    """PEM file of the certificate, with its chain."""
    key_file: FileName
    """PEM file of its private key."""
    client_ca_file: FileName | None = None
    """PEM file of a CA; clients must then show a certificate of it."""


class Cors(Section):
    """What web pages of other origins may do, answered by Envoy's own filter."""

    origins: Annotated[tuple[Origin, ...], Field(strict=False, min_length=1)]
    """Origins whose pages may call, as browsers write them; `*` is every page."""
    headers: HeaderNames = (
        "authorization",
        "content-type",
        "x-api-key",
        "x-request-id",
        "anthropic-version",
        "anthropic-beta",
        "anthropic-dangerous-direct-browser-access",
        "openai-organization",
        "openai-project",
        "x-stainless-arch",
        "x-stainless-lang",
        "x-stainless-os",
        "x-stainless-package-version",
        "x-stainless-retry-count",
        "x-stainless-runtime",
        "x-stainless-runtime-version",
        "x-stainless-timeout",
        "x-stainless-helper-method",
    )
    """Request headers such a page may send; what the official clients send in a browser."""
    expose_headers: HeaderNames = (
        "x-request-id",
        "retry-after",
    )
    """Response headers such a page may read."""
    max_age_s: int = Field(default=600, ge=0, le=DAY_S)
    """How long a browser may remember the answer, in seconds."""


class Edge(Section):
    """Envoy towards clients. In Envoy's bootstrap: render it again after a change."""

    max_connections: int = Field(default=10_000, ge=1, le=10_000_000)
    """Bound on clients' connections; more are closed at once."""
    max_heap_bytes: int = Field(default=2_147_483_648, ge=67_108_864, le=2**63 - 1)
    """Envoy's memory: at 95 % of it new requests are refused, from 90 % on the largest are reset."""
    headers_timeout_s: Seconds = 10.0
    """Bound on the arrival of headers, a connection's first line, and TLS handshakes, in seconds."""
    upload_timeout_s: Seconds = 300.0
    """Bound on the arrival of a whole request, in seconds; waiting for the answer does not count."""
    idle_timeout_s: Seconds = 600.0
    """A connection without a request ends after this, in seconds; sooner as `max_connections` run out."""
    max_connection_s: Seconds = 3_600.0
    """A connection is drained after this, in seconds; requests that run on it end by themselves."""
    max_streams: int = Field(default=100, ge=1, le=100_000)
    """Bound on requests at a time of one HTTP/2 connection."""
    trusted_hops: int = Field(default=0, ge=0, le=16)
    """Proxies of yours in front of Envoy: that many entries of x-forwarded-for are believed."""
    keep_request_id: bool = False
    """Keep a client's x-request-id; false replaces it. Tokenway's own id is another header."""
    admin_paths: Annotated[tuple[AdminPath, ...], Field(strict=False)] = ()
    """Paths of Envoy's admin port to open beside those that only read, for instance /drain_listeners."""
    tls: EdgeTls | None = None
    """TLS for clients; null is clear text."""
    cors: Cors | None = None
    """Cross-origin calls from browsers; null answers no preflight."""
    gateway: GatewayAddress | None = None
    """Where Envoy finds Tokenway over TCP; null means the Unix sockets in `server.run_dir`."""
