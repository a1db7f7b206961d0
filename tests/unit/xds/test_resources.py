"""What Envoy gets: bytes of clusters and assignments, and which of them when.

Resources are read back with the protobuf runtime and Envoy's own descriptors, not with the library
that wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.extensions.load_balancing_policies.least_request.v3 import least_request_pb2
from envoy.extensions.load_balancing_policies.override_host.v3 import override_host_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, tls_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy_data_plane.envoy.service.discovery import v3 as discovery_v3
from envoy_data_plane.google import rpc
from hypothesis import given
from hypothesis import strategies as st

from extproc.health.states import HealthState
from extproc.values.endpoints import Endpoint
from extproc.xds import delta
from extproc.xds.cluster_encoding import encode
from extproc.xds.cluster_kinds import UpstreamTls
from extproc.xds.delta import DeltaStream, Nack, ResourceStore, SubscriptionLimitError
from extproc.xds.resources import cluster_resources, load_assignments
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey


def endpoint(key: str, *, weight: int = 1, draining: bool = False) -> Endpoint:
    """An endpoint of the configuration."""
    return Endpoint(EndpointKey(f"uid/{key}"), "m", Address.parse(key), weight=weight, draining=draining)


def healthy(_: EndpointKey) -> HealthState | None:
    """Every endpoint is healthy."""
    return HealthState.HEALTHY


def read_cluster(body: bytes) -> Any:
    """A cluster as Envoy reads it."""
    return cluster_pb2.Cluster.FromString(body)


def request(type_url: str, **fields: Any) -> Any:
    """A request as the stream gets it: through the wire format."""
    return discovery_pb2.DeltaDiscoveryRequest.FromString(
        bytes(discovery_v3.DeltaDiscoveryRequest(type_url=type_url, **fields))
    )


def sent(stream: DeltaStream) -> list[tuple[str, list[str], list[str]]]:
    """Due responses as (last word of the type, sent names, removed names)."""
    return [
        (r.type_url.rpartition(".")[2], [resource.name for resource in r.resources], r.removed_resources)
        for r in stream.responses()
    ]


def replaced(built: ResourceStore, type_url: str, bodies: Mapping[str, bytes]) -> bool:
    """These are all resources of the type now; True if anything differs."""
    return built.update(type_url, {**dict.fromkeys(built.resources(type_url)), **bodies})


def store(**clusters: bytes) -> ResourceStore:
    """A store with equally named clusters and assignments."""
    built = ResourceStore()
    replaced(built, CLUSTER_TYPE, clusters)
    replaced(built, ASSIGNMENT_TYPE, clusters)
    return built


def connected(resources: ResourceStore, *names: str) -> DeltaStream:
    """A stream that has everything and acknowledged it."""
    stream = DeltaStream(resources)
    stream.receive(request(CLUSTER_TYPE))
    (clusters,) = stream.responses()
    stream.receive(request(CLUSTER_TYPE, response_nonce=clusters.nonce))
    stream.receive(request(ASSIGNMENT_TYPE, resource_names_subscribe=list(names)))
    stream.responses()
    return stream


def test_cluster_takes_its_host_from_metadata_only() -> None:
    """The host list comes from dynamic metadata, never a header, and falls back to least request."""
    cluster = read_cluster(cluster_resources(["m"], {}, encode)["m"])
    (policy,) = cluster.load_balancing_policy.policies
    override = override_host_pb2.OverrideHost()
    assert policy.typed_extension_config.typed_config.Unpack(override)
    (source,) = override.override_host_sources
    assert source.header == ""
    assert (source.metadata.key, [s.key for s in source.metadata.path]) == (
        "envoy.lb",
        ["x-gateway-destination-endpoint"],
    )
    (fallback,) = override.fallback_policy.policies
    assert fallback.typed_extension_config.typed_config.Is(least_request_pb2.LeastRequest.DESCRIPTOR)


def test_cluster_limits_and_times() -> None:
    """Nothing is shed by circuit breakers, and idle connections close before the engine closes them."""
    cluster = read_cluster(cluster_resources(["m"], {}, encode)["m"])
    (limits,) = cluster.circuit_breakers.thresholds
    assert {limits.max_connections.value, limits.max_requests.value, limits.max_retries.value} == {100_000}
    assert cluster.connect_timeout.ToMilliseconds() == 500
    assert cluster.common_lb_config.HasField("update_merge_window")
    assert cluster.common_lb_config.update_merge_window.ToMilliseconds() == 0
    options = http_protocol_options_pb2.HttpProtocolOptions()
    (packed,) = cluster.typed_extension_protocol_options.values()
    assert packed.Unpack(options)
    assert options.common_http_protocol_options.idle_timeout.seconds == 4
    assert options.explicit_http_config.HasField("http_protocol_options")


def test_outlier_detection_ignores_statuses() -> None:
    """Envoy ejects for its fallback on connection failures alone, and at most half of the hosts."""
    detection = read_cluster(cluster_resources(["m"], {}, encode)["m"]).outlier_detection
    assert detection.split_external_local_origin_errors
    assert detection.HasField("enforcing_consecutive_5xx")
    assert detection.enforcing_consecutive_5xx.value == 0
    assert detection.max_ejection_percent.value == 50


def test_model_alias_shares_the_endpoints_of_its_cluster() -> None:
    """Each model gets a cluster of its own name that subscribes to the real cluster's assignment."""
    resources = cluster_resources(["m"], {"gpt": "m"}, encode)
    assert list(resources) == ["m", "model:gpt"]
    alias = read_cluster(resources["model:gpt"])
    assert alias.name == "model:gpt"
    assert alias.eds_cluster_config.service_name == "m"
    assert alias.eds_cluster_config.eds_config.HasField("ads")


