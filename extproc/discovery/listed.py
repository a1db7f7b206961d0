"""What a source of endpoints says: the one form in which files and control planes feed the fleet.

Rules:
    1. A source owns the endpoints it lists. It lists whole clusters, one, several or all of them at a time;
       the fleet works out what is different.
    2. A source that is away lists nothing, and so what it listed last stays.
    3. `key` is the source's own identification of a replica: stable for as long as the replica lives, never
       used again for another one. Only the fleet turns it into an identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from metadata_center.addresses import Address


@dataclass(frozen=True, slots=True)
class Listed:
    """One endpoint as a source lists it.

    Attributes:
        key: Which replica it is, for this source; the same in each cluster that it is listed in.
        address: An IP address and a port.
        weight: Relative capacity, > 0.
        labels: Rules select by them; see `Endpoint.carries`.
        metadata: Free for the operator.
        draining: True takes no new requests and finishes those it has.
        rank: Data-parallel rank behind the address, >= 0.
        locality: Region, zone and sub-zone, joined by `/`; empty if it is not known.
        ready: False takes no new requests for now; what runs there goes on.
    """

    key: str
    address: Address
    weight: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False
    rank: int = 0
    locality: str = ""
    ready: bool = True

    @property
    def usable(self) -> bool:
        """Its source says that it takes new requests."""
        return self.ready and not self.draining


Clusters = Mapping[str, Sequence[Listed]]
"""Cluster name to its endpoints, best known first: of two at one place, the first counts."""
