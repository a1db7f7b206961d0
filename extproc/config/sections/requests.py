"""What a client may send, for how long it is served, and where it waits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from extproc.config.sections.fields import HeaderNames, Name, Seconds, Section

_MAX_HOLD_S = 55
"""Envoy's bootstrap lets a decision take 60 s (`max_message_timeout`); a margin for its way."""


class RequestSection(Section):
    """What a client may send."""

    max_body_bytes: int = Field(default=33_554_432, ge=1_024, le=1_073_741_824)
    """Larger bodies are refused with 413. 32 MiB holds a 24 MiB image in base64."""
    allow_fields: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Body fields that steer the engine and are kept; all others of that kind are removed."""
    allow_headers: HeaderNames = ()
    """Request headers that steer routing or the engine and are kept."""
    forward_credentials: bool = False
    """Engines see the client's `authorization`, `x-api-key`, `cookie` and other credentials."""
    usage_injection: bool = False
    """Ask engines for token usage in streams whose client did not; the client then sees it too."""
    block_bytes: int = Field(default=512, ge=64, le=65_536)
    """Prompt bytes per block of the prefix index; AIGW's step is 512."""


class Signals(Section):
    """When a request counts as answered, and when it is given up."""

    first_chunk: bool = True
    """Take a stream's first chunk as first token; false ends its prefill at 1.2 times its predicted TTFT."""
    timeout_s: Seconds = 600.0
    """Bound on an answer that is not streamed, in seconds."""
    first_byte_timeout_s: Seconds = 60.0
    """Bound on the response headers of a stream, in seconds."""


class Load(Section):
    """The table of in-flight requests."""

    lease_s: Seconds = 180.0
    """A request not heard of for this long no longer counts as load, in seconds."""
    tombstone_s: Seconds = 60.0
    """How long an end that came before its beginning is remembered, in seconds."""
    max_requests: int = Field(default=200_000, ge=1, le=10_000_000)
    """Bound on requests in flight, of each worker; what is beyond it gets 429 with Retry-After."""
    max_tombstones: int = Field(default=100_000, ge=1, le=10_000_000)
    """Bound on remembered early ends."""


class Responses(Section):
    """Stored responses (`previous_response_id`, `/v1/responses/{id}`): each lives at one engine alone."""

    max_remembered: int = Field(default=100_000, ge=1, le=10_000_000)
    """Responses and conversations whose endpoint is remembered per worker, about 250 bytes each."""
    expiry_s: float = Field(default=30 * 86_400.0, gt=0, le=366 * 86_400.0)
    """One not asked for in this long is forgotten, in seconds; OpenAI keeps a response for 30 days."""


class Holding(Section):
    """Late binding: requests wait here while their endpoint is full (`least_completion` only)."""

    enabled: bool = True
    """True lets requests wait; false sends each at once, and it waits at its engine, first come first served.
    Gateways that send to the same endpoints say the same."""
    max_requests: int = Field(default=1_000, ge=1, le=100_000)
    """Most that wait per set of endpoints and worker. From nine tenths of it on the first in line is sent for
    each that comes, and one more than the whole at once."""
    max_s: float = Field(default=50.0, gt=0, le=_MAX_HOLD_S)
    """Longest wait, in seconds; then a request is sent."""
    refuse: bool = False
    """Instead of being sent, one too many and one that cannot be served within `max_s`, or within its own
    limit, is refused, at once, with 429 and Retry-After."""
    fairness: bool = True
    """Requests that wait take turns by their fairness ids; without ids nothing changes."""
