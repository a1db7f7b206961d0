"""What requests see of a fleet of which Envoy is told first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extproc.discovery.fleet import Fleet
from extproc.discovery.listed import Listed
from extproc.discovery.routable import RoutableClusters
from metadata_center.addresses import Address

NAMES = ("a", "b", "c")
NAMED = frozenset(("a", "b"))


def listed(count: int) -> list[Listed]:
    """So many endpoints."""
    return [Listed(f"10.0.0.{n}:80", Address(f"10.0.0.{n}", 80)) for n in range(count)]


def told(fleet: Fleet, routable: RoutableClusters, introduced: bool = False, **clusters: int | None) -> None:
    """A source lists so many endpoints of these; None: no such cluster."""
    words = {name: None if count is None else listed(count) for name, count in clusters.items()}
    routable.follow(fleet.update("mesh", words), introduced=introduced)


def one() -> tuple[Fleet, RoutableClusters]:
    """A fleet, and what requests see of it."""
    fleet = Fleet()
    routable = RoutableClusters(fleet.clusters)
    routable.configure(NAMED)
    return fleet, routable


WHAT = st.none() | st.integers(0, 2) | st.just("show")
steps = st.lists(st.tuples(st.sampled_from(NAMES), WHAT, st.booleans()), max_size=30)


@given(steps)
def test_requests_see_the_fleet_or_what_they_saw_before(
    steps: list[tuple[str, int | str | None, bool]],
) -> None:
    """What is hidden is named and was without endpoints; all else is the fleet's."""
    fleet, routable = one()
    routable.hide()
    for name, what, introduced in steps:
        before = dict(routable.clusters)
        was_hidden = set(routable.hidden)
        if isinstance(what, str):
            routable.show([name])
            assert name not in routable.hidden
        else:
            told(fleet, routable, introduced, **{name: what})
        assert routable.hidden <= NAMED & fleet.clusters.keys()
        for each in NAMES:
            if each in routable.hidden:
                assert not routable.clusters.get(each)
                assert routable.clusters.get(each) == before.get(each)
            else:
                assert routable.clusters.get(each) == fleet.clusters.get(each)
        if name in routable.hidden - was_hidden:
            assert name in before or not introduced
    routable.show(NAMES)
    assert routable.clusters == fleet.clusters


def test_first_endpoints_are_hidden_and_others_are_not() -> None:
    """A cluster that comes with endpoints, and one that had none; further ones join at once."""
    fleet, routable = one()
    routable.hide()
    told(fleet, routable, a=1, b=0)
    assert dict(routable.clusters) == {"b": ()}
    told(fleet, routable, b=1)
    assert routable.hidden == {"a", "b"}
    assert dict(routable.clusters) == {"b": ()}
    routable.show(["a"])
    told(fleet, routable, a=2)
    assert len(routable.clusters["a"]) == 2
    assert routable.hidden == {"b"}


def test_nothing_is_hidden_at_the_start_nor_what_was_introduced_nor_what_no_rule_names() -> None:
    """Of what was introduced the cluster is known, not endpoints that come later."""
    fleet, routable = one()
    told(fleet, routable, a=1)
    routable.hide()
    told(fleet, routable, introduced=True, b=1)
    told(fleet, routable, c=1)
    assert routable.clusters == fleet.clusters
    assert not routable.hidden
    told(fleet, routable, b=0)
    told(fleet, routable, introduced=True, b=1)
    assert routable.hidden == {"b"}
