"""Engine replicas as the fleet has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

SUBSET_LABEL: Final = "subset"
"""The subsets of Istio's DestinationRule that an endpoint is in, sorted, joined by `,`."""

MAX_NUM_SEQS_LABEL: Final = "max_num_seqs"
"""How many sequences the engine runs at once, all ranks behind its address together: vLLM's `--max-num-seqs`,
SGLang's `--max-running-requests`."""

MOST_SEQUENCES: Final = 1 << 16
"""That a label may say: a hundred times what engines run."""


def carries(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """True if all of `wanted` are among `labels`; a value may list several, joined by `,`."""
    return all(
        (has := labels.get(name)) is not None and (has == value or value in has.split(","))
        for name, value in wanted.items()
    )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine replica in one cluster.

    Attributes:
        key: Its identity, the same in every cluster it serves: made by the fleet, opaque to all else.
        cluster: Envoy's name for the cluster.
        address: Where it is reached; may change while the identity stays.
        weight: Relative capacity, > 0.
        labels: Rules select by them; see `carries`.
        metadata: Free for the operator; shown, and read where a document says so.
        draining: True takes no new requests and finishes those it has.
        rank: Data-parallel rank behind the address, >= 0.
        locality: Region, zone and sub-zone, joined by `/`, as far as the source says; else empty.
        source: The source that lists it.
        ready: False if its source says that it takes no new requests for now.
    """

    key: EndpointKey
    cluster: str
    address: Address
    weight: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False
    rank: int = 0
    locality: str = ""
    source: str = ""
    ready: bool = True

    @property
    def usable(self) -> bool:
        """Its source says that it takes new requests."""
        return self.ready and not self.draining

    def carries(self, wanted: Mapping[str, str]) -> bool:
        """True if it has all these labels, as of `carries`."""
        return carries(self.labels, wanted)

    @property
    def max_num_seqs(self) -> int:
        """What its label says of `MAX_NUM_SEQS_LABEL`; 0 if it has none, or one that is no such number."""
        text = self.labels.get(MAX_NUM_SEQS_LABEL, "")
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0
        return number if number <= MOST_SEQUENCES else 0
