"""Endpoints whose source says that they take no new requests, and labels with several values."""

from __future__ import annotations

import pytest

from extproc.health.settings import HealthSettings
from extproc.health.states import HealthState, Transition
from extproc.health.tracker import HealthTracker
from extproc.values.endpoints import Endpoint
from extproc.xds.resources import load_assignments
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

KEY, OTHER = EndpointKey("a"), EndpointKey("b")


def endpoint(key: EndpointKey = KEY, cluster: str = "c", *, ready: bool = True) -> Endpoint:
    """One at an address of its own."""
    return Endpoint(key, cluster, Address("10.0.0.1" if key == KEY else "10.0.0.2", 80), ready=ready)


def test_what_is_not_ready_is_not_chosen() -> None:
    """From the source's word on, and until it is taken back; each change is one transition."""
    tracker = HealthTracker(HealthSettings())
    assert tracker.update({KEY: [endpoint(ready=False)]}) == ()
    assert (tracker.is_available(KEY), tracker.reason(KEY)) == (False, "not ready")
    back = tracker.update({KEY: [endpoint()]})
    assert back == (Transition(KEY, HealthState.NOT_READY, HealthState.HEALTHY, "ready again"),)
    assert tracker.is_available(KEY)
    gone = tracker.update({KEY: [endpoint(ready=False)]})
    assert gone == (Transition(KEY, HealthState.HEALTHY, HealthState.NOT_READY, "not ready"),)


def test_one_cluster_speaks_for_all() -> None:
    """It is said of the server."""
    tracker = HealthTracker(HealthSettings())
    tracker.update({KEY: [endpoint(), endpoint(cluster="d", ready=False)]})
    assert not tracker.is_available(KEY)


def test_no_floor_brings_it_back() -> None:
    """The last endpoint of a cluster may be one that is not ready."""
    tracker = HealthTracker(HealthSettings(min_available_ratio=1.0))
    tracker.update({KEY: [endpoint(ready=False)], OTHER: [endpoint(OTHER)]})
    assert tracker.state(KEY) is HealthState.NOT_READY
    assert tracker.is_available(OTHER)


def test_envoy_leaves_it_out_too() -> None:
    """Of its own fallback."""
    well = load_assignments({"c": [endpoint()]}, lambda _: HealthState.HEALTHY)
    ejected = load_assignments({"c": [endpoint()]}, lambda _: HealthState.EJECTED)
    not_ready = load_assignments({"c": [endpoint(ready=False)]}, lambda _: HealthState.HEALTHY)
    assert not_ready == ejected != well


@pytest.mark.parametrize(
    ("labels", "wanted", "carries"),
    [
        ({}, {}, True),
        ({"subset": "v1"}, {"subset": "v1"}, True),
        ({"subset": "gpu,v1"}, {"subset": "v1"}, True),
        ({"subset": "gpu,v1"}, {"subset": "gpu,v1"}, True),
        ({"subset": "gpu,v1"}, {"subset": "v"}, False),
        ({"subset": "v1"}, {"subset": "v1", "zone": "a"}, False),
        ({"subset": ""}, {"subset": ""}, True),
        ({}, {"subset": ""}, False),
    ],
)
def test_a_label_may_list_several_values(
    labels: dict[str, str], wanted: dict[str, str], carries: bool
) -> None:
    """Each of them is one that it has."""
    assert Endpoint(KEY, "c", Address("10.0.0.1", 80), labels=labels).carries(wanted) is carries
