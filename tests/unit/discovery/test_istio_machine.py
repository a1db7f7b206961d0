"""The client of istiod: what it asks, believes, refuses and reports, over streams that come and go."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from extproc.discovery.fleet import Fleet
from extproc.discovery.istio.effects import Connect, Effect, LookUp, Refused, Send, TooLarge, Update
from extproc.discovery.istio.machine import (
    FIRST_LIMIT_BYTES,
    FIRST_RESPONSE_S,
    MAX_LIMIT_BYTES,
    MAX_SUBSCRIPTIONS,
    MAX_WAIT_S,
    STEADY_S,
    IstioClient,
)
from extproc.discovery.istio.messages import ASSIGNMENTS, CLUSTERS, Request, Resource, Response
from extproc.discovery.istio.names import INTERVAL_S
from extproc.discovery.istio.wire import ProtobufDecoder
from extproc.values.mesh_names import MeshName
from tests.mesh import (
    HOST,
    SERVICE,
    assignment,
    assignments,
    cluster,
    clusters,
    keys_of,
    lb_endpoint,
    subset_of,
)

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


class Client:
    """A machine, and the fleet that follows it.

    Attributes:
        fleet: As its reports make it.
        sent: Requests on the stream that is open.
        effects: Those of the last event.
    """

    def __init__(self, *names: str) -> None:
        self.machine = IstioClient(ProtobufDecoder(), random.Random(1))
        self.fleet = Fleet()
        self.sent: list[Request] = []
        self.asked: list[str] = []
        self.limits: list[int] = []
        self.number = 0
        self.now_s = 100.0
        self.take(self.machine.follow(names or (f"{HOST}:8000",), self.now_s))
        self.take(self.machine.begin(self.now_s))
        self.open()

    def take(self, effects: Sequence[Effect]) -> Sequence[Effect]:
        """Carry them out."""
        self.effects = effects
        for effect in effects:
            match effect:
                case Connect():
                    self.number, self.sent = effect.number, []
                    self.limits.append(effect.limit_bytes)
                case Send():
                    self.sent.append(effect.request)
                case Update():
                    assert self.fleet.update("istio", effect.clusters), "a report changes something"
                case LookUp():
                    self.asked.append(effect.name)
        return effects

    def open(self) -> None:
        """The stream is there."""
        self.take(self.machine.opened(self.number))

    def receive(self, response: Response) -> list[Request]:
        """A response came; what was sent for it."""
        before = len(self.sent)
        self.take(self.machine.received(self.number, response, self.now_s))
        return self.sent[before:]

    def lose(self, **how: Any) -> None:
        """The stream ended."""
        self.take(self.machine.lost(self.number, self.now_s, **how))

    def reopen(self) -> None:
        """Time passes until there is another stream."""
        before = self.number
        while self.number == before:
            next_s = self.machine.next_s()
            assert next_s is not None
            self.now_s = max(self.now_s, next_s)
            self.take(self.machine.advance(self.now_s))
        self.open()

    def reports(self) -> list[dict[str, list[str] | None]]:
        """Those of the last event, as keys."""
        return [keys_of(effect.clusters) for effect in self.effects if isinstance(effect, Update)]

    def keys(self, name: str = SERVICE) -> list[str] | None:
        """Of a cluster in the fleet."""
        endpoints = self.fleet.clusters.get(name)
        return None if endpoints is None else [str(one.key) for one in endpoints]

    def labels(self, name: str = SERVICE) -> dict[str, dict[str, str]]:
        """Of each endpoint in the fleet."""
        return {str(one.key): dict(one.labels) for one in self.fleet.clusters[name]}


def synced(*members: Any) -> Client:
    """A client in sync with one service of these members."""
    client = Client()
    client.receive(clusters("c1", SERVICE))
    client.receive(assignments("e1", assignment(SERVICE, *members)))
    assert client.machine.is_in_sync
    return client


def test_the_first_exchange() -> None:
    """Everything of CDS, then EDS by name in a request of its own; nothing is reported before both are in."""
    client = Client()
    assert client.sent == [Request(CLUSTERS, is_first=True)]
    assert not client.machine.is_connected
    assert client.receive(clusters("c1", SERVICE, "outbound|80||other.internal", "BlackHoleCluster")) == [
        Request(CLUSTERS, nonce="c1"),
        Request(ASSIGNMENTS, (SERVICE,)),
    ]
    assert client.machine.is_connected
    assert not client.machine.is_in_sync
    assert client.keys() is None
    assert client.receive(assignments("e1", assignment(SERVICE, A, B))) == [Request(ASSIGNMENTS, nonce="e1")]
    assert client.keys() == [f"{A}:8000", f"{B}:8000"]
    assert client.machine.has_first_state
    assert client.machine.is_in_sync
    assert client.machine.age_s(client.now_s + 7) == 0.0


def test_a_mesh_without_our_services_is_in_sync_at_once() -> None:
    """There is nothing to wait for, and nothing to report."""
    client = Client()
    assert client.receive(clusters("c1")) == [Request(CLUSTERS, nonce="c1")]
    assert client.machine.has_first_state
    assert client.keys() is None
    assert client.machine.updates == 0


def test_existence_is_what_cds_says() -> None:
    """A service that is there without endpoints is a cluster without endpoints; one that goes is none."""
    client = synced()
    assert client.keys() == []
    gone = client.receive(clusters("c2", removed=[SERVICE]))
    assert gone == [Request(CLUSTERS, nonce="c2"), Request(ASSIGNMENTS, unsubscribe=(SERVICE,))]
    assert client.keys() is None
    again = client.receive(clusters("c3", SERVICE))
    assert again == [Request(CLUSTERS, nonce="c3"), Request(ASSIGNMENTS, (SERVICE,))]
    assert client.keys() is None
    client.receive(assignments("e2", assignment(SERVICE, A)))
    assert client.keys() == [f"{A}:8000"]


def test_what_is_the_same_is_not_reported() -> None:
    """Istiod repeats itself, in any order."""
    client = synced(A, B)
    for nonce, hosts in (("e2", (A, B)), ("e3", (B, A))):
        client.receive(assignments(nonce, assignment(SERVICE, *hosts)))
        assert client.reports() == []
    client.receive(clusters("c2", SERVICE))
    assert client.reports() == []
    assert client.machine.updates == 1


def test_members_come_and_go() -> None:
    """A response has the whole of a service; one that it leaves out stays."""
    client = Client(f"{HOST}:8000", "qwen.models.internal:9000")
    qwen = "outbound|9000||qwen.models.internal"
    client.receive(clusters("c1", SERVICE, qwen))
    client.receive(assignments("e1", assignment(SERVICE, A), assignment(qwen, B)))
    client.receive(assignments("e2", assignment(SERVICE, A, C)))
    assert (client.keys(), client.keys(qwen)) == ([f"{A}:8000", f"{C}:8000"], [f"{B}:8000"])
    client.receive(assignments("e3", assignment(SERVICE)))
    assert (client.keys(), client.keys(qwen)) == ([], [f"{B}:8000"])


def test_weight_locality_health_and_workload() -> None:
    """What istiod says of an endpoint is what the fleet has."""
    client = synced()
    client.receive(
        assignments(
            "e2",
            assignment(
                SERVICE,
                lb_endpoint(A, weight=7, workload="llama;models;llama-svc;v2;east"),
                lb_endpoint(B, health="UNHEALTHY"),
                lb_endpoint(C, health="DRAINING", weight=0),
                locality=("eu", "eu-1", ""),
            ),
        )
    )
    first, second, third = client.fleet.clusters[SERVICE]
    assert (first.weight, first.locality, first.ready, first.draining) == (7, "eu/eu-1", True, False)
    assert first.key == f"models/llama@{A}:8000"
    assert first.labels == {"version": "v2"}
    assert first.metadata == {
        "workload": "llama",
        "namespace": "models",
        "service": "llama-svc",
        "kubernetes_cluster": "east",
    }
    assert (second.ready, second.draining) == (False, False)
    assert (third.weight, third.ready, third.draining) == (1, True, True)


def test_a_label_of_a_workload_changes_no_identity() -> None:
    """Another version is a change of the same replica; another workload at the address is another replica."""
    client = synced(lb_endpoint(A, workload="llama;models;llama;v1;"))
    before = client.keys()
    client.receive(assignments("e2", assignment(SERVICE, lb_endpoint(A, workload="llama;models;chat;v2;"))))
    assert client.keys() == before
    client.receive(assignments("e3", assignment(SERVICE, lb_endpoint(A, workload="qwen;models;chat;v2;"))))
    assert client.keys() == [f"models/qwen@{A}:8000"]


def test_endpoints_in_a_service_entry_keep_their_identity_when_they_move_up() -> None:
    """Istiod calls them by their place in the list."""
    client = synced(
        lb_endpoint(A, workload="se-0;models;se-0;;"), lb_endpoint(B, workload="se-1;models;se-1;;")
    )
    assert client.keys() == [f"models/se@{A}:8000", f"models/se@{B}:8000"]
    client.receive(assignments("e2", assignment(SERVICE, lb_endpoint(B, workload="se-0;models;se-0;;"))))
    assert client.keys() == [f"models/se@{B}:8000"]


def test_subsets_are_a_label() -> None:
    """Each subset of a rule is one more subscription; an endpoint in two of them has both."""
    client = synced(A, B)
    v1, gpu = subset_of("v1"), subset_of("gpu")
    sent = client.receive(clusters("c2", SERVICE, v1, gpu))
    assert sent == [Request(CLUSTERS, nonce="c2"), Request(ASSIGNMENTS, (gpu, v1))]
    assert client.labels() == {f"{A}:8000": {}, f"{B}:8000": {}}
    client.receive(assignments("e2", assignment(v1, A), assignment(gpu, A, B, C)))
    assert client.labels() == {f"{A}:8000": {"subset": "gpu,v1"}, f"{B}:8000": {"subset": "gpu"}}
    endpoint = client.fleet.clusters[SERVICE][0]
    assert endpoint.carries({"subset": "v1"})
    assert endpoint.carries({"subset": "gpu"})
    assert not endpoint.carries({"subset": "v"})
    client.receive(assignments("e3", assignment(v1), assignment(gpu, A, B)))
    assert client.labels() == {f"{A}:8000": {"subset": "gpu"}, f"{B}:8000": {"subset": "gpu"}}
    client.receive(clusters("c3", SERVICE, removed=[gpu]))
    assert client.labels() == {f"{A}:8000": {}, f"{B}:8000": {}}
    assert list(client.fleet.clusters) == [SERVICE]


def test_a_service_is_first_reported_with_its_subsets() -> None:
    """Rules with a subset would find nothing in between."""
    client = Client()
    client.receive(clusters("c1", SERVICE, subset_of("v1")))
    client.receive(assignments("e1", assignment(SERVICE, A)))
    assert client.keys() is None
    client.receive(assignments("e2", assignment(subset_of("v1"), A)))
    assert client.labels() == {f"{A}:8000": {"subset": "v1"}}


def test_dns_clusters_have_their_members_in_them() -> None:
    """Names are looked up, again and again; one whose look-up fails keeps its addresses."""
    client = Client()
    dns = cluster(SERVICE, "STRICT_DNS", lb_endpoint("a.example", 80), lb_endpoint(B, 80))
    assert client.receive(clusters("c1", dns)) == [Request(CLUSTERS, nonce="c1")]
    assert client.asked == ["a.example"]
    assert not client.machine.has_first_state
    client.take(client.machine.answered("a.example", [C, A], client.now_s))
    assert client.keys() == [f"{B}:80", f"{A}:80", f"{C}:80"]
    assert client.machine.has_first_state
    client.now_s += INTERVAL_S
    client.take(client.machine.advance(client.now_s))
    assert client.asked == ["a.example", "a.example"]
    client.take(client.machine.answered("a.example", [], client.now_s))
    assert client.keys() == [f"{B}:80", f"{A}:80", f"{C}:80"]
    client.receive(clusters("c2", SERVICE))
    client.receive(assignments("e1", assignment(SERVICE, A)))
    assert client.keys() == [f"{A}:8000"]
    client.now_s += 2 * INTERVAL_S
    client.take(client.machine.advance(client.now_s))
    assert client.asked == ["a.example", "a.example"], "a name that is in no cluster is not asked for"


def test_a_name_without_an_address_keeps_nothing_waiting() -> None:
    """Its cluster has the other members."""
    client = Client()
    client.receive(clusters("c1", cluster(SERVICE, "LOGICAL_DNS", lb_endpoint("a.example"), lb_endpoint(B))))
    client.take(client.machine.answered("a.example", [], client.now_s))
    assert client.machine.is_in_sync
    assert client.keys() == [f"{B}:8000"]


@pytest.mark.parametrize("which", ["cluster", "assignment", "address", "port"])
def test_what_cannot_be_used_is_refused_and_stays_as_it_was(which: str) -> None:
    """With the reason and the nonce; the good part of such a response is taken, it will not come again."""
    client = Client(f"{HOST}:8000", "qwen.models.internal:9000")
    qwen = "outbound|9000||qwen.models.internal"
    client.receive(clusters("c1", SERVICE, qwen))
    client.receive(assignments("e1", assignment(SERVICE, A), assignment(qwen, A)))
    good = clusters("c2", removed=[qwen]) if which == "cluster" else assignments("e2", assignment(qwen, B))
    wrong = {
        "cluster": Resource(SERVICE, b"\xff\xff"),
        "assignment": Resource(SERVICE, b"\x0a\xff"),
        "address": Resource(SERVICE, assignment(SERVICE, "10.0.0.256").SerializeToString()),
        "port": Resource(SERVICE, assignment(SERVICE, lb_endpoint(A, 0)).SerializeToString()),
    }[which]
    spoilt = Response(good.type_url, good.nonce, (*good.resources, wrong), good.removed)
    refusal = client.receive(spoilt)[0]
    assert (refusal.type_url, refusal.nonce) == (good.type_url, good.nonce)
    assert refusal.error is not None
    assert wrong.name in refusal.error
    assert [type(effect) for effect in client.effects][:3] == [Update, Send, Refused]
    assert client.keys() == [f"{A}:8000"]
    assert client.keys(qwen) == (None if which == "cluster" else [f"{B}:8000"])
    assert client.machine.rejects == 1
    assert client.machine.is_in_sync


def test_a_subset_that_cannot_be_used_hides_no_service() -> None:
    """The service is reported without the label."""
    client = Client()
    client.receive(clusters("c1", SERVICE, subset_of("v1")))
    spoilt = Resource(subset_of("v1"), b"\xff")
    client.receive(Response(ASSIGNMENTS, "e1", (*assignments("", assignment(SERVICE, A)).resources, spoilt)))
    assert client.labels() == {f"{A}:8000": {}}
    assert client.machine.has_first_state


def test_a_cluster_that_cannot_be_used_is_not_there_unless_it_was() -> None:
    """The first response of a new stream does not take it away either."""
    client = synced(A)
    client.lose()
    client.reopen()
    client.receive(Response(CLUSTERS, "c1", (Resource(SERVICE, b"\xff"),)))
    assert client.keys() == [f"{A}:8000"]
    client.receive(assignments("e1", assignment(SERVICE, B)))
    assert client.keys() == [f"{B}:8000"]
    other = Client()
    other.receive(Response(CLUSTERS, "c1", (Resource(SERVICE, b"\xff"),)))
    assert other.keys() is None


def test_subscriptions_have_a_bound() -> None:
    """What is beyond it is refused by name; what fits is taken."""
    client = Client()
    names = [subset_of(f"s{number}") for number in range(MAX_SUBSCRIPTIONS)]
    refusal, subscription = client.receive(clusters("c1", SERVICE, *names))
    assert refusal.error is not None
    assert names[-1] in refusal.error
    assert len(subscription.subscribe) == MAX_SUBSCRIPTIONS


def test_what_no_rule_names_is_not_even_read() -> None:
    """A resource of another service may be anything."""
    client = synced(A)
    others = Response(CLUSTERS, "c2", (Resource("outbound|80||other.internal", b"\xff"),))
    assert client.receive(others) == [Request(CLUSTERS, nonce="c2")]
    unasked = Response(ASSIGNMENTS, "e2", (Resource("outbound|80||other.internal", b"\xff"),))
    assert client.receive(unasked) == [Request(ASSIGNMENTS, nonce="e2")]


def test_istiod_gone_and_back_flaps_nothing() -> None:
    """What was reported stays; after the return only what the new stream leaves out goes."""
    client = synced(A, B)
    reports = client.machine.updates
    client.lose()
    assert (client.machine.is_connected, client.machine.is_in_sync) == (False, False)
    assert client.keys() == [f"{A}:8000", f"{B}:8000"]
    client.reopen()
    assert client.sent == [Request(CLUSTERS, is_first=True)]
    assert client.machine.age_s(client.now_s + 5) > 5
    client.receive(clusters("c1", SERVICE))
    assert client.keys() == [f"{A}:8000", f"{B}:8000"]
    client.receive(assignments("e1", assignment(SERVICE, A, B)))
    assert client.machine.updates == reports
    assert client.machine.age_s(client.now_s) == 0


def test_what_went_meanwhile_goes_with_the_first_clusters() -> None:
    """And not before; its members with the first assignments."""
    client = Client(f"{HOST}:8000", "qwen.models.internal:9000")
    qwen = "outbound|9000||qwen.models.internal"
    client.receive(clusters("c1", SERVICE, qwen))
    client.receive(assignments("e1", assignment(SERVICE, A, B), assignment(qwen, C)))
    client.lose()
    client.reopen()
    client.receive(clusters("c1", SERVICE))
    assert client.keys(qwen) is None
    assert client.keys() == [f"{A}:8000", f"{B}:8000"]
    client.receive(assignments("e1", assignment(SERVICE, B)))
    assert client.keys() == [f"{B}:8000"]


def test_words_of_a_former_stream_are_void() -> None:
    """So is its end."""
    client = synced(A)
    former = client.number
    client.lose()
    client.reopen()
    late = assignments("e9", assignment(SERVICE, B))
    assert client.take(client.machine.received(former, late, client.now_s)) == []
    assert client.take(client.machine.lost(former, client.now_s)) == []
    assert client.take(client.machine.opened(former)) == []
    assert client.keys() == [f"{A}:8000"]


def test_waits_double_with_jitter_up_to_a_bound() -> None:
    """Each between half and all of its bound; a steady stream starts over."""
    client = Client()
    waits = []
    for _ in range(12):
        before_s = client.now_s
        client.lose()
        client.reopen()
        waits.append(client.now_s - before_s)
    bounds = [min(MAX_WAIT_S, 0.25 * 2**n) for n in range(12)]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len({wait / bound for wait, bound in zip(waits, bounds, strict=True)}) == 12
    client.receive(clusters("c1"))
    client.now_s += STEADY_S
    before_s = client.now_s
    client.lose()
    client.reopen()
    assert client.now_s - before_s <= 0.25


def test_a_stream_that_says_nothing_is_given_up() -> None:
    """Istiod may be paused between accepting and answering."""
    client = Client()
    before_s, before = client.now_s, client.number
    client.reopen()
    assert client.number == before + 1
    assert FIRST_RESPONSE_S <= client.now_s - before_s <= FIRST_RESPONSE_S + 0.25


def test_the_limit_grows_with_what_comes() -> None:
    """At once, up to its bound; beyond that the last state stays, and attempts are spaced."""
    client = synced(A)
    for _ in range(3):
        before_s = client.now_s
        client.lose(is_too_large=True)
        client.reopen()
        assert client.now_s == before_s
    assert client.limits == [FIRST_LIMIT_BYTES * 4**n for n in range(4)]
    assert client.limits[-1] == MAX_LIMIT_BYTES
    client.lose(is_too_large=True)
    assert client.effects == [TooLarge(MAX_LIMIT_BYTES, is_final=True)]
    before_s = client.now_s
    client.reopen()
    assert client.now_s > before_s
    assert client.limits[-1] == MAX_LIMIT_BYTES
    assert client.keys() == [f"{A}:8000"]


def test_the_age_counts_from_the_last_moment_in_sync() -> None:
    """A peer that was silent when it was lost had been so for a while."""
    client = Client()
    client.now_s += 3
    assert client.machine.age_s(client.now_s) == 3, "it never was in sync: since the start"
    client.receive(clusters("c1"))
    client.now_s += 100
    assert client.machine.age_s(client.now_s) == 0
    client.lose(silent_s=30.0)
    assert client.machine.age_s(client.now_s) == 30
    client.now_s += 5
    assert client.machine.age_s(client.now_s) == 35


def test_rules_that_name_another_service_have_it_asked_for() -> None:
    """By a new stream, which says everything; what no rule names any more goes at once."""
    client = synced(A)
    qwen = "outbound|9000||qwen.models.internal"
    client.take(client.machine.follow([SERVICE, qwen, "files"], client.now_s))
    client.open()
    assert client.sent == [Request(CLUSTERS, is_first=True)]
    assert client.keys() == [f"{A}:8000"]
    client.receive(clusters("c1", SERVICE, qwen))
    client.receive(assignments("e1", assignment(SERVICE, A), assignment(qwen, B)))
    assert client.keys(qwen) == [f"{B}:8000"]
    sent = len(client.sent)
    client.take(client.machine.follow([qwen], client.now_s))
    assert client.sent[sent:] == [Request(ASSIGNMENTS, unsubscribe=(SERVICE,))]
    assert client.keys() is None
    assert client.keys(qwen) == [f"{B}:8000"]


def test_a_response_of_another_type_is_refused() -> None:
    """Nobody asked for it."""
    client = synced(A)
    (refusal,) = client.receive(Response("type.googleapis.com/x", "x1"))
    assert refusal.error == "type.googleapis.com/x was not asked for"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("llama.models.internal:8000", SERVICE),
        ("LLAMA.models.internal:8000", SERVICE),
        (SERVICE, SERVICE),
        (subset_of("v1"), None),
        ("10.0.0.1:8000", None),
        ("[::1]:8000", None),
        ("llama", None),
        ("llama.models.internal:0", None),
        ("outbound|0||x", None),
        ("outbound|99999||x", None),
        ("inbound|8000||x", None),
        ("outbound|8000||", None),
    ],
)
def test_how_services_are_written(text: str, name: str | None) -> None:
    """As host and port, or in full; subsets, addresses and other clusters are no services."""
    found = MeshName.of(text)
    assert (None if found is None else str(found)) == name
