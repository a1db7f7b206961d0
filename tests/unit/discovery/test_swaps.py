"""Listings that bring endpoints to a cluster and take others away: what is taken first, and what is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from extproc.discovery.fleet import Fleet
from extproc.discovery.listed import Listed
from extproc.discovery.routable import RoutableClusters
from extproc.discovery.swaps import Swaps
from metadata_center.addresses import Address


def listed(number: int, **changes: object) -> Listed:
    """One endpoint."""
    return replace(Listed(f"pod-{number}", Address(f"10.0.0.{number}", 80)), **changes)  # type: ignore[arg-type]


class Rig:
    """A source of one cluster, `a`, with endpoints 1 and 2 that requests see."""

    def __init__(self, named: str = "a") -> None:
        self.fleet = Fleet()
        self.routable = RoutableClusters(self.fleet.clusters)
        self.swaps = Swaps(self.routable)
        self.routable.configure(frozenset((named,)))
        self.says([listed(1), listed(2)])
        self.routable.hide()

    def says(self, word: Sequence[Listed] | None) -> None:
        """It lists this."""
        now = self.swaps.first("mesh", self.fleet.listed("mesh"), {"a": word})
        self.routable.follow(self.fleet.update("mesh", now), introduced=False)
        self.take_due()

    def take_due(self) -> None:
        """What is due is taken."""
        for source, word in self.swaps.due().items():
            self.routable.follow(self.fleet.update(source, word), introduced=False)

    def show(self) -> None:
        """Envoy has everything."""
        self.routable.show(dict(self.routable.hidden))
        self.take_due()

    @property
    def here(self) -> set[Listed]:
        """What of it is in force."""
        return set(self.fleet.listed("mesh").get("a", ()))

    @property
    def seen(self) -> set[str]:
        """Hosts that requests see."""
        return {endpoint.address.host for endpoint in self.routable.clusters.get("a", ())}


@pytest.fixture(autouse=True)
def hashable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoints are compared as sets here; their keys are distinct."""
    monkeypatch.setattr(Listed, "__hash__", lambda one: hash(one.key))


@pytest.mark.parametrize(
    "after",
    [
        [listed(3)],
        [listed(2), listed(3)],
        [listed(1), listed(2, draining=True), listed(3)],
        [listed(1), listed(2, labels={"subset": "other"}), listed(3)],
    ],
    ids=["all", "one", "drains", "is of another subset"],
)
def test_what_comes_is_taken_first(after: list[Listed]) -> None:
    """Until it is shown, what requests see is what it was."""
    rig = Rig()
    rig.says(after)
    assert rig.here == {listed(1), listed(2), listed(3)}
    assert rig.seen == {"10.0.0.1", "10.0.0.2"}
    rig.show()
    assert rig.here == set(after)
    assert rig.seen == {one.address.host for one in after}


def test_the_latest_word_counts() -> None:
    """What was due of earlier ones is not, be it that the cluster is gone."""
    rig = Rig()
    rig.says([listed(3)])
    rig.says([listed(1), listed(4)])
    assert rig.here == {listed(1), listed(2), listed(4)}
    rig.says([listed(1)])
    assert rig.here == {listed(1)}
    rig.says([listed(5)])
    rig.says(None)
    rig.show()
    assert rig.here == set()
    assert not rig.routable.clusters


@pytest.mark.parametrize(
    "after",
    [
        [],
        [listed(1)],
        [listed(1), listed(2), listed(3)],
        [listed(1, address=Address("10.0.0.9", 80)), listed(2)],
        [listed(1, weight=3), listed(2)],
    ],
    ids=["none", "fewer", "more", "elsewhere", "heavier"],
)
def test_what_needs_no_two_steps_is_taken_at_once(after: list[Listed]) -> None:
    """Nothing goes, or nothing comes, or what is at one place takes another."""
    rig = Rig()
    rig.says(after)
    assert rig.here == set(after)


def test_endpoints_that_could_not_be_used_go_at_once() -> None:
    """Nothing was decided for them."""
    rig = Rig()
    rig.says([listed(1), listed(2, ready=False)])
    rig.says([listed(1), listed(3)])
    assert rig.here == {listed(1), listed(3)}


def test_a_cluster_that_no_rule_names_is_taken_at_once() -> None:
    """Requests do not go there."""
    rig = Rig(named="b")
    rig.says([listed(3)])
    assert rig.here == {listed(3)}
