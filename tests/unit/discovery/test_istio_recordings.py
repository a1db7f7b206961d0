"""What a real istiod sent, recorded, as the client takes it; tests/data/istiod says what was edited."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from extproc.discovery.fleet import Fleet
from extproc.discovery.istio import wire
from extproc.discovery.istio.effects import Effect, Refused, Update
from extproc.discovery.istio.machine import IstioClient
from extproc.values.endpoints import Endpoint
from testbed.delta_client import read_recording

DATA = Path(__file__).parents[2] / "data" / "istiod"
LLAMA = "outbound|8000||llama.models.internal"


class Replayed:
    """A client that is sent recordings, and the fleet it feeds."""

    def __init__(self, *names: str) -> None:
        self.fleet = Fleet()
        self.effects: list[Effect] = []
        self.client = IstioClient(wire.ProtobufDecoder(), random.Random(1))
        self.client.follow(names, 0.0)
        self.client.begin(0.0)
        self.client.opened(1)

    def send(self, name: str) -> None:
        """All of one recording."""
        for message in read_recording(DATA / f"{name}.jsonl"):
            effects = self.client.received(1, wire.decode(message.SerializeToString()), 1.0)
            self.effects += effects
            for effect in effects:
                if isinstance(effect, Update):
                    self.fleet.update("istio", effect.clusters)

    def endpoints(self, cluster: str = LLAMA) -> dict[str, Endpoint]:
        """Of a cluster, by address."""
        return {str(one.address): one for one in self.fleet.clusters.get(cluster, ())}


def test_edits_of_files_as_istiod_sent_them() -> None:
    """Weight, locality, subset and version; an endpoint keeps its identity whatever is edited around it."""
    mesh = Replayed("llama.models.internal:8000")
    mesh.send("01_clusters")
    assert not mesh.fleet.clusters
    mesh.send("02_assignments")
    assert mesh.client.is_in_sync
    first, second = mesh.endpoints().values()
    assert (str(first.address), first.weight, first.locality) == ("127.0.0.11:8001", 3, "eu/eu-1/a")
    assert (first.labels, second.labels) == ({"subset": "large"}, {"version": "v2"})
    assert first.metadata["namespace"] == "tokenway"
    mesh.send("03_endpoint_added")
    third = mesh.endpoints()["[::1]:8003"]
    assert third.labels == {"subset": "large"}
    mesh.send("04_weight_and_endpoint_removed")
    assert mesh.endpoints().keys() == {"127.0.0.11:8001", "[::1]:8003"}
    assert mesh.endpoints()["127.0.0.11:8001"].weight == 1
    assert mesh.endpoints()["[::1]:8003"].key == third.key
    mesh.send("05_subset_removed")
    assert not any(one.labels for one in mesh.endpoints().values())
    mesh.send("06_unknown_cluster")
    assert list(mesh.fleet.clusters) == [LLAMA]
    mesh.send("07_host_removed")
    assert not mesh.fleet.clusters
    assert not any(isinstance(effect, Refused) for effect in mesh.effects)


def test_pods_that_are_not_ready() -> None:
    """Istiod on a Kubernetes API sends them as UNHEALTHY: they are there, and not to be chosen."""
    mesh = Replayed("engines.default.svc.cluster.local:8000")
    mesh.send("08_unready_pods")
    endpoints = mesh.endpoints("outbound|8000||engines.default.svc.cluster.local")
    assert {place: one.ready for place, one in endpoints.items()} == {
        "10.1.0.1:8000": True,
        "10.1.0.2:8000": False,
        "10.1.0.5:8000": False,
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.jsonl")))
def test_nothing_of_it_is_refused_whatever_rules_name(name: str) -> None:
    """Each resource is read as if a rule named it."""
    decoder: Any = wire.ProtobufDecoder()
    for message in read_recording(DATA / f"{name}.jsonl"):
        response = wire.decode(message.SerializeToString())
        read = decoder.cluster if response.type_url.endswith("Cluster") else decoder.assignment
        for resource in response.resources:
            read(resource.body)
