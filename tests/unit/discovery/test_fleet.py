"""The fleet: sources merged, differences out, identities kept apart from addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.discovery.fleet import MAX_FORMER, Fleet
from extproc.discovery.listed import Listed
from metadata_center.addresses import Address
from metadata_center.load.counters import KEY_BYTES
from metadata_center.types import EndpointKey


def at(number: int) -> Address:
    """An address."""
    return Address(f"10.0.0.{number}", 8000)


def pod(number: int, **changes: object) -> Listed:
    """A replica whose identity is not its address."""
    return Listed(f"uid/{number}", **{"address": at(number), **changes})  # type: ignore[arg-type]


def keys(*numbers: int) -> list[EndpointKey]:
    """Identities of pods."""
    return [EndpointKey(f"uid/{number}") for number in numbers]


def members(fleet: Fleet) -> dict[str, list[str]]:
    """Keys of each cluster."""
    return {name: [str(one.key) for one in endpoints] for name, endpoints in fleet.clusters.items()}


def test_a_source_lists_all_and_its_differences_come_out() -> None:
    """Added, removed, changed what; clusters that are new or gone; nothing for the same again."""
    fleet = Fleet()
    first = fleet.replace("a", {"c": [pod(1), pod(2)], "empty": []})
    assert [one.key for one in first.added] == keys(1, 2)
    assert first.new_clusters == {"c", "empty"}
    assert not fleet.replace("a", {"c": [pod(1), pod(2)], "empty": []})
    second = fleet.replace("a", {"c": [pod(2, weight=3, draining=True), pod(3)]})
    assert [one.key for one in second.removed] == keys(1)
    assert [one.key for one in second.added] == keys(3)
    ((change),) = second.changed
    assert change.after.key == keys(2)[0]
    assert change.what == {"weight", "draining"}
    assert second.gone_clusters == {"empty"}
    assert second.clusters == {"c", "empty"}
    assert list(second.keys) == keys(1, 2, 3)
    assert members(fleet) == {"c": ["uid/2", "uid/3"]}


def test_a_source_may_list_one_cluster() -> None:
    """Its others stay; None takes one away."""
    fleet = Fleet()
    fleet.replace("a", {"c": [pod(1)], "d": [pod(2)]})
    assert fleet.update("a", {"c": [pod(1), pod(3)]}).clusters == {"c"}
    assert fleet.update("a", {"d": None}).gone_clusters == {"d"}
    assert members(fleet) == {"c": ["uid/1", "uid/3"]}


def test_several_sources_are_one_fleet() -> None:
    """Each owns what it lists; of two at one place the source that came first counts, until it goes."""
    fleet = Fleet()
    fleet.replace("files", {"c": [Listed("10.0.0.1:8000", at(1), weight=5)]})
    twice = fleet.replace("kubernetes", {"c": [pod(1), pod(2)], "k": [pod(2)]})
    assert [one.key for one in twice.added] == [*keys(2), *keys(2)]
    assert members(fleet) == {"c": ["10.0.0.1:8000", "uid/2"], "k": ["uid/2"]}
    gone = fleet.withdraw("files")
    assert [one.key for one in gone.removed] == ["10.0.0.1:8000"]
    assert [one.key for one in gone.added] == keys(1)
    assert {one.source for one in fleet.endpoints} == {"kubernetes"}
    assert not gone.gone_clusters


def test_a_source_that_says_nothing_keeps_what_it_said() -> None:
    """Whatever others say meanwhile."""
    fleet = Fleet()
    fleet.replace("kubernetes", {"k": [pod(1)]})
    fleet.replace("files", {"c": [pod(2)]})
    fleet.replace("files", {})
    assert members(fleet) == {"k": ["uid/1"]}


def test_one_replica_in_two_clusters_is_one_identity() -> None:
    """What it is, is listed once per cluster; it is there until it has left both."""
    fleet = Fleet()
    fleet.replace("a", {"c": [pod(1)], "d": [pod(1, draining=True)]})
    (key,) = keys(1)
    assert [(one.cluster, one.draining) for one in fleet.of(key)] == [("c", False), ("d", True)]
    fleet.update("a", {"c": []})
    assert fleet.address(key) == at(1)
    fleet.update("a", {"d": []})
    assert (fleet.of(key), fleet.address(key), fleet.keys) == ((), None, frozenset())


def test_an_address_is_what_was_sent_there_or_is_there_now() -> None:
    """A replica that left, or moved, is still what a running request was sent to."""
    fleet = Fleet()
    fleet.replace("a", {"c": [pod(1), pod(2)]})
    one, two, three = keys(1, 2, 3)
    assert fleet.at(at(2)) == two
    moved = fleet.replace("a", {"c": [pod(2, address=at(7)), pod(3, address=at(1))]})
    assert moved.moved == {two}
    assert fleet.address(two) == at(7)
    assert fleet.at(at(1), [one, two]) == one  # it was sent there, though another is there now
    assert fleet.at(at(1)) == fleet.at(at(1), [two]) == three
    assert fleet.at(at(2)) == fleet.at(at(2), [two]) == two  # none is there; it was the last
    stranger = fleet.at(at(99))
    assert fleet.of(stranger) == ()


def test_ranks_at_one_address_are_endpoints_of_their_own() -> None:
    """Identity, address and rank are three things."""
    fleet = Fleet()
    ranks = [Listed(f"uid/1/{rank}", at(1), rank=rank) for rank in (0, 1)]
    fleet.replace("a", {"c": ranks})
    assert [(one.key, one.rank) for one in fleet.endpoints] == [("uid/1/0", 0), ("uid/1/1", 1)]
    assert fleet.at(at(1), [EndpointKey("uid/1/1")]) == "uid/1/1"


@pytest.mark.parametrize("key", ["x" * (KEY_BYTES + 1), "", "ü", "a\nb", "é" * 500])
def test_any_key_of_a_source_becomes_an_identity_that_fits(key: str) -> None:
    """ASCII, printable, no longer than the counters' names, and the same each time."""
    fleets = [Fleet(), Fleet()]
    for fleet in fleets:
        fleet.replace("a", {"c": [Listed(key, at(1))]})
    one, other = (fleet.endpoints[0].key for fleet in fleets)
    assert one == other
    assert 0 < len(one) <= KEY_BYTES
    assert one.isascii()
    assert one.isprintable()