def test_a_cluster_named_like_an_alias_stays_itself() -> None:
    """An operator's cluster is never replaced by an alias."""
    resources = cluster_resources(["m", "model:gpt"], {"gpt": "m"}, encode)
    assert read_cluster(resources["model:gpt"]).eds_cluster_config.service_name == "model:gpt"


def test_assignment_carries_weight_and_health() -> None:
    """Ejected becomes UNHEALTHY and draining DRAINING, so that Envoy's own fallback avoids both."""
    states = {EndpointKey(f"uid/10.0.0.{i}:80"): HealthState.EJECTED for i in (2, 3)}
    endpoints = [
        endpoint("[2001:db8::1]:8000", weight=3),
        endpoint("10.0.0.3:80", draining=True),
        endpoint("10.0.0.2:80"),
    ]
    body = load_assignments({"m": endpoints}, states.get)["m"]
    assignment = endpoint_pb2.ClusterLoadAssignment.FromString(body)
    assert assignment.cluster_name == "m"
    (locality,) = assignment.endpoints
    assert [
        (
            e.endpoint.address.socket_address.address,
            e.endpoint.address.socket_address.port_value,
            e.load_balancing_weight.value,
            e.health_status,
        )
        for e in locality.lb_endpoints
    ] == [("10.0.0.2", 80, 1, 2), ("10.0.0.3", 80, 1, 3), ("2001:db8::1", 8000, 3, 1)]


@given(st.permutations([f"10.0.0.{i}:80" for i in range(6)]))
def test_bytes_do_not_depend_on_order(keys: list[str]) -> None:
    """Workers that read the same configuration in another order publish the same versions."""
    body = load_assignments({"m": [endpoint(key) for key in keys]}, healthy)["m"]
    assert body == load_assignments({"m": [endpoint(key) for key in sorted(keys)]}, healthy)["m"]


def test_replace_says_whether_anything_changed() -> None:
    """Publishing equal bytes is no change; versions are the xxh3 of the bytes; unknown types raise."""
    built = store(a=b"1")
    assert not replaced(built, CLUSTER_TYPE, {"a": b"1"})
    before = built.resources(CLUSTER_TYPE)
    assert replaced(built, CLUSTER_TYPE, {"a": b"2"})
    assert before["a"].body == b"1"
    assert built.resources(CLUSTER_TYPE)["a"].version != before["a"].version
    assert before["a"].version == "65cd25028f98f158"
    with pytest.raises(KeyError):
        replaced(built, "type.googleapis.com/unknown", {})


def test_clusters_go_before_assignments() -> None:
    """One publication that changes both is sent in the order in which Envoy can use it."""
    built = store(a=b"1")
    stream = connected(built, "a")
    assert sent(stream) == []
    replaced(built, ASSIGNMENT_TYPE, {"a": b"2"})
    replaced(built, CLUSTER_TYPE, {"a": b"1", "b": b"1"})
    assert sent(stream) == [("Cluster", ["b"], []), ("ClusterLoadAssignment", ["a"], [])]
    assert sent(stream) == []


def test_only_subscribed_assignments_are_sent() -> None:
    """Clusters are subscribed to by wildcard, assignments by name."""
    stream = connected(store(a=b"1", b=b"1"), "a")
    assert sent(stream) == []
    stream.receive(request(ASSIGNMENT_TYPE, resource_names_subscribe=["b"]))
    assert sent(stream) == [("ClusterLoadAssignment", ["b"], [])]


