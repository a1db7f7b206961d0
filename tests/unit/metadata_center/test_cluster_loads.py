"""Load that callers report request by request, against AIGW's own test table and a naive model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata_center.errors import CapacityError
from metadata_center.load.kinds import NOTHING
from metadata_center.service.cluster_loads import ClusterLoads, EngineLoad, Limits
from metadata_center.types import RequestId

EXPIRY_S = 660.0
IDS = tuple(map(RequestId, ("1", "2", "3")))
ONE, TWO = IDS[:2]
A, B = "192.168.1.1", "192.168.1.2"


def shown(loads: ClusterLoads, cluster: str = "c", now_s: float = 0.0) -> dict[str, tuple[int, int]] | None:
    """Requests and prompt length by address; None if the cluster is unknown."""
    view = loads.view(cluster, now_s)
    return None if view is None else {load.address: (load.amounts[0], load.prompt_length) for load in view}


def test_the_load_table_of_aigw() -> None:
    """Adds, a duplicate, both deletes of a request and deletes of unknown ones count as AIGW's tests say."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 512, 0.0)
    assert shown(loads) == {A: (1, 512)}
    assert not loads.add(ONE, "c", A, 512, 0.0)
    assert shown(loads) == {A: (1, 512)}
    loads.add(TWO, "c", A, 512, 0.0)
    assert shown(loads) == {A: (2, 1024)}
    loads.delete_prompt(ONE, 0.0)
    assert shown(loads) == {A: (2, 512)}
    loads.delete(ONE, 0.0)
    assert shown(loads) == {A: (1, 512)}
    loads.delete_prompt(RequestId("noID"), 0.0)
    loads.delete(RequestId("noID"), 0.0)
    assert shown(loads) == {A: (1, 512)}
    assert shown(loads, "other") is None


def test_clusters_are_apart() -> None:
    """The same address in another cluster is another engine."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 512, 0.0)
    loads.add(TWO, "d", A, 256, 0.0)
    loads.add(RequestId("3"), "d", B, 128, 0.0)
    assert shown(loads, "c") == {A: (1, 512)}
    assert shown(loads, "d") == {A: (1, 256), B: (1, 128)}


@pytest.mark.parametrize("late_s", [0.0, 0.5, 1.1, EXPIRY_S - 1])
def test_an_add_that_comes_after_its_delete_never_counts(late_s: float) -> None:
    """Neither it nor its repetitions, however late; AIGW's leaks one that is over a second late."""
    loads = ClusterLoads(Limits())
    loads.delete(ONE, 0.0)
    assert not loads.add(ONE, "c", A, 512, late_s)
    assert not loads.add(ONE, "c", A, 512, late_s)
    assert shown(loads, now_s=late_s) is None


def test_an_ended_id_is_forgotten_in_the_end() -> None:
    """After the expiry an id may be used again."""
    loads = ClusterLoads(Limits())
    loads.delete(ONE, 0.0)
    assert loads.add(ONE, "c", A, 512, EXPIRY_S)


def test_a_repeated_add_of_an_ended_request_does_not_bring_it_back() -> None:
    """A retry of the add that arrives after the delete is void, also when the first add counted."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 512, 0.0)
    loads.delete(ONE, 1.0)
    assert not loads.add(ONE, "c", A, 512, 2.0)
    assert shown(loads, now_s=2.0) == {A: (0, 0)}


def test_an_add_that_comes_after_its_prompt_delete_brings_no_prompt() -> None:
    """The request counts, its prompt does not."""
    loads = ClusterLoads(Limits())
    loads.delete_prompt(ONE, 0.0)
    assert loads.add(ONE, "c", A, 512, 5.0)
    assert shown(loads, now_s=5.0) == {A: (1, 0)}
    loads.delete(ONE, 6.0)
    assert shown(loads, now_s=6.0) == {A: (0, 0)}


def test_a_prompt_delete_does_not_reopen_an_ended_request() -> None:
    """It may be the last to arrive."""
    loads = ClusterLoads(Limits())
    loads.delete(ONE, 0.0)
    loads.delete_prompt(ONE, 0.0)
    assert not loads.add(ONE, "c", A, 512, 1.0)


calls = st.lists(
    st.tuples(
        st.sampled_from(["add", "prompt", "refresh", "delete"]),
        st.sampled_from(IDS),
        st.sampled_from(["c", "d"]),
        st.sampled_from([A, B]),
        st.integers(0, 5),
    ),
    max_size=25,
)


@given(calls, st.permutations([(name, id_) for name in ("add", "prompt", "delete") for id_ in IDS]))
def test_any_order_of_calls_ends_at_zero(
    calls: Sequence[tuple[str, RequestId, str, str, int]], last: Sequence[tuple[str, RequestId]]
) -> None:
    """At every step the load is that of the requests added and not deleted; once all are, it is zero."""
    loads = ClusterLoads(Limits())
    live: dict[RequestId, tuple[str, str, int]] = {}
    prompt_ended: set[RequestId] = set()
    ended: set[RequestId] = set()
    for name, request_id, cluster, address, length in [*calls, *((*call, "c", A, 1) for call in last)]:
        if name == "add":
            if request_id not in ended:
                live.setdefault(request_id, (cluster, address, length))
            loads.add(request_id, cluster, address, length, 0.0)
        elif name == "prompt":
            prompt_ended.add(request_id)
            loads.delete_prompt(request_id, 0.0)
        elif name == "refresh":
            assert loads.refresh(request_id, 0.0, generated_tokens=length) == (request_id in live)
        else:
            live.pop(request_id, None)
            ended.add(request_id)
            loads.delete(request_id, 0.0)
        expected: dict[tuple[str, str], tuple[int, int]] = {}
        for owner, (at_cluster, at, held) in live.items():
            requests, prompt = expected.get((at_cluster, at), (0, 0))
            expected[at_cluster, at] = requests + 1, prompt + (0 if owner in prompt_ended else held)
        for at_cluster in ("c", "d"):
            for at, found in (shown(loads, at_cluster) or {}).items():
                assert found == expected.pop((at_cluster, at), (0, 0))
        assert expected == {}
        assert loads.in_flight == len(live)
    assert loads.in_flight == 0
    for address in (A, B):
        assert loads.at(address) == EngineLoad(address, 0, NOTHING, 0.0)


def test_time_ends_requests_without_an_end() -> None:
    """A request and then its engine go once their expiry has passed; the request counts as expired."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 512, 0.0)
    loads.add(TWO, "c", A, 512, 100.0)
    assert shown(loads, now_s=EXPIRY_S - 1) == {A: (2, 1024)}
    assert shown(loads, now_s=EXPIRY_S) == {A: (1, 512)}
    assert shown(loads, now_s=EXPIRY_S + 100) is None
    assert (loads.expired_requests, loads.in_flight, loads.endpoints) == (2, 0, 0)


