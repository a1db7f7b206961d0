"""Large responses in parts: they say the same, and are answered once, at their end."""

from __future__ import annotations

import random
from typing import Any

from extproc.discovery.istio.effects import Effect, Refused, Send, Update, slices_of
from extproc.discovery.istio.machine import IstioClient
from extproc.discovery.istio.messages import Resource, Response, parting
from extproc.discovery.istio.wire import ProtobufDecoder
from tests.mesh import assignment, assignments, cluster, clusters, subset_of

SERVICES = 40
MEMBERS = 60

SPOILT = 3
"""Which cluster of many cannot be read."""

HOSTS = [f"s{number}.models.internal" for number in range(SERVICES)]
NAMES = [name for host in HOSTS for name in (f"outbound|8000||{host}", subset_of("large", host))]


def client() -> IstioClient:
    """One that waits for endpoints."""
    made = IstioClient(ProtobufDecoder(), random.Random(1))
    made.follow([f"{host}:8000" for host in HOSTS], 0.0)
    made.begin(0.0)
    made.opened(1)
    made.received(1, clusters("c1", *map(cluster, NAMES)), 1.0)
    return made


def endpoints() -> Response:
    """Those of all services, the subsets after all that they are subsets of."""
    ordered = sorted(NAMES, key=lambda name: "large" in name)
    return assignments(
        "e1", *(assignment(name, *(f"10.0.{i}.1" for i in range(MEMBERS))) for name in ordered)
    )


def parts_of(response: Response) -> list[Response]:
    """A response in parts, without the pauses."""
    return [part for part in parting(response) if part is not None]


def taken(machine: IstioClient, *responses: Response) -> list[Effect]:
    """What follows from them, one after another."""
    return [effect for response in responses for effect in machine.received(1, response, 2.0)]


def reported(effects: list[Effect]) -> dict[str, Any]:
    """All that the fleet is to have, by cluster; nothing is said twice."""
    found: dict[str, Any] = {}
    for effect in effects:
        if isinstance(effect, Update):
            assert found.keys().isdisjoint(effect.clusters)
            found |= effect.clusters
    return found


def answers(effects: list[Effect]) -> list[tuple[str, str | None]]:
    """Nonces that were answered, and why they were refused."""
    return [(effect.request.nonce, effect.request.error) for effect in effects if isinstance(effect, Send)]


def test_parts_say_what_the_whole_says() -> None:
    """Each service with its subsets in one of them, so that no label is missing for a moment."""
    response = endpoints()
    parts = parts_of(response)
    assert len(parts) >= 10
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sorted(one.name for part in parts for one in part.resources) == sorted(NAMES)
    whole, machine = taken(client(), response), client()
    in_parts = taken(machine, *parts)
    assert reported(in_parts) == reported(whole)
    assert answers(in_parts) == answers(whole) == [("e1", None)]
    assert isinstance(in_parts[-1], Send | Update)
    assert machine.is_in_sync
    assert len([effect for effect in in_parts if isinstance(effect, Update)]) == len(parts)


def following(count: int) -> tuple[IstioClient, list[str]]:
    """A client whose first stream is open, which follows so many hosts; the names of their clusters."""
    hosts = [f"s{number}.models.internal" for number in range(count)]
    machine = IstioClient(ProtobufDecoder(), random.Random(1))
    machine.follow([f"{host}:8000" for host in hosts], 0.0)
    machine.begin(0.0)
    machine.opened(1)
    return machine, [f"outbound|8000||{host}" for host in hosts]


def test_clusters_are_in_force_when_the_last_part_has_come() -> None:
    """Not before, and what a stream had begun to say when it ended is forgotten."""
    machine, names = following(2_000)
    first = clusters("c1", *names)
    *before, last = parts_of(first)
    assert len(before) > 5
    assert taken(machine, *before) == []
    assert not machine.is_connected
    machine.lost(1, 3.0)
    machine.advance(20.0)
    machine.opened(2)
    assert machine.received(2, last, 21.0) != [], "the parts before were another stream's"
    asked = [
        effect.request
        for effect in machine.received(2, clusters("c2", *names[:5], removed=[last.resources[0].name]), 22.0)
        if isinstance(effect, Send)
    ]
    assert asked[0].nonce == "c2"
    assert asked[1].subscribe == tuple(sorted(names[:5]))
    assert asked[1].unsubscribe == (last.resources[0].name,)


def test_a_cluster_that_cannot_be_read_is_refused_and_none() -> None:
    """In the middle of many parts: the rest is taken, and that one is as it was: not there."""
    machine, names = following(1_000)
    whole = clusters("c1", *names)
    resources = list(whole.resources)
    resources[SPOILT] = Resource(names[SPOILT], b"\xff")
    effects = taken(machine, *parts_of(Response(whole.type_url, whole.nonce, tuple(resources))))
    (refused,) = (effect for effect in effects if isinstance(effect, Refused))
    assert names[SPOILT] in refused.detail
    asked = [effect.request for effect in effects if isinstance(effect, Send)]
    assert [request.nonce for request in asked] == ["c1", ""]
    assert asked[0].error is not None
    assert set(asked[1].subscribe) == set(names) - {names[SPOILT]}
    answer = assignments("e1", *(assignment(name, "10.0.0.1") for name in asked[1].subscribe))
    assert len(reported(taken(machine, *parts_of(answer)))) == 999
    machine.follow([], 3.0)


def test_a_response_is_refused_once_for_all_its_parts() -> None:
    """What a part in the middle could not say is named when the last has come; the rest is taken."""
    response = endpoints()
    spoilt = Response(
        response.type_url,
        response.nonce,
        (*response.resources[:7], Resource(NAMES[14], b"\xff"), *response.resources[8:]),
    )
    machine = client()
    *before, last = parts_of(spoilt)
    assert answers(taken(machine, *before)) == []
    said = taken(machine, last)
    ((nonce, error),) = answers(said)
    assert nonce == "e1"
    assert error is not None
    assert NAMES[14] in error
    assert [type(effect) for effect in said if isinstance(effect, Refused)] == [Refused]
    assert machine.rejects == 1
    assert answers(taken(machine, *parts_of(response))) == [("e1", None)], "and is forgotten then"


def test_clusters_come_whole() -> None:
    """What the first response of a stream does not list is gone, so that must be all of it."""
    response = clusters("c1", *map(cluster, NAMES))
    assert parts_of(response) == [response]


def test_the_fleet_is_given_a_large_change_in_steps() -> None:
    """Each cluster in one of them, those that go last; together they are the change."""
    listed = {f"c{number}": (None if number % 3 == 0 else ()) for number in range(500)}
    steps = list(slices_of(Update(listed)))
    assert len(steps) > 5
    assert [name for step in steps for name in step.clusters] != list(listed)
    assert {name: of for step in steps for name, of in step.clusters.items()} == listed
    goes = [of is None for step in steps for of in step.clusters.values()]
    assert goes == sorted(goes)
    assert list(slices_of(Update({}))) == []
