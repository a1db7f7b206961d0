"""Kubernetes objects as Tokenway reads them: what counts, what does not, and what nobody expected."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.discovery.kubernetes import pods as of_pods
from extproc.discovery.kubernetes import slices as of_slices
from extproc.discovery.kubernetes.fields import MAX_LABELS
from extproc.discovery.kubernetes.kinds import (
    INFERENCE,
    LLM_D,
    OBJECTIVES,
    PODS,
    POOLS,
    REWRITES,
    SLICES,
    Collection,
    collection_of_labels,
)
from extproc.discovery.kubernetes.pods import Pod, read_pod
from extproc.discovery.kubernetes.policies import policies_of, read_objective, read_rewrite
from extproc.discovery.kubernetes.pools import InferencePool, read_pool
from extproc.discovery.kubernetes.slices import Slice, read_slice
from extproc.discovery.kubernetes.view import reader_of
from extproc.discovery.listed import Listed
from extproc.values.pool_policies import ModelRewrite, PoolPolicies
from metadata_center.addresses import Address
from metadata_center.load.counters import KEY_BYTES

NO_NUMBERS = random.Random(1)


def pod_object(name: str = "llama-0", **changes: Any) -> dict[str, Any]:
    """A pod that is ready; a change is put where its dotted name says, `None` takes that away."""
    said: dict[str, Any] = {
        "metadata": {
            "name": name,
            "namespace": "models",
            "uid": f"uid-of-{name}",
            "labels": {"app": "vllm", "topology.kubernetes.io/zone": "z1"},
            "annotations": {},
        },
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.7",
            "podIPs": [{"ip": "10.0.0.7"}, {"ip": "2001:DB8::7"}],
            "conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}],
        },
    }
    for path, value in changes.items():
        *folders, last = path.split("__")
        where = said
        for folder in folders:
            where = where[folder]
        if value is None:
            where.pop(last, None)
        else:
            where[last] = value
    return said


def pod(**changes: Any) -> Pod:
    """What is kept of it."""
    found = read_pod(pod_object(**changes))
    assert found is not None
    return found


def ready(status: str) -> list[dict[str, str]]:
    """Conditions of a pod."""
    return [{"type": "Ready", "status": status}]


def addresses(listed: list[Listed]) -> list[str]:
    """Where they are."""
    return [str(one.address) for one in listed]


def test_a_pod_that_serves_is_an_endpoint_of_each_port() -> None:
    """By uid, address and port; with its labels, its zone and its name."""
    first, second = of_pods.endpoints_of(pod(), (8000, 8001), is_ipv6=False)
    assert first.address == Address("10.0.0.7", 8000)
    assert second.address == Address("10.0.0.7", 8001)
    assert first.key != second.key
    assert (first.ready, first.draining, first.locality) == (True, False, "z1")
    assert first.labels["app"] == "vllm"
    assert first.metadata == {"namespace": "models", "pod": "llama-0"}
    (other,) = of_pods.endpoints_of(pod(metadata__uid="another"), (8000,), is_ipv6=False)
    assert other.address == first.address
    assert other.key != first.key, "who takes over an address is another"


def test_identities_fit_whatever_the_address() -> None:
    """The longest IPv6 address with its port is still kept as it is, not as a hash of it."""
    long = "2001:db8:1111:2222:3333:4444:5555:6666"
    (listed,) = of_pods.endpoints_of(pod(status__podIP=long, status__podIPs=[]), (65_535,), is_ipv6=True)
    assert listed.key.startswith(f"[{long}]:65535/")
    assert len(listed.key) <= KEY_BYTES


@pytest.mark.parametrize(
    ("family_is_ipv6", "ips", "expected"),
    [
        (False, ["10.0.0.7", "2001:DB8::7"], ["10.0.0.7:8000"]),
        (True, ["10.0.0.7", "2001:DB8::7"], ["[2001:db8::7]:8000"]),
        (True, ["10.0.0.7"], []),
        (False, [], []),
        (False, ["0.0.0.0", "fe80::1%eth0", "a.b", "10.0.0.300", "10.0.0.8"], ["10.0.0.8:8000"]),
    ],
)
def test_one_family_of_addresses_is_used(family_is_ipv6: bool, ips: list[str], expected: list[str]) -> None:
    """IPv6 in brackets; what is no address of an engine is none."""
    one = pod(status__podIP=ips[0] if ips else None, status__podIPs=[{"ip": ip} for ip in ips])
    assert addresses(of_pods.endpoints_of(one, (8000,), is_ipv6=family_is_ipv6)) == expected


@pytest.mark.parametrize(
    ("changes", "is_ready", "is_draining"),
    [
        ({}, True, False),
        ({"status__conditions": ready("False")}, False, False),
        ({"status__conditions": ready("Unknown")}, False, False),
        ({"status__conditions": None}, False, False),
        ({"status__phase": "Pending"}, False, False),
        ({"metadata__deletionTimestamp": "2026-11-30T12:00:00Z"}, True, True),
        (
            {"metadata__deletionTimestamp": "2026-11-30T12:00:00Z", "status__conditions": ready("False")},
            True,
            True,
        ),
    ],
)
def test_readiness(changes: dict[str, Any], is_ready: bool, is_draining: bool) -> None:
    """Running, Ready and not being deleted; what is deleted drains, whatever else."""
    (listed,) = of_pods.endpoints_of(pod(**changes), (8000,), is_ipv6=False)
    assert (listed.ready, listed.draining) == (is_ready, is_draining)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_run_to_its_end_is_not_there(phase: str) -> None:
    """A finished Job may have the labels, and a Ready condition from before."""
    assert read_pod(pod_object(status__phase=phase)) is None


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({}, [8000, 8001, 8002]),
        ({f"{LLM_D}/active-ports": "8000"}, [8000]),
        ({f"{LLM_D}/active-ports": " 8002 , 8001,"}, [8001, 8002]),
        ({f"{INFERENCE}/active-ports": "8001"}, [8001]),
        ({f"{INFERENCE}/active-ports": "8001", f"{LLM_D}/active-ports": "8000"}, [8000]),
        ({f"{LLM_D}/active-ports": ""}, []),
        ({f"{LLM_D}/active-ports": "9000,x,99999999999999999999,-1,8001"}, [8001]),
        ({f"{LLM_D}/active-ports": 8000}, []),
        ({f"{LLM_D}/active-ports": "٨٠٠٠"}, []),
    ],
)
def test_active_ports(annotations: dict[str, Any], expected: list[int]) -> None:
    """The annotation names those that serve; llm-d's before the former one; what is no port is none."""
    one = pod(metadata__annotations=annotations)
    listed = of_pods.endpoints_of(one, (8000, 8001, 8002), is_ipv6=False)
    assert [each.address.port for each in listed] == expected


