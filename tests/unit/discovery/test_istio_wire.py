"""Delta ADS messages: what is read of them, and what any bytes at all may do."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TypeVar

import pytest
from envoy.config.core.v3 import address_pb2, base_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from extproc.config.sections.discovery import IstioDiscovery
from extproc.discovery.istio import wire
from extproc.discovery.istio.messages import (
    ASSIGNMENTS,
    CLUSTERS,
    MalformedError,
    Member,
    Request,
    Response,
    Workload,
)
from extproc.server.sources.istio_source import node_of
from tests.mesh import SERVICE, assignment, assignments, cluster, clusters, encoded, lb_endpoint

T = TypeVar("T")

DECODER = wire.ProtobufDecoder()


def members(*endpoints: endpoint_components_pb2.LbEndpoint) -> tuple[Member, ...]:
    """As they are read."""
    return DECODER.assignment(assignment(SERVICE, *endpoints).SerializeToString())


def test_a_response_is_read_as_it_was_sent() -> None:
    """Names, bodies, removals, nonce."""
    for response in (
        clusters("c1", SERVICE, removed=["gone"]),
        assignments("e1", assignment(SERVICE, "10.0.0.1")),
    ):
        assert wire.decode(encoded(response)) == response


def test_requests_say_what_they_should() -> None:
    """The first has the node; a refusal has its reason, cut where it is long."""
    node = wire.node("router~127.0.0.1~a.b~b.svc.cluster.local", "tokenway", {"NAMESPACE": "b"})
    first = discovery_pb2.DeltaDiscoveryRequest.FromString(
        wire.encode(Request(CLUSTERS, is_first=True), node)
    )
    assert first.node.id == "router~127.0.0.1~a.b~b.svc.cluster.local"
    assert first.node.metadata["NAMESPACE"] == "b"
    assert not first.resource_names_subscribe
    later = Request(ASSIGNMENTS, ("a",), ("b",))
    asked = discovery_pb2.DeltaDiscoveryRequest.FromString(wire.encode(later, node))
    assert not asked.HasField("node")
    assert (list(asked.resource_names_subscribe), list(asked.resource_names_unsubscribe)) == (["a"], ["b"])
    assert not asked.HasField("error_detail")
    refusal = Request(ASSIGNMENTS, nonce="n", error="x" * 100_000)
    refused = discovery_pb2.DeltaDiscoveryRequest.FromString(wire.encode(refusal, node))
    assert (refused.response_nonce, refused.error_detail.code) == ("n", 3)
    assert refused.error_detail.message == "x" * 4_096


def test_who_asks() -> None:
    """A router of its namespace; its name has no dot and no tilde, which have a meaning in a node's id."""
    settings = IstioDiscovery(address="127.0.0.1:15010", namespace="models", labels={"istio": "gw"})
    node = base_pb2.Node.FromString(node_of(settings, "host.example~1", 2))
    assert node.id == "router~127.0.0.1~host-example-1-2.models~models.svc.cluster.local"
    assert json_format.MessageToDict(node.metadata) == {
        "NAMESPACE": "models",
        "CLUSTER_ID": "Kubernetes",
        "DISABLE_HBONE_SEND": "true",
        "LABELS": {"istio": "gw"},
    }


def test_where_members_are() -> None:
    """In EDS, or in the cluster itself."""
    assert DECODER.cluster(cluster(SERVICE).SerializeToString()).members is None
    dns = cluster(SERVICE, "STRICT_DNS", lb_endpoint("a.example", 80))
    assert DECODER.cluster(dns.SerializeToString()).members == (Member("a.example", 80),)
    assert DECODER.cluster(cluster(SERVICE, "ORIGINAL_DST").SerializeToString()).members == ()


@pytest.mark.parametrize(
    ("health", "ready", "draining"),
    [
        ("UNKNOWN", True, False),
        ("HEALTHY", True, False),
        ("DEGRADED", True, False),
        ("UNHEALTHY", False, False),
        ("TIMEOUT", False, False),
        ("DRAINING", True, True),
    ],
)
def test_health(health: str, ready: bool, draining: bool) -> None:
    """What is not well is not chosen, what drains finishes."""
    (member,) = members(lb_endpoint("10.0.0.1", health=health))
    assert (member.ready, member.draining) == (ready, draining)


def test_weights_fit_what_envoy_adds_up() -> None:
    """0 counts as 1; one that is larger than any capacity is cut."""
    found = members(*(lb_endpoint("10.0.0.1", weight=weight) for weight in (0, 5, 2**32 - 1)))
    assert [member.weight for member in found] == [1, 5, wire.MAX_WEIGHT]


def test_addresses_have_one_spelling() -> None:
    """IPv6 in its shortest form; names in lower case, without their last dot."""
    found = members(lb_endpoint("2001:DB8:0::1"), lb_endpoint("Engine.Example."))
    assert [member.host for member in found] == ["2001:db8::1", "engine.example"]


