"""What requests see of a fleet of which Envoy is told first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extproc.discovery.fleet import Fleet
from extproc.discovery.listed import Listed
from extproc.discovery.routable import RoutableClusters, within, without
from metadata_center.addresses import Address

NAMES = ("a", "b", "c")
NAMED = frozenset(("a", "b"))


def listed(*numbers: int, draining: frozenset[int] = frozenset()) -> list[Listed]:
    """Endpoints of these numbers."""
    return [
        Listed(f"10.0.0.{n}:80", Address(f"10.0.0.{n}", 80), draining=n in draining) for n in sorted(numbers)
    ]


def told(
    fleet: Fleet, routable: RoutableClusters, introduced: bool = False, **clusters: list[Listed] | None
) -> None:
    """A source lists these endpoints; None: no such cluster."""
    routable.follow(fleet.update("mesh", clusters), introduced=introduced)


def one() -> tuple[Fleet, RoutableClusters]:
    """A fleet, and what requests see of it."""
    fleet = Fleet()
    routable = RoutableClusters(fleet.clusters)
    routable.configure(NAMED)
    return fleet, routable


def seen(routable: RoutableClusters, name: str) -> list[int] | None:
    """The numbers of the endpoints that requests see."""
    endpoints = routable.clusters.get(name)
    return None if endpoints is None else [int(one.address.host.rpartition(".")[2]) for one in endpoints]


def places(*numbers: int) -> frozenset[Address]:
    """Where those of these numbers are."""
    return frozenset(one.address for one in listed(*numbers))


some = st.frozensets(st.integers(0, 3), max_size=4)
words = st.none() | st.tuples(some, some)
steps = st.lists(st.tuples(st.sampled_from(NAMES), words | some, st.booleans()), max_size=30)


@given(steps)
def test_requests_see_what_they_saw_and_what_was_shown(
    steps: list[tuple[str, tuple[frozenset[int], frozenset[int]] | frozenset[int] | None, bool]],
) -> None:
    """What is hidden is named and new; no cluster loses its last usable endpoint to hiding."""
    fleet, routable = one()
    routable.hide()
    for name, what, introduced in steps:
        before = {each: tuple(of) for each, of in routable.clusters.items()}
        was_hidden = dict(routable.hidden)
        if isinstance(what, frozenset):
            routable.show({name: places(*what)})
            assert not routable.hidden.get(name, frozenset()) & places(*what)
            assert routable.hidden.get(name, frozenset()) <= was_hidden.get(name, frozenset())
        else:
            endpoints = None if what is None else listed(*what[0], draining=what[1])
            told(fleet, routable, introduced, **{name: endpoints})
        assert routable.hidden.keys() <= NAMED & fleet.clusters.keys()
        assert all(routable.hidden.values())
        for each in NAMES:
            hidden = routable.hidden.get(each, frozenset())
            there, are_seen = fleet.clusters.get(each), routable.clusters.get(each)
            assert hidden <= {endpoint.address for endpoint in there or ()}
            assert hidden.isdisjoint(endpoint.address for endpoint in before.get(each, ()))
            assert tuple(are_seen or ()) == tuple(e for e in there or () if e.address not in hidden)
            if are_seen is None or there is None:
                assert are_seen is None
                assert there is None or each not in before
            if any(e.usable for e in before.get(each, ())) and any(e.usable for e in there or ()):
                assert any(e.usable for e in are_seen or ()), "it had some and has some"
    routable.show({name: places(*range(4)) for name in NAMES})
    assert routable.clusters == fleet.clusters


def test_endpoints_are_hidden_until_they_are_shown() -> None:
    """The first ones of a cluster, those that join others, and one that comes meanwhile."""
    fleet, routable = one()
    routable.hide()
    told(fleet, routable, a=listed(1), b=listed())
    assert (seen(routable, "a"), seen(routable, "b")) == (None, [])
    told(fleet, routable, b=listed(1))
    assert routable.hidden == {"a": places(1), "b": places(1)}
    assert (seen(routable, "a"), seen(routable, "b")) == (None, [])
    routable.show({"a": places(1)})
    told(fleet, routable, a=listed(1, 2, 3))
    assert seen(routable, "a") == [1]
    routable.show({"a": places(3)})
    assert seen(routable, "a") == [1, 3]
    assert routable.hidden == {"a": places(2), "b": places(1)}
    told(fleet, routable, a=listed(1, 3))
    assert routable.hidden == {"b": places(1)}


def test_nothing_is_hidden_at_the_start_nor_what_was_introduced_nor_what_no_rule_names() -> None:
    """Of what was introduced the cluster is known, not endpoints that come later."""
    fleet, routable = one()
    told(fleet, routable, a=listed(1))
    routable.hide()
    told(fleet, routable, introduced=True, b=listed(1))
    told(fleet, routable, c=listed(1))
    told(fleet, routable, c=listed(1, 2))
    assert routable.clusters == fleet.clusters
    assert not routable.hidden
    told(fleet, routable, b=listed())
    told(fleet, routable, introduced=True, b=listed(1))
    assert routable.hidden == {"b": places(1)}


def test_a_cluster_does_not_lose_its_last_usable_endpoint_to_hiding() -> None:
    """Where those that requests see all go, or drain, those that come are seen at once."""
    fleet, routable = one()
    routable.hide()
    told(fleet, routable, introduced=True, a=listed(1), b=listed(1))
    told(fleet, routable, a=listed(2), b=listed(1, 2, draining=frozenset((1,))))
    assert (seen(routable, "a"), seen(routable, "b")) == ([2], [1, 2])
    assert not routable.hidden


def test_places_with_and_without_others() -> None:
    """No cluster is left of which nothing is."""
    here = {"a": places(1, 2), "b": places(1)}
    assert within(here, {"a": places(2, 3), "c": places(1)}) == {"a": places(2)}
    assert without(here, [{"a": places(2)}, {"b": places(1, 2)}]) == {"a": places(1)}
    assert without(here, []) == here