def test_hostile_names_and_labels_are_bounded() -> None:
    """Nothing but printable ASCII of a bounded length, and a bounded number of it."""
    labels = {f"k{i:05}": "v" for i in range(10_000)}
    labels |= {"a\n": "b", "c": "d\x1b[2J", "e": "x" * 100_000, "ф": "ж"}
    one = pod(metadata__labels=labels)
    assert len(one.labels) == MAX_LABELS
    assert not {"a\n", "c", "e", "ф"} & one.labels.keys()
    assert read_pod(pod_object(metadata__name="x" * 10_000)) is None
    assert read_pod(pod_object(metadata__name="\x1b[31m")) is None
    assert pod(metadata__namespace="<script>\x00").namespace == ""


HOSTILE: tuple[object, ...] = (
    *("\x1b[31mred\x1b[0m", "\x9b2J", "a\nb", "a\r", "a\x00b", "\x7f"),
    *("p\u00f6d", "\u202egnp.exe", "p\u200bod", "\ud800", "\U0010ffff", "x" * 513, "x" * 1_000_000),
    *(7, True, None, [], {"name": "x"}, ["x"]),
)
"""What no name may be: escapes of terminals, controls, what is not ASCII, too long, or no text."""


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_a_hostile_name_is_none(name: Any) -> None:
    """A pod without a name is none; a slice is read without what is hostile, and labels are passed over."""
    assert read_pod(pod_object(metadata__name=name)) is None
    assert read_pod(pod_object(metadata__uid=name)) is None
    assert pod(metadata__labels={"a": name, "b": "c"}).labels == {"b": "c"}
    of_pod = backend("10.0.0.7", "u")
    of_pod["targetRef"] |= {"name": name, "namespace": name}
    of_pod["zone"] = name
    (listed,) = of_slices.endpoints_of([slice_of(of_pod)], "http", is_ipv6=False)
    said = "".join((listed.key, listed.locality, *listed.metadata.values(), *listed.labels.values()))
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 600


