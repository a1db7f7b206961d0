"""What Envoy is to have of a fleet that changes: each change by itself comes to what all at once would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3.health_check_pb2 import HealthStatus
from envoy.config.endpoint.v3 import endpoint_pb2
from hypothesis import given
from hypothesis import strategies as st

from extproc.config.schema import Config
from extproc.health.states import HealthState
from extproc.values.endpoints import Endpoint
from extproc.xds.cluster_encoding import encode
from extproc.xds.cluster_kinds import ClusterKinds
from extproc.xds.leaving import FORMER_S, MAX_LEAVING, MOST_FORMER, FormerEndpoints, Leaving
from extproc.xds.publications import ALL_NAMES, Publications, Resources
from extproc.xds.resources import load_assignments
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

CLUSTERS = ("a", "b", "c", "model:one")
MODELS: dict[str, Any] = {
    "one": {"rules": [{"cluster": "a"}], "aliases": ["uno"]},
    "two": {"rules": [{"cluster": "b", "subset": {"pool": "right"}}]},
    "three": {"rules": [{"cluster": "b", "headers": {"x": "y"}}]},
    "four": {"rules": [{"cluster": "a"}]},
}
ANY = {"*": {"rules": [{"cluster": "c"}]}}


def endpoint(cluster: str, number: int) -> Endpoint:
    """One of a cluster."""
    key = EndpointKey(f"10.0.0.{number}:80")
    labels = {"pool": "right"} if number % 2 else {}
    return Endpoint(key, cluster, Address(f"10.0.0.{number}", 80), 1, labels)


def applied(had: Resources, news: Resources) -> Resources:
    """What there is after news."""
    after = {type_url: dict(bodies) for type_url, bodies in had.items()}
    for type_url, bodies in news.items():
        after.setdefault(type_url, {}).update(bodies)
    return {kind: {name: body for name, body in of.items() if body is not None} for kind, of in after.items()}


@given(
    st.booleans(),
    st.lists(
        st.tuples(
            st.sampled_from(CLUSTERS), st.none() | st.lists(st.integers(1, 4), max_size=3, unique=True)
        ),
        max_size=12,
    ),
)
def test_changes_one_by_one_are_the_same_as_all_at_once(
    has_any: bool, steps: list[tuple[str, list[int] | None]]
) -> None:
    """Clusters come, go and change, one that is named like an alias too; models share them, or a part."""
    config = Config.model_validate({"models": {**MODELS, **(ANY if has_any else {})}})
    fleet: dict[str, Sequence[Endpoint]] = {}
    publications = Publications(fleet, lambda _: None, ClusterKinds(encode))
    have = applied({}, publications.configure(config))
    for name, members in steps:
        was = name in fleet
        fleet.pop(name, None)
        if members is not None:
            fleet[name] = [endpoint(name, number) for number in members]
        came_or_went = was != (name in fleet)
        have = applied(have, publications.update([name], came_or_went=came_or_went))
        assert have == applied(
            {}, Publications(fleet, lambda _: None, ClusterKinds(encode)).configure(config)
        )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["introduce", "come", "go", "configure"]),
            st.sampled_from(CLUSTERS),
            st.lists(st.integers(1, 4), max_size=3, unique=True),
        ),
        max_size=12,
    )
)
def test_what_is_introduced_is_there_beside_all_else_until_it_is_replaced(
    steps: list[tuple[str, str, list[int]]],
) -> None:
    """Whatever comes and goes meanwhile; nothing of it stays once another configuration is in force."""
    config = Config.model_validate({"models": MODELS})
    fleet: dict[str, Sequence[Endpoint]] = {}
    publications = Publications(fleet, lambda _: None, ClusterKinds(encode))
    have = applied({}, publications.configure(config))
    introduced: dict[str, Sequence[Endpoint]] = {}
    for step, name, members in steps:
        endpoints = [endpoint(name, number) for number in members]
        if step == "introduce":
            introduced = {} if name == "model:one" else {name: endpoints}
            have = applied(have, publications.introduce(config, {name: endpoints}))
        elif step == "configure":
            introduced = {}
            have = applied(have, publications.introduce(config, {}))
            have = applied(have, publications.configure(config))
        else:
            was = name in fleet
            fleet.pop(name, None)
            if step == "come":
                fleet[name] = endpoints
            have = applied(have, publications.update([name], came_or_went=was != (name in fleet)))
        alone = applied({}, Publications(fleet, lambda _: None, ClusterKinds(encode)).configure(config))
        assert have[CLUSTER_TYPE].keys() == alone[CLUSTER_TYPE].keys() | introduced.keys()
        assert {n: body for n, body in have[CLUSTER_TYPE].items() if n in alone[CLUSTER_TYPE]} == alone[
            CLUSTER_TYPE
        ]


def test_the_alias_of_no_name_is_there_while_every_model_has_its_own() -> None:
    """It comes with the last cluster that an open model waits for, and goes at once with the first."""
    config = Config.model_validate({"models": MODELS})
    fleet: dict[str, Sequence[Endpoint]] = {}
    publications = Publications(fleet, lambda _: None, ClusterKinds(encode))
    assert ALL_NAMES not in publications.configure(config)[CLUSTER_TYPE]
    fleet["a"] = [endpoint("a", 1)]
    assert ALL_NAMES not in publications.update(["a"], came_or_went=True)[CLUSTER_TYPE]
    fleet["b"] = [endpoint("b", 2)]
    came = publications.update(["b"], came_or_went=True)[CLUSTER_TYPE][ALL_NAMES]
    assert came is not None
    assert cluster_pb2.Cluster.FromString(came) == cluster_pb2.Cluster(name=ALL_NAMES)
    del fleet["a"]
    went = publications.update(["a"], came_or_went=True)
    assert went[CLUSTER_TYPE][ALL_NAMES] is None
    assert Leaving(60.0).held_back(went, 0.0)[CLUSTER_TYPE][ALL_NAMES] is None
    assert ALL_NAMES in publications.configure(Config())[CLUSTER_TYPE]
    fleet["c"] = [endpoint("c", 3)]  # `*`: all other names have aliases then
    with_any = Config.model_validate({"models": {**MODELS, **ANY}})
    assert ALL_NAMES in publications.configure(with_any)[CLUSTER_TYPE]


def test_a_cluster_that_goes_stays_a_while() -> None:
    """It and its assignment, as they were; one that comes back is not taken away, an alias goes at once."""
    leaving = Leaving(60.0)
    gone: Resources = {
        CLUSTER_TYPE: {"a": None, "b": None, "model:m": None, "c": b"c"},
        ASSIGNMENT_TYPE: {"a": None, "b": None, "c": b"c"},
    }
    assert leaving.next_s() is None
    sent = leaving.held_back(gone, 100.0)
    assert sent == {CLUSTER_TYPE: {"model:m": None, "c": b"c"}, ASSIGNMENT_TYPE: {"c": b"c"}}
    assert leaving.next_s() == 160.0
    back: Resources = {CLUSTER_TYPE: {"b": b"b"}, ASSIGNMENT_TYPE: {"b": b"b"}}
    assert leaving.held_back(back, 130.0) == back
    assert leaving.held_back({CLUSTER_TYPE: {"d": None}}, 130.0) == {CLUSTER_TYPE: {}}
    assert leaving.due(159.9) == {}
    assert leaving.due(160.0) == {CLUSTER_TYPE: {"a": None}, ASSIGNMENT_TYPE: {"a": None}}
    assert leaving.hurried(["a", "d"]) == {CLUSTER_TYPE: {"d": None}, ASSIGNMENT_TYPE: {"d": None}}
    assert leaving.next_s() is None


def test_so_many_stay_and_no_more() -> None:
    """What goes beyond the bound leaves at once, whoever lists and drops ever new names."""
    leaving = Leaving(60.0)
    many: Resources = {CLUSTER_TYPE: {str(number): None for number in range(MAX_LEAVING)}}
    assert leaving.held_back(many, 0.0) == {CLUSTER_TYPE: {}}
    assert leaving.held_back({CLUSTER_TYPE: {"0": None, "one more": None}}, 1.0) == {
        CLUSTER_TYPE: {"one more": None}
    }
    assert len(leaving.due(60.0)[CLUSTER_TYPE]) == MAX_LEAVING


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["10.1.2.3", "2001:db8::1", "255.255.255.255"]),
            st.integers(1, 65_535),
            st.integers(1, 1_000_000),
            st.sampled_from(HealthState),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda one: one[:2],
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=300),
)
def test_what_is_encoded_by_hand_is_read_by_the_library(
    hosts: list[tuple[str, int, int, HealthState]], name: str
) -> None:
    """Addresses, weights, health and long names; nothing is unknown to it."""
    states = {EndpointKey(f"{host}-{port}"): state for host, port, _, state in hosts}
    endpoints = [
        Endpoint(EndpointKey(f"{host}-{port}"), name, Address(host, port), weight)
        for host, port, weight, _ in hosts
    ]
    (body,) = load_assignments({name: endpoints}, states.get).values()
    read = endpoint_pb2.ClusterLoadAssignment.FromString(body)
    assert read.cluster_name == name
    found = {
        (
            one.endpoint.address.socket_address.address,
            one.endpoint.address.socket_address.port_value,
            one.load_balancing_weight.value,
        )
        for group in read.endpoints
        for one in group.lb_endpoints
    }
    assert found == {(host, port, weight) for host, port, weight, _ in hosts}
    read.DiscardUnknownFields()
    assert read.ByteSize() == len(body)


def test_endpoints_that_left_drain_in_the_assignment_of_their_cluster_alone() -> None:
    """Not in those of models that have a part of it, and not where another endpoint is now."""
    former = {"b": [Address("10.0.0.1", 80), Address("10.0.0.9", 80)]}
    config = Config.model_validate({"models": MODELS})
    fleet = {"b": (endpoint("b", 1), endpoint("b", 2))}
    publications = Publications(
        fleet, lambda _: None, ClusterKinds(encode), lambda name: former.get(name, ())
    )
    published = applied({}, publications.configure(config))[ASSIGNMENT_TYPE]

    def hosts(name: str) -> dict[str, str]:
        body = published[name]
        assert body is not None
        (locality,) = endpoint_pb2.ClusterLoadAssignment.FromString(body).endpoints
        return {
            one.endpoint.address.socket_address.address: HealthStatus.Name(one.health_status)
            for one in locality.lb_endpoints
        }

    assert hosts("b") == {"10.0.0.1": "HEALTHY", "10.0.0.2": "HEALTHY", "10.0.0.9": "DRAINING"}
    assert hosts("model:two") == {"10.0.0.1": "HEALTHY"}


def test_endpoints_that_left_stay_for_so_long() -> None:
    """Each its own time, anew when it leaves again; and so many of a cluster."""
    former = FormerEndpoints()
    one, other = Address("10.0.0.1", 80), Address("10.0.0.2", 80)
    former.add("a", one, 0.0)
    former.add("a", other, 1.0)
    former.add("b", one, 2.0)
    assert former.next_s() == FORMER_S
    former.add("a", one, 3.0)
    assert former.next_s() == 1.0 + FORMER_S
    assert former.due(0.5 + FORMER_S) == []
    assert former.due(2.0 + FORMER_S) == ["a", "b"]
    assert (set(former.of("a")), set(former.of("b"))) == ({one}, set())
    for number in range(MOST_FORMER):
        former.add("a", Address("10.0.1.1", number), 4.0)
    assert len(former.of("a")) == MOST_FORMER
    assert one not in former.of("a")
    assert former.due(4.0 + FORMER_S) == ["a"]
    assert former.next_s() is None
