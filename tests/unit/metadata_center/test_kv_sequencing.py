"""One publisher's batches in order, by example and against a lossy publisher with several lives."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata_center.kv_events.sequencing import (
    MAX_RETRY_S,
    AskReplay,
    Clear,
    Deliver,
    Effect,
    Sequencer,
    SyncState,
)

TIMEOUT_S, RETRY_S = 5.0, 30.0


def sequencer(*, can_replay: bool = True, held: int = 100, held_bytes: int = 1 << 20) -> Sequencer:
    """One with small bounds."""
    return Sequencer(
        can_replay=can_replay,
        replay_timeout_s=TIMEOUT_S,
        retry_s=RETRY_S,
        max_held_batches=held,
        max_held_bytes=held_bytes,
    )


def batch(number: int, life: int = 0) -> bytes:
    """The payload of a batch, unlike that of any other."""
    return b"%d.%d" % (life, number)


def is_in(one: Sequencer, state: SyncState) -> bool:
    """Whether the view is worth that; a call, because type checkers believe that attributes stay."""
    return one.state is state


def said(effects: list[Effect]) -> list[str | int]:
    """Effects in short: payloads as text, "clear", and the number that a replay is asked from."""
    short: list[str | int] = []
    for effect in effects:
        match effect:
            case Deliver():
                short.append(effect.payload.decode())
            case Clear():
                short.append("clear")
            case AskReplay():
                short.append(effect.start)
    return short


def live(one: Sequencer, *numbers: int, life: int = 0, now_s: float = 0.0) -> list[str | int]:
    """Receive live batches."""
    return [item for number in numbers for item in said(one.receive(number, batch(number, life), now_s))]


def replay(
    one: Sequencer, *numbers: int, life: int = 0, now_s: float = 0.0, end: bool = True
) -> list[str | int]:
    """Receive a whole replay, or its beginning."""
    found = [item for number in numbers for item in said(one.replayed(number, batch(number, life), now_s))]
    return found + (said(one.replay_ended(now_s)) if end else [])


def synced(*, upto: int = 3, held: int = 100) -> Sequencer:
    """A sequencer that has all batches below `upto`."""
    one = sequencer(held=held)
    assert said(one.verify(0.0)) == [0]
    replay(one, *range(upto))
    assert is_in(one, SyncState.IN_SYNC)
    return one


def test_first_contact_replays_everything_and_then_goes_on_live() -> None:
    """What came live meanwhile is held back, and what the replay brought as well is a duplicate."""
    one = sequencer()
    assert is_in(one, SyncState.SILENT)
    assert said(one.verify(0.0)) == [0]
    assert is_in(one, SyncState.REPLAYING)
    assert live(one, 2, 3, 4) == []
    assert replay(one, 0, 1, 2, 3) == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert is_in(one, SyncState.IN_SYNC)
    assert live(one, 5, 6) == ["0.5", "0.6"]
    assert (one.stats.duplicates, one.stats.delivered, one.expected) == (2, 7, 7)


def test_a_fresh_engine_has_nothing_to_replay() -> None:
    """An empty replay is a complete view."""
    one = sequencer()
    one.verify(0.0)
    assert replay(one) == []
    assert is_in(one, SyncState.IN_SYNC)
    assert live(one, 0, 1) == ["0.0", "0.1"]
    assert one.stats.replays == 1


def test_a_gap_is_replayed_from_the_last_batch_delivered() -> None:
    """It proves that the publisher is still the same, and is not delivered again."""
    one = synced()
    assert live(one, 6, 7) == [2]
    assert replay(one, 2, 3, 4, 5, 6) == ["0.3", "0.4", "0.5", "0.6", "0.7"]
    assert (one.state, one.stats.gaps, one.stats.restarts) == (SyncState.IN_SYNC, 1, 0)


def test_a_live_number_that_goes_back_is_a_restart() -> None:
    """From 0 nothing is missing; from later on the rest is replayed."""
    one = synced()
    live(one, 3, 4)
    assert live(one, 0, 1, life=1) == ["clear", "1.0", "1.1"]
    assert is_in(one, SyncState.IN_SYNC)
    assert live(one, 1, life=2) == ["clear", 0]
    assert replay(one, 0, 1, life=2) == ["2.0", "2.1"]
    assert (one.state, one.stats.restarts) == (SyncState.IN_SYNC, 2)


def test_a_restart_during_a_replay_ends_it() -> None:
    """What the old replay still brings is ignored, and so is what was held of the old life."""
    one = synced()
    live(one, 9, 10)
    assert replay(one, 2, 3, end=False) == ["0.3"]
    assert live(one, 0, life=1) == ["clear", "1.0"]
    assert replay(one, 4, 5) == []
    assert live(one, 1, life=1) == ["1.1"]


def test_a_restart_that_looks_like_a_gap_is_found_out() -> None:
    """The anchor comes back as another batch, so the old view goes and the new life is replayed."""
    one = synced()
    assert live(one, 5, life=1) == [2]
    assert replay(one, 2, life=1, end=False) == ["clear", 0]
    assert replay(one, 0, 1, 2, 3, 4, life=1) == ["1.0", "1.1", "1.2", "1.3", "1.4", "1.5"]
    assert live(one, 6, life=1) == ["1.6"]
    assert is_in(one, SyncState.IN_SYNC)


def test_a_restart_that_looks_like_a_duplicate_is_found_out() -> None:
    """A first live number below what a replay brought may be either: the anchor decides."""
    one = synced(upto=5)
    assert live(one, 1, life=1) == [4]
    assert replay(one, life=1) == ["clear", 0]
    assert replay(one, 0, 1, life=1) == ["1.0", "1.1"]

    other = synced(upto=5)
    assert live(other, 1, 2, 3) == [4]
    assert replay(other, 4) == []
    assert live(other, 4) == [4]
    assert replay(other, 4) == []
    assert live(other, 5) == ["0.5"]
    assert (other.stats.duplicates, other.stats.restarts) == (4, 0)


def test_a_new_connection_is_verified_without_clearing_the_same_engine() -> None:
    """One batch comes back; an idle new engine has none and is cleared."""
    one = synced()
    assert said(one.verify(1.0)) == [2]
    assert replay(one, 2, 3, 4) == ["0.3", "0.4"]
    assert said(one.verify(2.0)) == [4]
    assert replay(one) == ["clear", 0]
    assert replay(one) == []
    assert is_in(one, SyncState.IN_SYNC)


def test_a_doubt_during_a_replay_is_looked_into_after_it() -> None:
    """The answer may be from before the restart."""
    one = sequencer()
    one.verify(0.0)
    assert said(one.verify(0.1)) == []
    assert replay(one, 0, 1) == ["0.0", "0.1", 1]
    assert replay(one, 1) == []
    assert is_in(one, SyncState.IN_SYNC)

    other = sequencer()
    other.verify(0.0)
    live(other, 0)
    other.verify(0.1)
    assert live(other, 1, life=1) == []
    assert replay(other, 0) == ["0.0", 0]
    assert replay(other, 0, life=1, end=False) == ["clear", 0]
    assert replay(other, 0, 1, life=1) == ["1.0", "1.1"]


def test_a_doubt_that_is_not_dispelled_loses_the_view() -> None:
    """A rebuild that gets no answer costs nothing, but what may be of another life is not kept."""
    one = sequencer()
    one.verify(0.0)
    live(one, 0)
    assert said(one.advance(TIMEOUT_S)) == ["0.0"]
    assert said(one.verify(6.0)) == [0]
    assert said(one.advance(6.0 + TIMEOUT_S)) == ["clear"]
    assert live(one, 1, life=1) == ["1.1"]


def test_a_replay_buffer_that_is_too_short_leaves_an_incomplete_view() -> None:
    """On first contact and after a gap; the view starts with what there is."""
    one = sequencer()
    one.verify(0.0)
    assert replay(one, 7, 8) == ["0.7", "0.8"]
    assert is_in(one, SyncState.INCOMPLETE)
    assert live(one, 50) == [8]
    assert replay(one, 40, *range(41, 51)) == ["clear", *(f"0.{number}" for number in range(40, 51))]
    assert is_in(one, SyncState.INCOMPLETE)
    assert live(one, 0, life=1) == ["clear", "1.0"]
    assert is_in(one, SyncState.IN_SYNC)


def test_an_engine_without_a_replay_buffer_is_followed_from_where_it_is() -> None:
    """Two empty replays are enough to see that there will be no others."""
    one = sequencer()
    one.verify(0.0)
    assert live(one, 4, 5) == []
    assert replay(one) == [0]
    assert replay(one) == ["0.4", "0.5"]
    assert is_in(one, SyncState.INCOMPLETE)


def test_a_replay_with_holes_is_repeated_while_it_brings_something() -> None:
    """A ROUTER that drops what we are too slow for costs more requests, not the view."""
    one = sequencer()
    one.verify(0.0)
    assert replay(one, 0, 1, 4, 5) == ["0.0", "0.1", 1]
    assert replay(one, 1, 2, 4, 5) == ["0.2", 2]
    assert replay(one, 2, 4) == [2]
    assert replay(one, 2, 4) == ["clear"]
    assert (one.state, one.stats.losses) == (SyncState.INCOMPLETE, 1)
    assert live(one, 6) == [2]
    assert replay(one, 2, 3, 4, 5, 6) == ["0.3", "0.4", "0.5", "0.6"]


def test_a_replay_that_stalls_is_continued() -> None:
    """Its end marker may have been dropped."""
    one = sequencer()
    one.verify(0.0)
    assert replay(one, 0, 1, now_s=4.0, end=False) == ["0.0", "0.1"]
    assert said(one.advance(4.0 + TIMEOUT_S - 0.1)) == []
    assert said(one.advance(4.0 + TIMEOUT_S)) == [1]
    assert replay(one, 1, 2) == ["0.2"]
    assert is_in(one, SyncState.IN_SYNC)


def test_a_gap_that_is_not_filled_loses_the_view() -> None:
    """Live batches go on at once; the rest is asked for later, from 0."""
    one = synced()
    assert live(one, 9, now_s=10.0) == [2]
    assert said(one.advance(10.0 + TIMEOUT_S)) == ["clear", "0.9"]
    assert is_in(one, SyncState.INCOMPLETE)
    assert live(one, 10, 12, now_s=16.0) == ["0.10", "clear", "0.12"]
    assert said(one.advance(15.0 + RETRY_S - 0.1)) == []
    assert said(one.advance(15.0 + RETRY_S)) == [0]
    assert live(one, 13) == []
    assert replay(one, *range(14)) == ["clear", *(f"0.{number}" for number in range(14))]
    assert is_in(one, SyncState.IN_SYNC)


def test_an_attempt_to_rebuild_that_fails_costs_nothing() -> None:
    """The run goes on with what was held back, and attempts grow rarer."""
    one = synced()
    live(one, 9)
    now_s, retries_s = one_retry(one, 0.0), []
    for number in range(10, 16):
        asked_s = now_s
        assert said(one.advance(now_s)) == [0]
        assert live(one, number) == []
        assert said(one.advance(now_s + TIMEOUT_S)) == [f"0.{number}"]
        now_s = next_ask(one, now_s + TIMEOUT_S)
        retries_s.append(now_s - asked_s - TIMEOUT_S)
    assert retries_s == [60.0, 120.0, 240.0, 480.0, MAX_RETRY_S, MAX_RETRY_S]


def one_retry(one: Sequencer, now_s: float) -> float:
    """Let the running replay time out; when the next one is due."""
    one.advance(now_s + TIMEOUT_S)
    return now_s + TIMEOUT_S + RETRY_S


def next_ask(one: Sequencer, now_s: float) -> float:
    """When it asks again, found without asking."""
    assert one._retry_at_s is not None
    assert said(one.advance(one._retry_at_s - 0.1)) == []
    return one._retry_at_s


def test_a_silent_publisher_stays_silent_until_it_speaks() -> None:
    """No engine answers before it is up; its first batch needs no replay."""
    one = sequencer()
    one.verify(0.0)
    assert said(one.advance(TIMEOUT_S)) == []
    assert is_in(one, SyncState.SILENT)
    assert live(one, 0, 1, now_s=9.0) == ["0.0", "0.1"]
    assert is_in(one, SyncState.IN_SYNC)
    assert said(one.advance(1e6)) == []


def test_without_replays_each_gap_loses_the_view() -> None:
    """There is no ROUTER to ask: forget and go on."""
    one = sequencer(can_replay=False)
    assert said(one.verify(0.0)) == []
    assert live(one, 0, 1, 3) == ["0.0", "0.1", "clear", "0.3"]
    assert is_in(one, SyncState.INCOMPLETE)
    assert live(one, 0, life=1) == ["clear", "1.0"]
    assert is_in(one, SyncState.IN_SYNC)
    late = sequencer(can_replay=False)
    assert live(late, 8) == ["0.8"]
    assert is_in(late, SyncState.INCOMPLETE)
    assert said(late.advance(1e9)) == []


@pytest.mark.parametrize("bounds", [{"held": 2}, {"held_bytes": 6}])
def test_what_is_held_back_is_bounded(bounds: dict[str, Any]) -> None:
    """What does not fit is one more gap, and is replayed."""
    one = sequencer(**bounds)
    one.verify(0.0)
    assert live(one, *range(1, 6)) == []
    assert replay(one, 0) == ["0.0", "0.1", "0.2"]
    assert live(one, 6) == [2]
    assert replay(one, *range(2, 7)) == ["0.3", "0.4", "0.5", "0.6"]


def test_a_batch_that_could_not_be_decoded_makes_the_view_incomplete() -> None:
    """What follows still counts, and a later clear is still delivered."""
    one = synced()
    assert live(one, 3) == ["0.3"]
    one.spoiled()
    assert is_in(one, SyncState.INCOMPLETE)
    assert live(one, 4) == ["0.4"]
    assert live(one, 0, life=1) == ["clear", "1.0"]


class World:
    """Publishers that live one after another, a network that loses live batches, and what was applied."""

    def __init__(self, buffer_batches: int) -> None:
        self.one = sequencer(held=6)
        self.life = 0
        self.count = 0
        self.buffer: deque[int] = deque(maxlen=buffer_batches)
        self.answer: deque[tuple[int, bytes] | None] = deque()
        self.applied: list[bytes] = []
        self.now_s = 0.0
        self.do(self.one.verify(self.now_s))

    def do(self, effects: list[Effect]) -> None:
        """Apply effects; a request is answered as of now, but arrives when `hear` is called."""
        for effect in effects:
            match effect:
                case Deliver():
                    self.applied.append(effect.payload)
                case Clear():
                    self.applied.clear()
                case AskReplay():
                    answer = [(number, batch(number, self.life)) for number in self.buffer]
                    self.answer = deque([item for item in answer if item[0] >= effect.start])
                    self.answer.append(None)

    def publish(self, is_lost: bool) -> None:
        """The next batch."""
        number, self.count = self.count, self.count + 1
        self.buffer.append(number)
        if not is_lost:
            self.do(self.one.receive(number, batch(number, self.life), self.now_s))

    def restart(self) -> None:
        """A new life; the subscriber sees a new connection before anything else of it."""
        self.life += 1
        self.count = 0
        self.buffer.clear()
        self.do(self.one.verify(self.now_s))

    def hear(self, is_lost: bool) -> None:
        """One message of the running replay arrives, or is dropped."""
        if self.answer:
            item = self.answer.popleft()
            if is_lost:
                return
            self.do(
                self.one.replay_ended(self.now_s) if item is None else self.one.replayed(*item, self.now_s)
            )

    def wait(self, duration_s: float) -> None:
        """Time passes."""
        self.now_s += duration_s
        self.do(self.one.advance(self.now_s))

    def check(self) -> None:
        """What is applied is a gapless run of one life."""
        if self.applied:
            life, first = map(int, self.applied[0].split(b"."))
            assert self.applied == [batch(first + i, life) for i in range(len(self.applied))]
            assert self.one.state is not SyncState.IN_SYNC or first == 0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.booleans()),
        st.tuples(st.just("hear"), st.sampled_from([False, False, False, True])),
        st.tuples(st.just("restart")),
        st.tuples(st.just("wait"), st.sampled_from([1.0, TIMEOUT_S, RETRY_S])),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(st.sampled_from([0, 1, 3, 1000]), STEPS)
def test_whatever_is_lost_the_view_is_one_gapless_run(
    buffer_batches: int, steps: list[tuple[Any, ...]]
) -> None:
    """And once nothing is lost any more it is that of the living publisher, complete if its buffer was."""
    world = World(buffer_batches)
    for name, *arguments in steps:
        getattr(world, name)(*arguments)
        world.check()
    for _ in range(4):  # quiet times: everything arrives, and time-outs run off
        while world.answer:
            world.hear(is_lost=False)
            world.check()
        world.wait(MAX_RETRY_S)
        world.publish(is_lost=False)
        world.check()
    while world.answer:
        world.hear(is_lost=False)
    world.check()
    assert world.applied
    assert world.applied[-1] == batch(world.count - 1, world.life)
    assert world.one.state in (SyncState.IN_SYNC, SyncState.INCOMPLETE)
    if buffer_batches == 1000 and world.one.state is SyncState.IN_SYNC:
        assert len(world.applied) == world.count