@pytest.mark.parametrize("length", [1, 253, 512])
def test_a_name_of_any_length_that_is_allowed_is_read(length: int) -> None:
    """253 is Kubernetes' own bound."""
    assert pod(metadata__name="x" * length).name == "x" * length


def slice_object(*endpoints: dict[str, Any], family: str = "IPv4", **changes: Any) -> dict[str, Any]:
    """A slice of a Service with the ports http and metrics."""
    return {
        "metadata": {"name": "llama-x"},
        "addressType": family,
        "ports": [
            {"name": "metrics", "port": 9090, "protocol": "TCP"},
            {"name": "http", "port": 8000, "protocol": "TCP"},
            {"name": "quic", "port": 8443, "protocol": "UDP"},
        ],
        "endpoints": list(endpoints),
        **changes,
    }


def slice_of(*endpoints: dict[str, Any], **changes: Any) -> Slice:
    """What is kept of it."""
    found = read_slice(slice_object(*endpoints, **changes))
    assert found is not None
    return found


def backend(host: str, uid: str = "", **conditions: Any) -> dict[str, Any]:
    """An endpoint of a slice."""
    said: dict[str, Any] = {"addresses": [host], "conditions": conditions, "zone": "z2"}
    if uid:
        said["targetRef"] = {"kind": "Pod", "name": f"pod-{uid}", "namespace": "models", "uid": uid}
    return said


def test_an_endpoint_of_a_service() -> None:
    """The port by its name; the pod behind it is the one that a selector would find."""
    (listed,) = of_slices.endpoints_of(
        [slice_of(backend("10.0.0.7", "uid-of-llama-0"))], "http", is_ipv6=False
    )
    assert listed.address == Address("10.0.0.7", 8000)
    assert (listed.ready, listed.draining, listed.locality) == (True, False, "z2")
    assert listed.metadata == {"namespace": "models", "pod": "pod-uid-of-llama-0"}
    (of_pod,) = of_pods.endpoints_of(pod(), (8000,), is_ipv6=False)
    assert listed.key == of_pod.key, "one replica, whichever way it is found"
    (bare,) = of_slices.endpoints_of([slice_of(backend("10.0.0.9"))], "http", is_ipv6=False)
    assert bare.key == "10.0.0.9:8000"


@pytest.mark.parametrize(
    ("port", "expected"),
    [("http", [8000]), ("metrics", [9090]), ("8000", [8000]), ("quic", []), ("grpc", []), (None, [])],
)
def test_ports_are_known_by_name(port: str | None, expected: list[int]) -> None:
    """Or by number; without either only if there is one. TCP alone."""
    listed = of_slices.endpoints_of([slice_of(backend("10.0.0.7"))], port, is_ipv6=False)
    assert [one.address.port for one in listed] == expected


def test_a_single_port_needs_no_name_and_slices_may_differ_in_numbers() -> None:
    """A named target port is resolved per pod, so two slices of one Service may have two numbers."""
    slices = [
        slice_of(backend("10.0.0.1"), ports=[{"name": "", "port": 8000}]),
        slice_of(backend("10.0.0.2"), ports=[{"name": "", "port": 8001}]),
    ]
    assert addresses(of_slices.endpoints_of(slices, None, is_ipv6=False)) == [
        "10.0.0.1:8000",
        "10.0.0.2:8001",
    ]


@pytest.mark.parametrize(
    ("conditions", "is_ready", "is_draining"),
    [
        ({}, True, False),
        ({"ready": True, "serving": True, "terminating": False}, True, False),
        ({"ready": False, "serving": False, "terminating": False}, False, False),
        ({"ready": False, "serving": True, "terminating": True}, True, True),
        ({"ready": False, "serving": False, "terminating": True}, True, True),
        ({"ready": True, "terminating": True}, True, True),
    ],
)
def test_conditions_of_a_slice(conditions: dict[str, bool], is_ready: bool, is_draining: bool) -> None:
    """Not said is ready; terminating drains."""
    (listed,) = of_slices.endpoints_of(
        [slice_of({**backend("10.0.0.7"), "conditions": conditions})], "http", is_ipv6=False
    )
    assert (listed.ready, listed.draining) == (is_ready, is_draining)


