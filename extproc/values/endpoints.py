"""Engine replicas as the configuration names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from metadata_center.types import EndpointKey


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine replica as the configuration names it, address resolved.

    `key` is `ip:port` (IPv6 in brackets) and is the identity everywhere: load, cache, health, Envoy.
    """

    key: EndpointKey
    cluster: str
    weight: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False