def test_removal_is_sent_once() -> None:
    """A resource that is gone is named in removed_resources, and comes back when it is published."""
    built = store(a=b"1", b=b"1")
    stream = connected(built, "a", "b")
    replaced(built, CLUSTER_TYPE, {"a": b"1"})
    replaced(built, ASSIGNMENT_TYPE, {"a": b"1"})
    assert sent(stream) == [("Cluster", [], ["b"]), ("ClusterLoadAssignment", [], ["b"])]
    assert sent(stream) == []
    replaced(built, ASSIGNMENT_TYPE, {"a": b"1", "b": b"1"})
    assert sent(stream) == [("ClusterLoadAssignment", ["b"], [])]


def test_subscription_to_nothing_is_answered() -> None:
    """A name that does not exist is reported as removed, once, so that Envoy stops waiting."""
    stream = DeltaStream(store())
    stream.receive(request(ASSIGNMENT_TYPE, resource_names_subscribe=["ghost"]))
    assert sent(stream) == [("ClusterLoadAssignment", [], ["ghost"])]
    assert sent(stream) == []


def test_empty_wildcard_is_answered_once() -> None:
    """Envoy's start waits for the first clusters, even if there are none."""
    stream = DeltaStream(store())
    stream.receive(request(CLUSTER_TYPE))
    assert sent(stream) == [("Cluster", [], [])]
    assert sent(stream) == []


def test_reconnect_resends_only_what_changed() -> None:
    """Versions that Envoy brings along are not sent again; changed and vanished ones are."""
    built = store(a=b"1", b=b"1", c=b"1")
    versions = {name: r.version for name, r in built.resources(ASSIGNMENT_TYPE).items()}
    replaced(built, ASSIGNMENT_TYPE, {"a": b"1", "b": b"2"})
    stream = DeltaStream(built)
    stream.receive(
        request(ASSIGNMENT_TYPE, resource_names_subscribe=["a", "b", "c"], initial_resource_versions=versions)
    )
    assert sent(stream) == [("ClusterLoadAssignment", ["b"], ["c"])]


def test_changed_cluster_gets_its_assignment_again() -> None:
    """A response with clusters is followed by the assignments, even unchanged ones Envoy has."""
    built = store(a=b"1")
    stream = connected(built, "a")
    replaced(built, CLUSTER_TYPE, {"a": b"1", "model:x": b"alias of a"})
    assert sent(stream) == [("Cluster", ["model:x"], []), ("ClusterLoadAssignment", ["a"], [])]
    assert sent(stream) == []


def test_reconnect_with_changed_cluster_resends_assignments() -> None:
    """Assignments Envoy claims to have are sent anyway if this stream has changed a cluster before."""
    built = store(a=b"1")
    versions = {name: r.version for name, r in built.resources(ASSIGNMENT_TYPE).items()}
    stream = DeltaStream(built)
    stream.receive(request(CLUSTER_TYPE))
    stream.responses()
    stream.receive(
        request(ASSIGNMENT_TYPE, resource_names_subscribe=["a"], initial_resource_versions=versions)
    )
    assert sent(stream) == [("ClusterLoadAssignment", ["a"], [])]


def test_refused_version_is_not_sent_again() -> None:
    """A NACK is returned with Envoy's words and followed by the next version only."""
    built = store(a=b"1")
    stream = connected(built, "a")
    replaced(built, ASSIGNMENT_TYPE, {"a": b"bad"})
    (response,) = stream.responses()
    nack = stream.receive(
        request(
            ASSIGNMENT_TYPE,
            response_nonce=response.nonce,
            error_detail=rpc.Status(code=13, message="a: malformed"),
        )
    )
    assert nack == Nack(ASSIGNMENT_TYPE, "a: malformed")
    assert sent(stream) == []
    replaced(built, ASSIGNMENT_TYPE, {"a": b"good"})
    assert sent(stream) == [("ClusterLoadAssignment", ["a"], [])]


def test_it_serves_a_cluster_by_the_latest_endpoints_that_it_answered() -> None:
    """Not before it has the cluster, nor while something newer is to be sent or on its way."""
    built = store(a=b"1")
    stream = DeltaStream(built)
    stream.receive(request(CLUSTER_TYPE))
    (clusters,) = stream.responses()
    stream.receive(request(ASSIGNMENT_TYPE, resource_names_subscribe=["a"]))
    (first,) = stream.responses()
    stream.receive(request(ASSIGNMENT_TYPE, response_nonce=first.nonce))
    assert not stream.serves("a")
    stream.receive(request(CLUSTER_TYPE, response_nonce=clusters.nonce))
    assert stream.serves("a")
    replaced(built, ASSIGNMENT_TYPE, {"a": b"2"})
    assert not stream.serves("a")
    (second,) = stream.responses()
    assert not stream.serves("a")
    stream.receive(request(ASSIGNMENT_TYPE, response_nonce=first.nonce))
    assert not stream.serves("a"), "an answer to another one"
    stream.receive(request(ASSIGNMENT_TYPE, response_nonce=second.nonce))
    assert stream.serves("a")
    replaced(built, ASSIGNMENT_TYPE, {})
    assert not stream.serves("a")