def test_former_addresses_are_bounded() -> None:
    """The oldest is forgotten."""
    fleet = Fleet()
    for number in range(MAX_FORMER + 10):
        fleet.replace(
            "a", {"c": [Listed(f"uid/{number}", Address(f"10.1.{number // 250}.{number % 250}", 1))]}
        )
    assert len(fleet._former) == len(fleet._last) == MAX_FORMER


def test_what_is_there_stays_when_sources_list_more_than_the_bound() -> None:
    """New ones are left out, counted, and come in as others leave, of whatever source and cluster."""
    fleet = Fleet(max_endpoints=2)
    assert fleet.replace("a", {"c": [pod(2), pod(3)]}).left_out is None
    more = fleet.replace("b", {"d": [pod(1), pod(2), pod(4)], "e": [pod(4)]})
    assert members(fleet) == {"c": ["uid/2", "uid/3"], "d": ["uid/2"], "e": []}
    assert more.left_out == fleet.left_out == 2
    fewer = fleet.replace("a", {"c": [pod(2)]})
    assert members(fleet) == {"c": ["uid/2"], "d": ["uid/1", "uid/2"], "e": []}
    assert (fewer.left_out, [one.key for one in fewer.added]) == (1, keys(1))
    fleet.replace("a", {"c": []})
    assert (fleet.left_out, members(fleet)["d"]) == (1, ["uid/1", "uid/2"])
    last = fleet.replace("b", {"d": [pod(4)], "e": [pod(4)]})
    assert (last.left_out, fleet.left_out) == (0, 0)
    assert members(fleet) == {"c": [], "d": ["uid/4"], "e": ["uid/4"]}


def test_another_number_left_out_is_a_difference() -> None:
    """Though no endpoint came or went; the same number again is none."""
    fleet = Fleet(max_endpoints=1)
    fleet.replace("a", {"c": [pod(1)]})
    assert fleet.replace("b", {"c": [pod(2)]})
    assert not fleet.replace("b", {"c": [pod(3)]})
    assert fleet.replace("b", {"c": []}).left_out == 0


def test_a_replica_that_goes_to_another_cluster_keeps_its_place() -> None:
    """A new one of the same word does not take it."""
    fleet = Fleet(max_endpoints=1)
    fleet.replace("a", {"d": [pod(1)]})
    fleet.replace("a", {"c": [pod(2)], "d": [], "e": [pod(1)]})
    assert members(fleet) == {"c": [], "d": [], "e": ["uid/1"]}


states = st.dictionaries(
    st.sampled_from("cde"),
    st.lists(
        st.builds(
            pod,
            st.integers(1, 5),
            address=st.integers(1, 5).map(at),
            weight=st.integers(1, 2),
            draining=st.booleans(),
        ),
        max_size=4,
    ),
)


@given(st.lists(st.tuples(st.sampled_from(("a", "b")), states), max_size=8), st.integers(1, 6))
def test_differences_add_up_to_the_fleet(
    words: Sequence[tuple[str, Mapping[str, Sequence[Listed]]]], max_endpoints: int
) -> None:
    """A follower that applies every difference has the fleet, and the fleet is what the last words say."""
    fleet = Fleet(max_endpoints)
    left_out = 0
    mirror: dict[str, dict[EndpointKey, object]] = {}
    last: dict[str, Mapping[str, Sequence[Listed]]] = {}
    for source, clusters in words:
        last[source] = clusters
        before = fleet.keys
        difference = fleet.replace(source, clusters)
        left_out = left_out if difference.left_out is None else difference.left_out
        assert left_out == fleet.left_out
        listed = {one.key for of_source in last.values() for some in of_source.values() for one in some}
        assert len(fleet.keys) <= max_endpoints
        assert not left_out or len(fleet.keys) == max_endpoints
        assert not before - fleet.keys - {one.key for one in difference.removed}
        assert fleet.keys <= listed
        for name in difference.new_clusters:
            mirror[name] = {}
        for one in difference.removed:
            del mirror[one.cluster][one.key]
        for change in difference.changed:
            assert mirror[change.after.cluster][change.after.key] == change.before
            assert change.what
            mirror[change.after.cluster][change.after.key] = change.after
        for one in difference.added:
            assert one.key not in mirror[one.cluster]
            mirror[one.cluster][one.key] = one
        for name in difference.gone_clusters:
            assert not mirror.pop(name)
        assert bool(difference) is any(
            (difference.added, difference.removed, difference.changed, difference.clusters)
        ) or (difference.left_out is not None)
    assert mirror == {name: {one.key: one for one in found} for name, found in fleet.clusters.items()}
    assert fleet.keys == {one.key for one in fleet.endpoints}
    if not fleet.left_out:  # else what came first stays
        again = Fleet(max_endpoints)
        for source in dict.fromkeys(source for source, _ in words):
            again.replace(source, last[source])
        assert {name: list(found) for name, found in again.clusters.items()} == {
            name: list(found) for name, found in fleet.clusters.items()
        }
        for one in fleet.endpoints:
            assert fleet.at(one.address, [one.key]) == one.key
