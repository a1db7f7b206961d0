"""What is watched for which cluster, and which endpoints come of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from extproc.config.sections.kubernetes import KubernetesDiscovery
from extproc.discovery.kubernetes.kinds import (
    FORMER_INFERENCE,
    INFERENCE,
    OBJECTIVES,
    PODS,
    POOLS,
    REWRITES,
    SLICES,
    Collection,
    collection_of_labels,
)
from extproc.discovery.kubernetes.pods import Pod
from extproc.discovery.kubernetes.policies import Objective
from extproc.discovery.kubernetes.pools import InferencePool
from extproc.discovery.kubernetes.slices import Backend, Slice
from extproc.discovery.kubernetes.view import View
from extproc.discovery.listed import Listed

POOL = Collection(POOLS[INFERENCE], "models", name="llama")
LLAMA_PODS = collection_of_labels(PODS, "models", {"app": "llama"})
OPTIONAL = tuple(Collection(kind, "models") for kind in (*OBJECTIVES, *REWRITES))


def settings(**said: Any) -> KubernetesDiscovery:
    """Settings as a file says them."""
    return KubernetesDiscovery.model_validate(said)


def pool_view() -> View:
    """Of the pool llama."""
    return View(settings(pool={"name": "llama"}), "models")


def pool(app: str = "llama", *ports: int) -> InferencePool:
    """What the pool says."""
    return InferencePool({"app": app}, ports or (8000,))


def pod(
    number: int, app: str = "llama", *, ready: bool = True, terminating: bool = False, uid: str = ""
) -> Pod:
    """A pod."""
    return Pod(
        name=f"p{number}",
        uid=uid or f"uid{number}",
        namespace="models",
        addresses=(f"10.0.0.{number}", f"2001:db8::{number}"),
        labels={"app": app},
        active_ports=None,
        is_ready=ready and not terminating,
        is_terminating=terminating,
    )


def tell(view: View, collection: Collection, **objects: Any) -> dict[str, list[Listed]]:
    """Objects of a collection that is listed."""
    view.update(collection, objects, is_listed=True)
    return view.changes()


def seen(changes: Mapping[str, list[Listed]]) -> dict[str, list[tuple[str, str]]]:
    """Each endpoint's address, and what it is good for."""
    return {
        name: sorted(
            (str(one.address), "draining" if one.draining else "ready" if one.ready else "not ready")
            for one in listed
        )
        for name, listed in changes.items()
    }


def following(**objects: Any) -> View:
    """A view of the pool llama whose pods are these."""
    view = pool_view()
    tell(view, POOL, llama=pool())
    tell(view, LLAMA_PODS, **objects)
    return view


def test_a_pool_is_followed_and_then_its_pods() -> None:
    """Which pods are wanted is known once the pool is; the cluster is told once they are listed."""
    view = pool_view()
    assert view.wanted() == (POOL, *OPTIONAL)
    assert tell(view, POOL, llama=pool("llama", 8000, 8001)) == {}
    assert view.wanted() == (POOL, LLAMA_PODS, *OPTIONAL)
    assert not view.is_whole
    view.update(LLAMA_PODS, {"p1": pod(1)}, is_listed=False)
    assert view.changes() == {}
    view.update(LLAMA_PODS, {}, is_listed=True)
    changes = view.changes()
    assert seen(changes) == {"llama": [("10.0.0.1:8000", "ready"), ("10.0.0.1:8001", "ready")]}
    assert view.is_whole
    assert view.changes() == {}


def test_a_pool_that_is_not_there_has_no_endpoints() -> None:
    """Nor one that is deleted; and its pods are not watched any more."""
    view = pool_view()
    assert tell(view, POOL) == {"llama": []}
    assert view.is_whole
    view = following(p1=pod(1))
    assert tell(view, POOL, llama=None) == {"llama": []}
    assert LLAMA_PODS not in view.wanted()
    assert tell(view, POOL, llama=pool()) == {}, "known again once its pods are listed"
    assert seen(tell(view, LLAMA_PODS, p1=pod(1))) == {"llama": [("10.0.0.1:8000", "ready")]}


def test_a_pool_without_a_selector_has_no_pods() -> None:
    """It is not taken to mean all pods of the namespace."""
    view = pool_view()
    assert tell(view, POOL, llama=InferencePool({}, (8000,))) == {"llama": []}
    assert all(one.kind != PODS for one in view.wanted())


