"""Answers in the dialect of an Istio gateway: those of our bootstrap, but for how the cluster is named."""

from __future__ import annotations

from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.json_format import MessageToDict

from extproc.protocol.bootstrap_dialect import BootstrapDialect
from extproc.protocol.istio_dialect import IstioDialect
from extproc.values.exchange import PassTo
from extproc.values.headers import CLUSTER_HEADER
from extproc.values.placements import Decision, Plan
from extproc.values.requests import Operation
from metadata_center.types import RequestId

CLUSTER = "outbound|8000||llama.models.internal"
KEYS = ("10.0.0.1:8000", "10.0.0.2:8000")


def answer(dialect: BootstrapDialect, plan: Plan, *, shows_id: bool = False) -> Any:
    """To the body of a chat, as Envoy reads it."""
    made = Decision(RequestId("id-1"), Operation.CHAT, True, plan, shows_id=shows_id)
    return pb.ProcessingResponse.FromString(dialect.decision(made, to_trailers=False))


def headers(message: Any, field: str = "request_body") -> dict[str, str]:
    """What it sets."""
    common = getattr(message, field).response
    assert common.clear_route_cache
    return {
        option.header.key: option.header.raw_value.decode() for option in common.header_mutation.set_headers
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"retries": 1, "pinned": True}, {"timeout_s": 9.0}, {"endpoints": ()}, {"charged": False}],
)
def test_the_cluster_is_a_header_and_all_else_is_as_ever(changes: dict[str, Any]) -> None:
    """Envoy reads it when it chooses the route anew; there are no groups, which istio-proxy does not know."""
    theirs = answer(IstioDialect("0.a"), Plan(**{"cluster": CLUSTER, "endpoints": KEYS, **changes}))
    ours = answer(BootstrapDialect("0.a"), Plan(**{"cluster": CLUSTER, "endpoints": KEYS, **changes}))
    assert headers(theirs) == {**headers(ours), CLUSTER_HEADER: CLUSTER}
    metadata = MessageToDict(ours.dynamic_metadata)
    del metadata["tokenway.route"]
    assert MessageToDict(theirs.dynamic_metadata) == metadata


def test_what_goes_past_us_has_its_cluster_too() -> None:
    """Answers to headers alone, for requests without a body."""
    raw = IstioDialect("0.a").pass_to(PassTo(Plan(CLUSTER, charged=False)))
    message = pb.ProcessingResponse.FromString(raw)
    assert headers(message, "request_headers")[CLUSTER_HEADER] == CLUSTER


def test_two_clusters_are_two_answers() -> None:
    """What is kept of one is not used for the other."""
    dialect = IstioDialect("0.a")
    other = "outbound|8000||other.models.internal"
    for name in (CLUSTER, other, CLUSTER):
        assert headers(answer(dialect, Plan(name, KEYS)))[CLUSTER_HEADER] == name


def test_the_id_is_shown_by_metadata() -> None:
    """As ever."""
    shown = answer(IstioDialect("0.a"), Plan(CLUSTER, KEYS), shows_id=True)
    assert MessageToDict(shown.dynamic_metadata)["tokenway"] == {"debug": "id-1"}