def test_unsubscribed_and_asked_again() -> None:
    """An unsubscribed name is left alone; a name subscribed to again is sent again."""
    built = store(a=b"1")
    stream = connected(built, "a")
    stream.receive(request(ASSIGNMENT_TYPE, resource_names_unsubscribe=["a"]))
    replaced(built, ASSIGNMENT_TYPE, {"a": b"2"})
    assert sent(stream) == []
    stream.receive(request(ASSIGNMENT_TYPE, resource_names_subscribe=["a"]))
    assert sent(stream) == [("ClusterLoadAssignment", ["a"], [])]
    stream.receive(request(ASSIGNMENT_TYPE, resource_names_subscribe=["a"]))
    assert sent(stream) == [("ClusterLoadAssignment", ["a"], [])]


def test_explicit_wildcard() -> None:
    """The name `*` subscribes to everything of a type and can be taken back."""
    built = store(a=b"1")
    stream = DeltaStream(built)
    stream.receive(request(CLUSTER_TYPE, resource_names_subscribe=["*"]))
    assert sent(stream) == [("Cluster", ["a"], [])]
    stream.receive(request(CLUSTER_TYPE, resource_names_unsubscribe=["*"]))
    replaced(built, CLUSTER_TYPE, {"a": b"1", "b": b"1"})
    assert sent(stream) == []


def test_other_types_are_ignored() -> None:
    """A type that is not served neither fails the stream nor costs memory."""
    stream = DeltaStream(store(a=b"1"))
    assert stream.receive(request("type.googleapis.com/envoy.config.listener.v3.Listener")) is None
    assert sent(stream) == []


def test_subscriptions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that asks for more than the limit is refused."""
    monkeypatch.setattr(delta, "MAX_NAMES", 2)
    stream = DeltaStream(store())
    with pytest.raises(SubscriptionLimitError):
        stream.receive(request(ASSIGNMENT_TYPE, resource_names_subscribe=["a", "b", "c"]))


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.binary(max_size=2)), max_size=8))
def test_envoy_converges(publications: list[dict[str, bytes]]) -> None:
    """Whatever is published, applying the responses in order leaves exactly the last publication."""
    built, have = ResourceStore(), dict[str, bytes]()
    stream = DeltaStream(built)
    stream.receive(request(CLUSTER_TYPE))
    for publication in publications:
        replaced(built, CLUSTER_TYPE, publication)
        for response in stream.responses():
            have.update({r.name: r.resource.value for r in response.resources})
            for name in response.removed_resources:
                del have[name]
        assert have == publication


def test_an_alias_is_bounded_per_endpoint_and_a_cluster_is_not() -> None:
    """What Tokenway placed was admitted by it; what Envoy sends alone was admitted by no gateway."""
    resources = cluster_resources(["m"], {"llama": "m"}, encode, max_open_requests=7)
    alias, plain = read_cluster(resources["model:llama"]), read_cluster(resources["m"])
    (bound,) = alias.circuit_breakers.per_host_thresholds
    assert bound.max_connections.value == 7
    assert alias.circuit_breakers.thresholds[0].max_pending_requests.value == 7
    assert not plain.circuit_breakers.per_host_thresholds


def test_tls_is_of_the_cluster_and_its_aliases() -> None:
    """Certificate authority, exact name and SNI; a pool of a model's own has its cluster's."""
    tls = {"m": UpstreamTls("/ca.pem", "engine.internal", "/c.pem", "/k.pem")}
    resources = cluster_resources(["m", "other", "model:part"], {"llama": "m", "part": "m"}, encode, tls=tls)
    for name in ("m", "model:llama", "model:part"):
        context = tls_pb2.UpstreamTlsContext()
        assert read_cluster(resources[name]).transport_socket.typed_config.Unpack(context)
        common = context.common_tls_context
        (match,) = common.validation_context.match_typed_subject_alt_names
        assert (context.sni, match.matcher.exact) == ("engine.internal", "engine.internal")
        assert match.san_type == common_pb2.SubjectAltNameMatcher.DNS
        assert common.validation_context.trusted_ca.filename == "/ca.pem"
        assert common.tls_certificates[0].private_key.filename == "/k.pem"
    assert not read_cluster(resources["other"]).HasField("transport_socket")
