"""The cached prefixes of the metadata-center service, against AIGW's own test tables and naive models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata_center.errors import CapacityError
from metadata_center.service.cluster_caches import ClusterCaches
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.state import ServiceState
from metadata_center.types import RequestId

HOUR_S = 3600.0
SPAN_S = HOUR_S / 64
A, B = "192.168.1.1", "192.168.1.2"


def engines(text: str) -> dict[str, int]:
    """Engine to length, from `engine:length` pairs."""
    return {name: int(length) for name, _, length in (pair.partition(":") for pair in text.split())}


def digits(text: str) -> list[int]:
    """A symbol chain, one digit each."""
    return [int(digit) for digit in text]


def found(
    caches: ClusterCaches, text: str, top_k: int = 100, cluster: str = "c", now_s: float = 0.0
) -> dict[str, int]:
    """Engine to length for a symbol chain."""
    return dict(caches.query(cluster, digits(text), top_k, now_s))


def saved(text: str, limits: Limits | None = None) -> ClusterCaches:
    """A cache that was given `chain@engine` pairs at time 0."""
    caches = ClusterCaches(limits or Limits())
    for pair in text.split():
        chain, _, engine = pair.partition("@")
        caches.save("c", engine, digits(chain), 0.0)
    return caches


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("123456", "1:6 2:4 3:3 4:3 5:3"),
        ("1235", "1:3 2:3 3:4 4:4 5:3"),
        ("1239", "1:3 2:3 3:3 4:3 5:3"),
        ("2345", "6:4 7:3"),
        ("5", ""),
        ("", ""),
    ],
)
def test_the_radix_rows_of_aigw(query: str, expected: str) -> None:
    """Each engine's longest common prefix, in hashes."""
    caches = saved("123456@1 1234@1 1234@2 123@3 12356@4 12356@3 12378@5 2345@6 2346@7 4398@8 4612@9 4418@10")
    assert found(caches, query) == engines(expected)


def test_top_k_names_the_longest_first() -> None:
    """Ties are cut anyhow; 0 means the default."""
    caches = saved("1@100 123@101 123@102 1234@103 1234@104 12@105")
    assert caches.query("c", digits("1234"), 3, 0.0)[:2] == [("103", 4), ("104", 4)]
    assert len(found(caches, "1234", 3)) == 3
    assert [length for _, length in caches.query("c", digits("1234"), 0, 0.0)] == [4, 4, 3, 3, 2]


def test_cached_prefixes_of_clusters_are_apart() -> None:
    """What one cluster's engine holds is not found in another."""
    caches = saved("12@1")
    assert found(caches, "12", cluster="d") == {}
    caches.save("d", "1", digits("1"), 0.0)
    assert found(caches, "12", cluster="d") == {"1": 1}


def test_a_prefix_outlives_its_expired_extension() -> None:
    """Depth shrinks to what was saved last, and the engine that saved nothing since is gone."""
    caches = saved("1234@1")
    caches.save("c", "2", digits("1234"), 0.0)
    caches.save("c", "2", digits("123"), HOUR_S / 2)
    assert found(caches, "1234", now_s=HOUR_S - 1) == {"1": 4, "2": 4}
    assert found(caches, "1234", now_s=HOUR_S + SPAN_S) == {"2": 3}
    assert (caches.expired_blocks, caches.blocks, caches.endpoints) == (5, 3, 1)


def test_prefixes_expire_within_a_span_of_their_hour() -> None:
    """None goes early, all are gone one sixty-fourth later, and the cluster can start anew."""
    caches = ClusterCaches(Limits())
    for tick in range(200):
        caches.save("c", A, [tick], tick * 1.0)
    for now_s in (HOUR_S, HOUR_S + 50, HOUR_S + 150):
        kept = [tick for tick in range(200) if caches.query("c", [tick], 1, now_s)]
        assert set(range(int(now_s - HOUR_S) + 1, 200)) <= set(kept)
        assert min(kept) >= now_s - HOUR_S - SPAN_S - 1
    caches.advance(HOUR_S + 200 + SPAN_S)
    assert (caches.blocks, caches.endpoints, caches.expired_blocks) == (0, 0, 200)
    caches.save("c", A, [7], HOUR_S * 2)
    assert caches.query("c", [7], 1, HOUR_S * 2) == [(A, 1)]


