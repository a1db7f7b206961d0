"""Names and values of the metadata center. Imports nothing of the gateway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

EndpointKey = NewType("EndpointKey", str)
"""`ip:port`, IPv6 in brackets: the identity of one engine replica."""

RequestId = NewType("RequestId", str)
"""Identity of one client request; Envoy makes it at the edge (a UUID), clients cannot choose it."""

BlockHash = NewType("BlockHash", int)
"""Unsigned 64-bit chained hash of a prompt prefix that ends at a block boundary."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What one request costs the endpoint that serves it.

    Attributes:
        request_id: Who is charged.
        endpoint: Where.
        prefill_tokens: Uncached prompt tokens still to be computed; 0 once prefill was released.
        context_tokens: Prompt tokens held in the KV cache while the request lives.
    """

    request_id: RequestId
    endpoint: EndpointKey
    prefill_tokens: int
    context_tokens: int
