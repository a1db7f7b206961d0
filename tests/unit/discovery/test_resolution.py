"""Addresses of the configuration → literal endpoints."""

from __future__ import annotations

from extproc.config.clusters import ClusterSpec, EndpointSpec
from extproc.discovery.listed import Listed
from extproc.discovery.resolution import host_names, literals, resolved
from metadata_center.addresses import Address

RECORDS = {"engines.test": ("10.0.0.1", "10.0.0.2", "2001:db8::1"), "one.test": ("10.0.0.1",)}


def cluster(name: str, *endpoints: EndpointSpec) -> ClusterSpec:
    """A cluster as written."""
    return ClusterSpec(name=name, endpoints=endpoints)


def test_literals_pass_through() -> None:
    """IP literals need no look-up and keep everything the operator wrote."""
    spec = EndpointSpec("2001:db8::1", 8000, weight=3, labels={"gpu": "h200"}, draining=True)
    clusters = [cluster("m", EndpointSpec("10.0.0.1", 80), spec), cluster("empty")]
    assert host_names(clusters) == []
    resolution = resolved(clusters, {})
    assert resolution.clusters["empty"] == ()
    assert resolution.endpoints == (
        Listed("10.0.0.1:80", Address("10.0.0.1", 80)),
        Listed("[2001:db8::1]:8000", Address("2001:db8::1", 8000), 3, {"gpu": "h200"}, draining=True),
    )


def test_each_name_is_asked_once_and_duplicates_fall_away() -> None:
    """Every record becomes one endpoint; in a cluster the first mention of a key counts."""
    clusters = [
        cluster("m", EndpointSpec("10.0.0.1", 80, weight=7), EndpointSpec("engines.test", 80)),
        cluster("n", EndpointSpec("engines.test", 80), EndpointSpec("one.test", 81)),
    ]
    assert host_names(clusters) == ["engines.test", "one.test"]
    resolution = resolved(clusters, RECORDS)
    assert [(e.key, e.weight) for e in resolution.clusters["m"]] == [
        ("10.0.0.1:80", 7),
        ("10.0.0.2:80", 1),
        ("[2001:db8::1]:80", 1),
    ]
    assert [e.key for e in resolution.clusters["n"]] == [
        "10.0.0.1:80",
        "10.0.0.2:80",
        "[2001:db8::1]:80",
        "10.0.0.1:81",
    ]


def test_name_without_an_address_has_no_endpoint() -> None:
    """The rest of its cluster stays."""
    clusters = [cluster("m", EndpointSpec("gone.test", 80), EndpointSpec("one.test", 80))]
    assert [e.key for e in resolved(clusters, RECORDS).endpoints] == ["10.0.0.1:80"]


def test_clusters_without_names_are_resolved_once() -> None:
    """What another file says alike is the same object, which costs nothing to compare."""
    literal, named = EndpointSpec("10.0.0.1", 80), EndpointSpec("a.example", 80)
    first = literals([cluster("a", literal), cluster("b", literal, named)], {})
    assert first.keys() == {"a"}
    assert resolved([cluster("a", literal)], {}, first).clusters["a"] is first["a"].endpoints
    again = literals([cluster("a", literal), cluster("c", literal)], first)
    assert again["a"] is first["a"]
    other = literals([cluster("a", literal, EndpointSpec("10.0.0.2", 80))], again)
    assert [str(one.address) for one in other["a"].endpoints] == ["10.0.0.1:80", "10.0.0.2:80"]
    mixed = [cluster("b", literal, named)]
    assert resolved(mixed, {"a.example": ["10.0.0.9"]}, first) == resolved(mixed, {"a.example": ["10.0.0.9"]})
