"""Large responses in parts: they say the same, and are answered once, at their end."""

from __future__ import annotations

import random
from typing import Any

from extproc.discovery.istio.machine import Effect, IstioClient, Refused, Send, Update
from extproc.discovery.istio.messages import Resource, Response, parts_of
from extproc.discovery.istio.wire import ProtobufDecoder
from tests.mesh import assignment, assignments, cluster, clusters, subset_of

SERVICES = 40
MEMBERS = 60

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
    parts = list(parts_of(response))
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
    assert list(parts_of(response)) == [response]
