"""Which clusters Envoy's words of refusal are of."""

from __future__ import annotations

import pytest
from envoy.service.discovery.v3 import discovery_pb2 as pb

from extproc.xds.delta import DeltaStream, ResourceStore
from extproc.xds.type_urls import CLUSTER_TYPE


@pytest.mark.parametrize(
    ("detail", "refused"),
    [
        ("Error adding/updating cluster(s) x:m: no", {"x:m"}),
        ("Error adding/updating cluster(s) m: no, xm: no", {"m", "xm"}),
        ("m: no", {"m"}),
        ("too much", {"m", "x:m", "xm"}),
    ],
)
def test_a_name_that_ends_another_is_not_meant(detail: str, refused: set[str]) -> None:
    """Of one response, Envoy took what it does not name."""
    store = ResourceStore()
    store.update(CLUSTER_TYPE, {"m": b"1", "x:m": b"2", "xm": b"3"})
    stream = DeltaStream(store)
    stream.receive(pb.DeltaDiscoveryRequest(type_url=CLUSTER_TYPE))
    [response] = stream.responses()
    nack = pb.DeltaDiscoveryRequest(type_url=CLUSTER_TYPE, response_nonce=response.nonce)
    nack.error_detail.message = detail
    said = stream.receive(nack)
    assert said is not None
    assert set(said.clusters) == refused == stream.refused.keys()
    assert stream.had == {"m", "x:m", "xm"} - refused