@pytest.mark.parametrize(
    "host",
    ["", ".", "a b", "10.0.0.256", "fe80::1%eth0", "a..b", "x" * 64, "a." * 127 + "a", "é.example", "a/b"],
)
def test_what_is_no_address_spoils_its_resource(host: str) -> None:
    """It would send requests elsewhere, or nowhere."""
    with pytest.raises(MalformedError):
        members(lb_endpoint(host))


def test_what_is_not_for_us_is_left_out() -> None:
    """Pipes and tunnels are no engines."""
    pipe = endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(
            address=address_pb2.Address(pipe=address_pb2.Pipe(path="/x"))
        )
    )
    tunnel = endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(
            address=address_pb2.Address(
                envoy_internal_address=address_pb2.EnvoyInternalAddress(server_listener_name="x")
            )
        )
    )
    assert members(pipe, tunnel, endpoint_components_pb2.LbEndpoint(endpoint_name="x")) == ()


@pytest.mark.parametrize("text", ["", "a;b", "a;b;c;d;e;f", "a;b;c\n;d;e", "x" * 300 + ";;;;"])
def test_a_workload_that_reads_otherwise_is_none(text: str) -> None:
    """Then the address is the identity."""
    (member,) = members(lb_endpoint("10.0.0.1", workload=text))
    assert member.workload == Workload()


def test_localities_end_where_they_are_known() -> None:
    """Region, zone and sub-zone."""
    for parts, text in ((("a", "b", "c"), "a/b/c"), (("a", "", ""), "a"), (("", "", ""), "")):
        group = assignment(SERVICE, "10.0.0.1", locality=parts)
        (member,) = DECODER.assignment(group.SerializeToString())
        assert member.locality == text


def in_pauses(reading: Generator[None, None, T]) -> tuple[int, T]:
    """How often it paused, and what it came to."""
    pauses = 0
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return pauses, end.value
        pauses += 1


LARGE = assignment(
    SERVICE,
    *(
        lb_endpoint(f"10.0.{n >> 8}.{n & 255}", weight=1 + n % 3, workload=f"w-{n};a;b;c;d")
        for n in range(600)
    ),
    locality=("eu", "eu-1", "b"),
)


def responded(message: bytes) -> Response:
    """Read with pauses."""
    return in_pauses(wire.decoding(message))[1]


def assigned(body: bytes) -> tuple[Member, ...]:
    """Read with pauses."""
    decoder = wire.ProtobufDecoder()
    list(decoder.preparing([body]))
    return decoder.assignment(body)


def test_a_large_message_is_read_with_pauses_and_says_the_same() -> None:
    """A response of many resources, and an assignment of many members; small ones are read at once."""
    names = [f"outbound|80||{n}.internal" for n in range(1_000)]
    response = replace(clusters("c1", *names, removed=["gone", "too"]), nonce="n" * 40)
    pauses, read = in_pauses(wire.decoding(encoded(response)))
    assert pauses > 5
    assert read == response == wire.decode(encoded(response))
    assert in_pauses(wire.decoding(encoded(clusters("c1", SERVICE)))) == (0, clusters("c1", SERVICE))
    body, decoder = LARGE.SerializeToString(), wire.ProtobufDecoder()
    assert len(list(decoder.preparing([b"small", body]))) > 10
    prepared = decoder.assignment(body)
    assert prepared == DECODER.assignment(body)
    assert len(prepared) == 600
    assert not decoder._prepared


@given(st.data())
def test_a_large_message_that_is_spoilt_is_refused_or_says_the_same(data: st.DataObject) -> None:
    """Read with pauses it is no more lenient about anything that counts here, and raises nothing else."""
    whole, slowly, at_once = data.draw(
        st.sampled_from(
            [
                (encoded(assignments("e1", LARGE)), responded, wire.decode),
                (LARGE.SerializeToString(), assigned, DECODER.assignment),
            ]
        )
    )
    at = data.draw(st.integers(0, len(whole) - 1))
    spoilt = whole[:at] + data.draw(st.binary(max_size=2)) + whole[at + 1 :]
    try:
        expected = at_once(spoilt)
    except MalformedError:
        with pytest.raises(MalformedError):
            slowly(spoilt)
    else:
        assert slowly(spoilt) == expected


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Nothing else is raised."""
    for read in (wire.decode, DECODER.cluster, DECODER.assignment):
        try:
            read(body)
        except MalformedError:
            continue


@given(st.data())
def test_any_spoilt_message_is_read_or_refused(data: st.DataObject) -> None:
    """A byte of a good one replaced, or its end cut off."""
    whole = endpoint_pb2.ClusterLoadAssignment(
        cluster_name=SERVICE,
        endpoints=assignment(SERVICE, lb_endpoint("10.0.0.1", weight=3, workload="a;b;c;d;e")).endpoints,
    ).SerializeToString()
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.binary(max_size=2))
    spoilt = whole[:at] + byte + whole[at + 1 :]
    try:
        found = DECODER.assignment(spoilt)
    except MalformedError:
        return
    assert all(0 < member.port <= 65_535 and 0 < member.weight <= wire.MAX_WEIGHT for member in found)