def test_a_save_starts_the_hour_anew() -> None:
    """A prefix saved every half hour stays."""
    caches = ClusterCaches(Limits())
    for half in range(6):
        caches.save("c", A, digits("123"), half * HOUR_S / 2)
    assert found(caches, "123", now_s=3.4 * HOUR_S) == {A: 3}
    assert caches.expired_blocks == 0


hash_lists = st.lists(st.integers(0, 2) | st.sampled_from([2**61 - 1, 2**64 - 1]), max_size=6)


@given(st.lists(st.tuples(st.sampled_from([A, B]), hash_lists), max_size=10), hash_lists)
def test_any_list_of_numbers_means_its_prefixes(
    saves: Sequence[tuple[str, list[int]]], query: list[int]
) -> None:
    """A match is the longest common prefix with anything saved, chained hashes or not."""
    caches = ClusterCaches(Limits())
    expected: dict[str, int] = {}
    for address, hashes in saves:
        caches.save("c", address, hashes, 0.0)
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(hashes, query, strict=False))))
        expected[address] = max(expected.get(address, 0), common)
    assert dict(caches.query("c", query, 9, 0.0)) == {at: length for at, length in expected.items() if length}
    assert caches.blocks == sum(
        len({tuple(hashes[: end + 1]) for at, hashes in saves if at == address for end in range(len(hashes))})
        for address in (A, B)
    )


def test_blocks_are_bounded() -> None:
    """Over the bound the fullest engine loses what it saved least recently, never what was saved last."""
    caches = ClusterCaches(Limits(max_blocks=40))
    caches.save("c", "small", digits("12"), 0.0)
    for first in range(100):
        caches.save("c", "big", [first, 1, 2], 0.0)
        assert caches.blocks <= 40
        assert caches.query("c", [first, 1, 2], 1, 0.0) == [("big", 3)]
    assert found(caches, "12")["small"] == 2


def test_blocks_of_one_engine_are_bounded() -> None:
    """Of a prompt beyond the engine's bound, the head is kept."""
    caches = saved("12345@1", Limits(max_blocks_per_endpoint=3))
    assert found(caches, "12345") == {"1": 3}


def test_engines_with_prefixes_are_bounded() -> None:
    """A new one beyond the bound is refused, in any cluster, and makes no cluster."""
    caches = saved("1@1", Limits(max_endpoints=1))
    for cluster in ("c", "d"):
        with pytest.raises(CapacityError):
            caches.save(cluster, "2", [1], 0.0)
    caches.save("c", "1", [2], 0.0)
    assert (caches.endpoints, caches.blocks) == (1, 2)


def test_an_engine_emptied_to_make_room_is_forgotten() -> None:
    """Its cluster goes with it, and what is remembered of its saves does not touch its successor."""
    caches = ClusterCaches(Limits(max_blocks=1))
    caches.save("c", "1", [1], 0.0)
    caches.save("d", "1", [1], 0.0)
    assert (caches.blocks, caches.endpoints) == (1, 1)
    kept = "d" if caches.query("d", [1], 1, 0.0) else "c"
    caches.save("e", "1", [1], 0.0)
    caches.save(kept, "2", [2], HOUR_S)
    caches.advance(HOUR_S + SPAN_S)
    assert caches.blocks == caches.endpoints == 1


def test_an_empty_prompt_says_nothing() -> None:
    """It makes no engine known."""
    caches = ClusterCaches(Limits())
    caches.save("c", A, [], 0.0)
    assert caches.endpoints == 0


def test_the_state_expires_both_halves() -> None:
    """One call does what is due in both."""
    state = ServiceState(Limits(), zero_unix_ns=1_000)
    state.loads.add(RequestId("r"), "c", A, 1, 0.0)
    state.caches.save("c", A, [1], 0.0)
    state.advance(2 * HOUR_S)
    assert (state.loads.endpoints, state.caches.endpoints) == (0, 0)
    assert state.unix_ns(1.5) == 1_500_001_000