def test_an_idle_engine_is_listed_until_its_news_is_old() -> None:
    """It stays at zero for one expiry after its last change, which `updated_s` shows."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 512, 0.0)
    loads.delete(ONE, 10.0)
    (load,) = loads.view("c", EXPIRY_S) or []
    assert (load.amounts, load.updated_s) == (NOTHING, 10.0)
    assert loads.view("c", EXPIRY_S + 10) is None


def test_requests_are_bounded() -> None:
    """One too many is refused and leaves no trace; the next fits once another is over."""
    loads = ClusterLoads(Limits(max_requests=1))
    loads.add(ONE, "c", A, 1, 0.0)
    with pytest.raises(CapacityError):
        loads.add(TWO, "d", B, 1, 0.0)
    assert (shown(loads, "d"), loads.endpoints) == (None, 1)
    loads.delete(ONE, 0.0)
    assert loads.add(TWO, "d", B, 1, 0.0)


def test_engines_are_bounded() -> None:
    """A new one beyond the bound is refused, known ones go on, and an idle one's place is free in the end."""
    loads = ClusterLoads(Limits(max_endpoints=1))
    loads.add(ONE, "c", A, 1, 0.0)
    with pytest.raises(CapacityError):
        loads.add(TWO, "c", B, 1, 0.0)
    assert loads.add(TWO, "c", A, 1, 0.0)
    assert loads.add(RequestId("3"), "c", B, 1, EXPIRY_S)


def test_memories_of_ended_requests_are_bounded() -> None:
    """The oldest makes room; only its late add would count again."""
    loads = ClusterLoads(Limits(max_ended=1))
    loads.delete(ONE, 0.0)
    loads.delete(TWO, 0.0)
    assert not loads.add(TWO, "c", A, 1, 0.0)
    assert loads.add(ONE, "c", A, 1, 0.0)


def test_tokens_are_counted_as_callers_report_them() -> None:
    """Input while the request lives, prefill until its prompt is deleted, output as it grows."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 400, 0.0)
    loads.add(TWO, "c", A, 400, 0.0, input_tokens=70)
    assert loads.view("c", 0.0) == [EngineLoad(A, 800, (2, 2, 170, 170, 0), 0.0)]
    loads.refresh(ONE, 1.0, input_tokens=90)
    assert loads.view("c", 1.0) == [EngineLoad(A, 800, (2, 2, 160, 160, 0), 1.0)]
    loads.delete_prompt(ONE, 2.0)
    loads.refresh(ONE, 3.0, input_tokens=80, generated_tokens=5)
    assert loads.view("c", 3.0) == [EngineLoad(A, 400, (2, 1, 70, 150, 5), 3.0)]
    loads.delete(ONE, 4.0)
    assert loads.view("c", 4.0) == [EngineLoad(A, 400, (1, 1, 70, 70, 0), 4.0)]


def test_generated_tokens_never_go_back() -> None:
    """A late count says less than is known."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 4, 0.0)
    for reported, known in ((3, 3), (9, 9), (5, 9), (None, 9)):
        loads.refresh(ONE, 0.0, generated_tokens=reported)
        assert loads.at(A).amounts[4] == known


def test_a_refreshed_request_starts_its_expiry_anew() -> None:
    """So does its engine; a request that is not known stays so."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 1, 0.0)
    loads.add(TWO, "c", A, 1, 0.0)
    assert loads.refresh(ONE, EXPIRY_S - 1)
    assert shown(loads, now_s=EXPIRY_S) == {A: (1, 1)}
    assert not loads.refresh(TWO, EXPIRY_S)
    assert shown(loads, now_s=2 * EXPIRY_S - 2) == {A: (1, 1)}
    assert shown(loads, now_s=2 * EXPIRY_S - 1) is None


def test_an_address_counts_over_all_clusters() -> None:
    """It is one engine to callers that know no clusters."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 4, 0.0)
    loads.add(TWO, "d", A, 40, 5.0)
    assert loads.at(A) == EngineLoad(A, 44, (2, 2, 11, 11, 0), 5.0)
    assert loads.addresses == {A}


def test_changes_are_named_once() -> None:
    """Whatever changed, expiry included."""
    loads = ClusterLoads(Limits())
    loads.add(ONE, "c", A, 1, 0.0)
    loads.add(TWO, "c", B, 1, 5.0)
    assert loads.take_changed() == {A, B}
    assert not loads.has_changed
    loads.refresh(TWO, 6.0)
    assert loads.take_changed() == {B}
    loads.advance(EXPIRY_S)
    assert loads.take_changed() == {A}
    assert loads.addresses == {B}