def test_an_endpoint_in_two_slices_is_one() -> None:
    """While it moves; that it serves counts, in either order."""
    asleep, awake = slice_of(backend("10.0.0.7", ready=False)), slice_of(backend("10.0.0.7", ready=True))
    for slices in ([asleep, awake], [awake, asleep]):
        (listed,) = of_slices.endpoints_of(slices, "http", is_ipv6=False)
        assert listed.ready


def test_families_of_slices() -> None:
    """One family is used; names are no addresses; an address of the other family in a slice is none."""
    slices = [slice_of(backend("10.0.0.7")), slice_of(backend("2001:db8::7"), family="IPv6")]
    assert addresses(of_slices.endpoints_of(slices, "http", is_ipv6=True)) == ["[2001:db8::7]:8000"]
    assert addresses(of_slices.endpoints_of(slices, "http", is_ipv6=False)) == ["10.0.0.7:8000"]
    assert read_slice(slice_object(backend("a.b"), family="FQDN")) is None
    assert slice_of(backend("2001:db8::7"), backend("a.b")).backends == ()


def test_pools() -> None:
    """v1, the form before it, and what is neither."""
    v1 = {
        "spec": {
            "selector": {"matchLabels": {"b": "2", "a": "1"}},
            "targetPorts": [{"number": 8000}, {"number": 8001}],
        }
    }
    assert read_pool(v1) == InferencePool({"a": "1", "b": "2"}, (8000, 8001))
    former = {"spec": {"selector": {"a": "1"}, "targetPortNumber": 8000}}
    assert read_pool(former) == InferencePool({"a": "1"}, (8000,))
    odd = {
        "spec": {"selector": {"matchLabels": {}}, "targetPorts": [{"number": 0}, {"number": "8"}, 7, None]}
    }
    assert read_pool(odd) == InferencePool({}, ())
    many = {
        "spec": {
            "selector": {"matchLabels": {"a": "1"}},
            "targetPorts": [{"number": n} for n in range(1, 100)],
        }
    }
    assert len(read_pool(many).ports) == 8


def objective(pool: str, priority: Any = None) -> dict[str, Any]:
    """An InferenceObjective."""
    spec: dict[str, Any] = {"poolRef": {"group": INFERENCE, "kind": "InferencePool", "name": pool}}
    return {"metadata": {"name": "x"}, "spec": spec | ({} if priority is None else {"priority": priority})}