def test_a_pod_that_is_not_ready_is_kept_and_one_that_never_was_is_not_told() -> None:
    """So a flap forgets nothing, and engines that load are not asked for anything."""
    view = following(p1=pod(1), p2=pod(2, ready=False))
    assert seen(tell(view, LLAMA_PODS, p1=pod(1, ready=False))) == {"llama": [("10.0.0.1:8000", "not ready")]}
    assert seen(tell(view, LLAMA_PODS, p2=pod(2))) == {
        "llama": [("10.0.0.1:8000", "not ready"), ("10.0.0.2:8000", "ready")]
    }
    assert seen(tell(view, LLAMA_PODS, p1=pod(1))) == {
        "llama": [("10.0.0.1:8000", "ready"), ("10.0.0.2:8000", "ready")]
    }


def test_a_pod_that_terminates_drains_until_it_is_gone() -> None:
    """Its requests finish; another pod of its name and address is another replica."""
    view = following(p1=pod(1))
    (first,) = tell(view, LLAMA_PODS, p1=pod(1, terminating=True))["llama"]
    assert first.draining
    assert tell(view, LLAMA_PODS, p1=None) == {"llama": []}
    assert tell(view, LLAMA_PODS, p2=pod(2, terminating=True)) == {}, "it was never told"
    (second,) = tell(view, LLAMA_PODS, p1=pod(1, uid="new"))["llama"]
    assert second.address == first.address
    assert second.key != first.key


def test_of_two_at_one_address_the_one_that_serves_comes_first() -> None:
    """Host network: the old pod drains while the new one has its place already."""
    view = following(a=pod(1, uid="old"))
    tell(view, LLAMA_PODS, a=pod(1, uid="old", terminating=True))
    listed = tell(view, LLAMA_PODS, b=pod(1, uid="new"))["llama"]
    assert [one.draining for one in listed] == [False, True]


def test_a_port_that_is_removed_is_gone_at_once() -> None:
    """Of the pool, or of one pod by its annotation."""
    view = pool_view()
    tell(view, POOL, llama=pool("llama", 8000, 8001))
    tell(view, LLAMA_PODS, p1=pod(1))
    assert seen(tell(view, POOL, llama=pool("llama", 8001))) == {"llama": [("10.0.0.1:8001", "ready")]}
    active = Pod("p1", "uid1", "models", ("10.0.0.1",), {"app": "llama"}, frozenset(), True, False)
    assert tell(view, LLAMA_PODS, p1=active) == {"llama": []}


def test_a_selector_that_changes_drops_pods_at_once_and_keeps_those_of_both() -> None:
    """Nothing of the pool's is missing while the pods of the new selector are listed."""
    both = Pod("p2", "uid2", "models", ("10.0.0.2",), {"app": "llama", "tier": "a"}, None, True, False)
    view = following(p1=pod(1), p2=both)
    narrower = InferencePool({"app": "llama", "tier": "a"}, (8000,))
    new_pods = collection_of_labels(PODS, "models", narrower.labels)
    assert seen(tell(view, POOL, llama=narrower)) == {"llama": [("10.0.0.2:8000", "ready")]}
    assert set(view.wanted()) >= {new_pods, LLAMA_PODS}
    view.update(new_pods, {"p2": both}, is_listed=False)
    assert view.changes() == {}
    assert seen(tell(view, LLAMA_PODS, p2=None)) == {"llama": []}, "the former list still speaks"
    tell(view, LLAMA_PODS, p2=both)
    assert tell(view, new_pods) == {}, "the same"
    assert LLAMA_PODS not in view.wanted()
    view.update(LLAMA_PODS, {"p9": pod(9)}, is_listed=True)
    assert view.changes() == {}, "what is wanted no more changes nothing"
    third = Pod("p3", "uid3", "models", ("10.0.0.3",), {"app": "llama", "tier": "a"}, None, True, False)
    assert seen(tell(view, new_pods, p3=third))["llama"][1] == ("10.0.0.3:8000", "ready")


def test_a_selector_that_changes_back_is_as_it_was() -> None:
    """The list that is still there speaks again."""
    view = following(p1=pod(1))
    assert tell(view, POOL, llama=pool("other")) == {"llama": []}
    assert seen(tell(view, POOL, llama=pool())) == {"llama": [("10.0.0.1:8000", "ready")]}
    assert [one for one in view.wanted() if one.kind == PODS] == [LLAMA_PODS]


