"""Smooth weighted round-robin: shares, smoothness, and what survives a change of the pool."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.choose import choose
from extproc.choosing.replay import ReplayRng
from extproc.choosing.rotation import Rotation
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.choices import Snapshot
from metadata_center.types import EndpointKey

WEIGHTS = st.lists(st.integers(1, 1000).map(float), min_size=1, max_size=8)


def keys_of(names: str) -> tuple[EndpointKey, ...]:
    """One endpoint per letter."""
    return tuple(EndpointKey(f"{name}:1") for name in names)


def turns(rotation: Rotation, keys: tuple[EndpointKey, ...], weights: list[float], count: int) -> list[int]:
    """The rows chosen in so many turns."""
    rows = []
    for _ in range(count):
        owed = rotation.turn(keys, weights)
        rows.append(max(range(len(keys)), key=owed.__getitem__))
        rotation.served(owed, rows[-1])
    return rows


@given(weights=WEIGHTS, start=st.integers(0, 20))
def test_each_round_gives_every_endpoint_its_weight(weights: list[float], start: int) -> None:
    """As many turns as the weights add up to: each endpoint has its weight of them, round after round."""
    rotation, keys = Rotation(start), keys_of("abcdefgh"[: len(weights)])
    total = int(sum(weights))
    for _ in range(2):
        assert Counter(turns(rotation, keys, weights, total)) == dict(enumerate(weights))


def test_a_heavy_endpoint_is_not_served_in_one_burst() -> None:
    """Weights 5, 1, 1: the light ones come between the heavy one's turns."""
    assert turns(Rotation(), keys_of("abc"), [5.0, 1.0, 1.0], 7) == [0, 0, 1, 0, 2, 0, 0]


def test_rotations_begin_at_different_endpoints() -> None:
    """The first requests of many models do not all go to the first endpoint."""
    firsts = Counter(turns(Rotation(start), keys_of("abc"), [1.0] * 3, 1)[0] for start in range(30))
    assert firsts == {0: 10, 1: 10, 2: 10}


@given(
    pools=st.lists(
        st.tuples(st.sets(st.sampled_from("abcde"), min_size=1), st.sampled_from([0.25, 1.0, 7.5, 1000.0])),
        min_size=1,
        max_size=30,
    ),
    served=st.integers(0, 5),
)
def test_changing_pools_owe_no_row_more_than_a_round(
    pools: list[tuple[set[str], float]], served: int
) -> None:
    """Endpoints come, go and change their weight: then each is soon served by the weights in force."""
    rotation = Rotation()
    for names, scale in pools:
        weights = [scale * (1 + number) for number, _ in enumerate(sorted(names))]
        turns(rotation, keys_of("".join(sorted(names))), weights, served)
    keys, weights = keys_of("abc"), [1.0, 2.0, 3.0]
    turns(rotation, keys, weights, 12)
    seen = Counter(turns(rotation, keys, weights, 600))
    assert all(abs(seen[row] - 100 * weight) <= 2 for row, weight in enumerate(weights))


def test_a_row_that_stays_keeps_its_turn() -> None:
    """An endpoint that leaves takes no other's turn with it: the other two go on alternating."""
    rotation = Rotation()
    assert turns(rotation, keys_of("abc"), [1.0] * 3, 4) == [0, 1, 2, 0]
    assert turns(rotation, keys_of("ac"), [1.0] * 2, 4) == [1, 0, 1, 0]


def test_the_choice_follows_what_is_owed_and_draws_nothing() -> None:
    """The one owed most is chosen, the first of equals, and the next are the fallbacks."""
    keys = keys_of("abcd")
    snapshot = Snapshot(keys, [0] * 4, [0] * 4, [0] * 4, [0] * 4, 0, [1.0] * 4, owed=[1.0, 3.0, 2.0, 3.0])
    settings = LoadBalancing(algorithm=Algorithm.ROUND_ROBIN, fallbacks=2)
    assert choose(snapshot, settings, ReplayRng([]), 0).order == (1, 3, 2)


@pytest.mark.parametrize("algorithm", [Algorithm.RANDOM, Algorithm.LEAST_REQUEST, Algorithm.PREFIX_CACHE])
def test_equals_are_drawn_in_proportion_to_their_weight(algorithm: Algorithm) -> None:
    """Idle endpoints of weights 1 and 9 are equal to these policies: a tenth and nine tenths go there."""
    keys = keys_of("ab")
    snapshot = Snapshot(keys, [0, 0], [0, 0], [0, 0], [0, 0], 0, [1.0, 9.0])
    settings = LoadBalancing(algorithm=algorithm, fallbacks=1)
    draws = [(step + 0.5) / 1000 for step in range(1000)]
    seen = Counter(choose(snapshot, settings, ReplayRng([draw]), 0).order for draw in draws)
    assert seen == {(0, 1): 100, (1, 0): 900}