def rewrite(pool: str, *rules: Any, created: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    """An InferenceModelRewrite."""
    return {
        "metadata": {"name": "x", "creationTimestamp": created},
        "spec": {"poolRef": {"name": pool}, "rules": list(rules)},
    }


def rule(models: list[str], **targets: int) -> dict[str, Any]:
    """A rule of one."""
    return {
        "matches": [{"model": {"type": "Exact", "value": model}} for model in models],
        "targets": [{"modelRewrite": name, "weight": weight} for name, weight in targets.items()],
    }


def test_objectives_of_both_groups() -> None:
    """llm-d's counts before the former one of the same name; those of other pools not at all."""
    new = {"urgent": read_objective(objective("llama", 10)), "other": read_objective(objective("qwen", 5))}
    old = {"urgent": read_objective(objective("llama", -3)), "batch": read_objective(objective("llama", -1))}
    old["plain"] = read_objective(objective("llama"))
    old["odd"] = read_objective(objective("llama", 2**40))
    policies = policies_of("llama", [new, old], [])  # type: ignore[list-item]
    assert policies.priorities == {"urgent": 10, "batch": -1, "plain": 0, "odd": 0}


def test_rewrites_of_both_groups() -> None:
    """A rule for the model goes before one for any; then the oldest; shares as weights say."""
    new = {"a": read_rewrite(rewrite("llama", rule(["m"], new=1), created="2026-03-01T00:00:00Z"))}
    old = {
        "a": read_rewrite(rewrite("llama", rule(["m"], hidden=1))),
        "b": read_rewrite(
            rewrite("llama", rule([], any=1), rule(["k"], one=3, two=1), created="2026-02-01T00:00:00Z")
        ),
        "c": read_rewrite(rewrite("qwen", rule(["q"], no=1))),
    }
    policies = policies_of("llama", [], [new, old])  # type: ignore[list-item]
    assert policies.rewritten("m", NO_NUMBERS) == "new"
    assert policies.rewritten("else", NO_NUMBERS) == "any"
    drawn = Counter(policies.rewritten("k", NO_NUMBERS) for _ in range(4000))
    assert 0.70 < drawn["one"] / 4000 < 0.80
    assert PoolPolicies().rewritten("m", NO_NUMBERS) is None


def test_rewrites_that_say_nothing_are_left_out() -> None:
    """No target, a share of 0, a kind of match that is not known."""
    odd = [
        {"matches": [], "targets": []},
        {"targets": [{"modelRewrite": "x", "weight": 0}]},
        {"matches": [{"model": {"type": "Regex", "value": ".*"}}], "targets": [{"modelRewrite": "x"}]},
        7,
        None,
    ]
    found = read_rewrite(rewrite("llama", *odd))
    assert found is not None
    assert found.rules == ()
    kept = read_rewrite(rewrite("llama", {"targets": [{"modelRewrite": "x"}]}))
    assert kept is not None
    assert kept.rules == (ModelRewrite("", (("x", 1),)),)


def test_collections_are_asked_for_by_path_and_query() -> None:
    """As the API has them."""
    pods = collection_of_labels(PODS, "models", {"b": "2", "a": "1"})
    assert (pods.path, pods.query) == ("/api/v1/namespaces/models/pods", {"labelSelector": "a=1,b=2"})
    pool = Collection(POOLS[INFERENCE], "models", name="llama")
    assert pool.path == "/apis/inference.networking.k8s.io/v1/namespaces/models/inferencepools"
    assert pool.query == {"fieldSelector": "metadata.name=llama"}
    assert [str(Collection(kind, "m")) for kind in OBJECTIVES] == [
        "m/inferenceobjectives.llm-d.ai",
        "m/inferenceobjectives.inference.networking.x-k8s.io",
    ]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
KNOWN = (
    *(
        "metadata",
        "name",
        "namespace",
        "uid",
        "labels",
        "annotations",
        "deletionTimestamp",
        "creationTimestamp",
    ),
    *(
        "spec",
        "selector",
        "matchLabels",
        "targetPorts",
        "number",
        "targetPortNumber",
        "poolRef",
        "priority",
        "rules",
    ),
    *(
        "matches",
        "model",
        "type",
        "value",
        "targets",
        "weight",
        "modelRewrite",
        "status",
        "phase",
        "podIP",
        "podIPs",
    ),
    *(
        "ip",
        "conditions",
        "Ready",
        "addressType",
        "ports",
        "port",
        "protocol",
        "endpoints",
        "addresses",
        "targetRef",
    ),
)
OBJECTS = st.recursive(
    JSON,
    lambda inner: st.dictionaries(st.sampled_from(KNOWN), inner, max_size=6) | st.lists(inner, max_size=3),
    max_leaves=30,
)


@given(OBJECTS)
def test_no_object_makes_a_reading_raise(said: Any) -> None:
    """Fields of another type, depth or length are nothing, and what is kept makes endpoints or none."""
    about = (
        said
        if isinstance(said, dict)
        else {"metadata": said, "spec": said, "status": said, "endpoints": said}
    )
    for kind in (PODS, SLICES, POOLS[INFERENCE], *OBJECTIVES, *REWRITES):
        kept = reader_of(kind)(about)
        if isinstance(kept, Pod):
            of_pods.endpoints_of(kept, (8000,), is_ipv6=False)
        if isinstance(kept, Slice):
            of_slices.endpoints_of([kept], None, is_ipv6=False)


@given(st.data())
def test_no_field_of_a_good_object_makes_a_reading_raise(data: st.DataObject) -> None:
    """One field of an object that is otherwise good is anything."""
    said: Any = data.draw(
        st.sampled_from(
            [
                pod_object(),
                slice_object(backend("10.0.0.7", "u")),
                objective("p", 1),
                rewrite("p", rule(["m"], x=1)),
            ]
        )
    )
    where = said
    for _ in range(data.draw(st.integers(0, 4))):
        inner = [key for key, value in where.items() if isinstance(value, dict)]
        if not inner:
            break
        where = where[data.draw(st.sampled_from(inner))]
    if where:
        where[data.draw(st.sampled_from(sorted(where)))] = data.draw(JSON)
    for kind in (PODS, SLICES, POOLS[INFERENCE], *OBJECTIVES, *REWRITES):
        kept = reader_of(kind)(said)
        if isinstance(kept, Pod):
            of_pods.endpoints_of(kept, (8000,), is_ipv6=False)
        if isinstance(kept, Slice):
            of_slices.endpoints_of([kept], "http", is_ipv6=False)