def test_selectors_and_services_are_clusters_of_their_own() -> None:
    """Each told for itself; namespaces of their own or the gateway's."""
    view = View(
        settings(
            selectors=[
                {"name": "vllm", "match_labels": {"app": "x"}, "target_ports": [8000]},
                {"name": "more", "namespace": "b", "match_labels": {"app": "x"}, "target_ports": [9000]},
            ],
            services=[{"name": "qwen", "port": "http", "cluster": "q"}],
        ),
        "a",
    )
    here, there = (collection_of_labels(PODS, namespace, {"app": "x"}) for namespace in "ab")
    slices = collection_of_labels(SLICES, "a", {"kubernetes.io/service-name": "qwen"})
    assert view.wanted() == (here, there, slices)
    assert seen(tell(view, there, p1=pod(1))) == {"more": [("10.0.0.1:9000", "ready")]}
    backend = Backend("10.0.0.5", "", "", "", "", True, False)
    assert seen(tell(view, slices, s=Slice(False, {"http": 8000}, (backend,)))) == {
        "q": [("10.0.0.5:8000", "ready")]
    }
    assert not view.is_whole
    assert tell(view, here) == {"vllm": []}
    assert view.is_whole


def test_address_family() -> None:
    """By setting."""
    view = View(settings(pool={"name": "llama"}, address_family="ipv6"), "models")
    tell(view, POOL, llama=pool())
    assert seen(tell(view, LLAMA_PODS, p1=pod(1))) == {"llama": [("[2001:db8::1]:8000", "ready")]}


def test_what_is_said_of_requests_is_there_when_it_is() -> None:
    """It holds no cluster up, and goes when it goes."""
    view = following(p1=pod(1))
    assert tell(view, OPTIONAL[0], urgent=Objective("llama", 7)) == {}
    assert view.policies.priorities == {"urgent": 7}
    assert tell(view, OPTIONAL[0], urgent=None) == {}
    assert view.policies.priorities == {}


def test_a_pool_of_the_former_group() -> None:
    """Is asked for in its own version; its cluster may have another name."""
    view = View(
        settings(pool={"name": "llama", "namespace": "x", "group": FORMER_INFERENCE, "cluster": "c"}), "m"
    )
    assert view.wanted()[0].path == f"/apis/{FORMER_INFERENCE}/v1alpha2/namespaces/x/inferencepools"
    assert tell(view, view.wanted()[0]) == {"c": []}


@given(
    st.permutations(range(6)), st.lists(st.sampled_from([None, "ready", "not ready"]), min_size=6, max_size=6)
)
def test_the_order_of_what_is_told_does_not_matter(order: list[int], states: list[str | None]) -> None:
    """Whatever comes first, in the end it is what a fresh view makes of the same objects."""
    objects = {
        f"p{n}": None if state is None else pod(n + 1, ready=state == "ready")
        for n, state in enumerate(states)
    }
    told = following(**{name: pod(n + 1) for n, name in enumerate(objects)})
    result: list[Listed] = []
    for n in order:
        result = tell(told, LLAMA_PODS, **{f"p{n}": objects[f"p{n}"]}).get("llama", result)
    fresh = pool_view()
    tell(fresh, POOL, llama=pool())
    expected = tell(fresh, LLAMA_PODS, **{name: one for name, one in objects.items() if one is not None})
    if any(state is None or state == "not ready" for state in states):
        assert [str(one.address) for one in result if one.ready] == [
            str(one.address) for one in expected["llama"]
        ]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "nothing is listed"),
        ({"pool": {"name": "a"}, "services": [{"name": "a"}]}, "`a`; accepted: distinct"),
        ({"pool": {"name": "A b"}}, "pool.name"),
        ({"pool": {"name": "a", "group": "x"}}, "pool.group"),
        ({"pool": {"name": "a"}, "context": "c"}, "context with kubeconfig"),
        ({"selectors": [{"name": "a", "match_labels": {}, "target_ports": [1]}]}, "match_labels"),
        ({"selectors": [{"name": "a", "match_labels": {"a": "b,c=d"}, "target_ports": [1]}]}, "match_labels"),
        ({"selectors": [{"name": "a", "match_labels": {"a": "b"}, "target_ports": []}]}, "target_ports"),
    ],
)
def test_settings_that_cannot_be_meant(said: dict[str, Any], words: str) -> None:
    """Are refused with what is accepted."""
    with pytest.raises(ValidationError) as error:
        settings(**said)
    assert words in str(error.value).replace("\n", "."), str(error.value)
