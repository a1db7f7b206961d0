"""Cache events over real ZeroMQ sockets, of a bare publisher."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from metadata_center.kv_events.claims import MAX_SOURCES
from metadata_center.kv_events.events import Batch
from metadata_center.kv_events.sequencing import SyncState
from metadata_center.kv_events.sources import Source
from metadata_center.kv_events.subscriber import KvEventSubscriber
from metadata_center.types import EndpointKey
from tests.integration.metadata_center.publishing import ENGINE, WITHIN_S, Engine, View, engines, subscribed
from tests.waiting import until


@pytest.mark.parametrize("legacy", [False, True], ids=["vllm", "sglang"])
async def test_first_contact_gets_what_was_published_before(legacy: bool) -> None:
    """A replay from 0 first, then live batches; answers without a topic are understood."""
    engine = Engine(legacy=legacy)
    source = engine.source()
    async with engines(engine):
        for _ in range(50):
            await engine.publish()
        async with subscribed(source) as view:
            await until(view.has(source, 0, 50))
            for _ in range(50):
                await engine.publish()
            await engine.publish()
            await until(view.has(source, 0, 101))
            assert engine.asked[0] == 0
            assert view.clears == []
            assert view.states[0] is SyncState.REPLAYING
            assert view.subscriber.stats.sequence.losses == 0


async def test_an_engine_that_comes_later_is_found() -> None:
    """Until then the source is silent; a request that waits for it is answered when it comes."""
    probe = Engine()
    source = probe.source()
    await probe.stop()
    async with subscribed(source, replay_timeout_s=0.3) as view:
        await until(lambda: SyncState.SILENT in view.states)
        assert view.subscriber.stats.sources[SyncState.SILENT] == 1
        engine = Engine(pub=probe.events_address, router=probe.replay_address)
        async with engines(engine):
            await engine.publish()
            await until(view.has(source, 0, 1))


async def test_lost_batches_are_replayed() -> None:
    """Only what is missing is asked for."""
    engine = Engine()
    source = engine.source()
    async with engines(engine), subscribed(source) as view:
        await engine.publish()
        await until(view.has(source, 0, 1))
        for is_lost in (False, True, True, False, False):
            await engine.publish(is_lost=is_lost)
        await until(view.has(source, 0, 6))
        assert view.clears == []
        assert max(engine.asked) == 1
        assert view.subscriber.stats.sequence.gaps == 1


async def test_a_restarted_engine_is_cleared_even_while_it_is_idle() -> None:
    """The new connection gives it away before its first event."""
    first = Engine()
    source = first.source()
    async with subscribed(source) as view:
        for _ in range(5):
            await first.publish()
        await until(view.has(source, 0, 5))
        await first.stop()
        second = first.restarted()
        async with engines(second):
            await until(lambda: view.clears == [source])
            await until(view.has(source, 1, 0))
            await second.publish()
            await until(view.has(source, 1, 1))


async def test_a_view_is_behind_while_its_publisher_is_away() -> None:
    """What an engine caches meanwhile is unknown: the old view may not be taken for a current one."""
    first = Engine()
    source = first.source()
    async with subscribed(source) as view:
        await first.publish()
        await until(view.has(source, 0, 1))
        await until(lambda: view.subscriber.state(source) is SyncState.IN_SYNC)
        await first.stop()
        await until(lambda: view.subscriber.state(source) is SyncState.REPLAYING)
        assert view.states[-1] is SyncState.REPLAYING
        second = first.restarted()
        async with engines(second):
            await until(lambda: view.subscriber.state(source) is SyncState.IN_SYNC)


async def test_a_restart_is_noticed_whatever_number_is_seen_first() -> None:
    """The new life has gone beyond the old one's numbers when its first batch is seen."""
    first = Engine()
    source = first.source()
    async with subscribed(source) as view:
        for _ in range(3):
            await first.publish()
        await until(view.has(source, 0, 3))
        await first.stop()
        second = first.restarted()
        async with engines(second):
            for _ in range(20):
                await second.publish(is_lost=True)
            await second.publish()
            await until(view.has(source, 1, 21))
            assert view.clears[0] == source


async def test_a_replay_buffer_that_is_too_short_is_reported() -> None:
    """The view holds what there is and says that it is not all."""
    engine = Engine(buffered=4)
    source = engine.source()
    async with engines(engine):
        for _ in range(10):
            await engine.publish()
        async with subscribed(source) as view:
            await until(lambda: view.blocks.get(source) == [(0, number) for number in range(6, 10)])
            await until(lambda: view.subscriber.state(source) is SyncState.INCOMPLETE)


async def test_a_replay_without_an_answer_is_given_up() -> None:
    """Live batches are used all the same; later attempts complete the view."""
    engine = Engine()
    engine.is_mute = True
    source = engine.source()
    async with engines(engine):
        await engine.publish()
        async with subscribed(source, replay_timeout_s=0.3, retry_s=0.3) as view:
            await until(lambda: len(engine.asked) > 0)
            while not view.batches:
                await engine.publish()
                await asyncio.sleep(0.02)
            assert view.subscriber.state(source) in (SyncState.INCOMPLETE, SyncState.REPLAYING)
            engine.is_mute = False
            await until(lambda: view.has(source, 0, len(engine.sent))())


async def test_without_a_replay_endpoint_events_are_used_from_where_they_are() -> None:
    """The view is incomplete, and a gap clears it."""
    engine = Engine(router=None)
    source = engine.source()
    async with engines(engine), subscribed(source) as view:
        while not view.batches:
            await engine.publish()
            await asyncio.sleep(0.01)
        await engine.publish(is_lost=True)
        await engine.publish()
        last = len(engine.sent) - 1
        await until(lambda: view.blocks.get(source) == [(0, last)])
        assert view.subscriber.state(source) is SyncState.INCOMPLETE


async def test_a_bound_socket_takes_the_events_of_many_engines() -> None:
    """The topic distinguishes them, in full or by the engine's endpoint; others are counted."""
    probe = zmq.Context()
    with probe.socket(zmq.SUB) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
    probe.term()
    address = f"tcp://127.0.0.1:{port}"
    other = EndpointKey("127.0.0.1:8001")
    topics = (b"kv@r0@tiny", b"kv@127.0.0.1:8001@tiny", b"kv@stranger@tiny", b"\xff")
    one, two, three, four = (Engine(pub=address, connect=True, topic=topic) for topic in topics)
    sources = (
        Source(ENGINE, 0, address, one.replay_address, "kv@r0@tiny", True),
        Source(other, 0, address, two.replay_address, "127.0.0.1:8001", True),
    )
    async with engines(one, two, three, four):
        await one.publish()
        await two.publish()
        async with subscribed(*sources) as view:
            await until(view.has(sources[0], 0, 1))
            await until(view.has(sources[1], 0, 1))

            def has_all() -> bool:
                counts = [view.has(sources[0], 0, len(one.sent)), view.has(sources[1], 0, len(two.sent))]
                return view.subscriber.stats.unknown_topics >= 2 and all(has() for has in counts)

            # A publisher that is not connected yet drops its batches, so the last ones must be live.
            while not (has_all() and len(one.sent) > 20):
                for engine in (one, two, three, four):
                    await engine.publish()
                await asyncio.sleep(0.01)
            assert set(view.blocks) == set(sources)


async def test_verify_finds_a_restart_of_an_engine_that_connects_to_us() -> None:
    """There the connection says nothing, so the caller that knows better asks."""
    probe = zmq.Context()
    with probe.socket(zmq.SUB) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
    probe.term()
    address = f"tcp://127.0.0.1:{port}"
    first = Engine(pub=address, connect=True, topic=b"kv@r0@tiny")
    source = Source(ENGINE, 0, address, first.replay_address, "kv@r0@tiny", True)
    async with subscribed(source) as view:
        await first.publish()
        await until(view.has(source, 0, 1))
        await first.stop()
        second = Engine(pub=address, connect=True, topic=b"kv@r0@tiny", router=first.replay_address, life=1)
        async with engines(second):
            view.subscriber.verify(EndpointKey("127.0.0.1:1"))
            view.subscriber.verify(ENGINE)
            await until(lambda: view.clears == [source])
            await until(view.has(source, 1, 0))


async def test_malformed_messages_are_counted_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong frames are skipped; a batch that cannot be decoded clears its source, and the next one counts."""
    engine = Engine()
    source = engine.source()
    number = (1).to_bytes(8, "big")
    async with engines(engine), subscribed(source) as view:
        await engine.publish()
        await until(view.has(source, 0, 1))
        for frames in (
            [b"x"],
            [b"", b"", b""],
            [b"", b"123", b""],
            [b"", b"\xff" * 8, b""],
            [b"", number, b"", b""],
        ):
            await engine.pub.send_multipart(frames)
        await engine.publish()
        await until(view.has(source, 0, 2))
        assert view.subscriber.stats.malformed_messages == 5
        assert view.clears == []
        for _ in range(3):
            await engine.publish_raw(b"\x93 this is no batch")
        await until(lambda: view.subscriber.stats.malformed_batches == 3)
        await engine.publish()
        await until(lambda: view.blocks.get(source) == [(0, 5)])
        assert view.subscriber.state(source) is SyncState.INCOMPLETE
        assert [record.message for record in caplog.records] == ["cache events that cannot be decoded"]


async def test_an_unreadable_store_clears_nothing_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of an endpoint with two ranks: what is known stays, is known to be incomplete, and goes on growing."""
    first, second = Engine(), Engine()
    sources = [first.source(), second.source(rank=1)]
    bad = msgspec.msgpack.encode([0.0, [["BlockStored", [1], None, [1, 2], 2, None, 7]], 0])
    async with engines(first, second), subscribed(*sources) as view:
        for engine in (first, second):
            await engine.publish()
        for source in sources:
            await until(view.has(source, 0, 1))
        for _ in range(3):
            await first.publish_raw(bad)
            await second.publish_raw(bad)
        await until(lambda: view.subscriber.stats.unreadable_events == 6)
        await first.publish()
        await until(lambda: view.blocks.get(sources[0]) == [(0, 0), (0, 4)])
        assert view.clears == []
        assert view.subscriber.state(sources[0]) is SyncState.INCOMPLETE
        assert view.subscriber.stats.malformed_batches == 0
        assert [record.message for record in caplog.records] == ["cache events that cannot be decoded"]


async def test_an_unreadable_removal_clears_what_was_before_it() -> None:
    """And what the same batch says behind it counts."""
    engine = Engine()
    source = engine.source()
    after = ["BlockStored", [77], None, [1, 2], 2, None, "GPU"]
    async with engines(engine), subscribed(source) as view:
        await engine.publish()
        await until(view.has(source, 0, 1))
        await engine.publish_raw(msgspec.msgpack.encode([0.0, [["BlockRemoved", "x"], after], 0]))
        await until(lambda: len(view.blocks.get(source, ())) == 1 and view.clears == [source])
        await until(lambda: [block for _, block in view.blocks[source]] == [77])


async def test_a_stop_that_meets_a_broken_socket_is_still_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks as it is closed: the error is raised, the cancellation is not."""
    reading = asyncio.Event()

    async def breaks(*_: object) -> None:
        reading.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise zmq.ZMQError(zmq.ENOTSOCK) from None

    monkeypatch.setattr(KvEventSubscriber, "_receive", breaks)
    engine = Engine()
    async with engines(engine), subscribed(engine.source()) as view:
        await reading.wait()
        async with asyncio.timeout(WITHIN_S):
            await view.subscriber.stop()


async def test_callbacks_that_raise_end_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is counted and logged."""
    engine = Engine()
    seen = []

    def on_batch(source: Source, batch: Batch) -> None:
        seen.append(batch)
        raise ValueError("a bug")

    subscriber = KvEventSubscriber(on_batch=on_batch, on_clear=lambda _: None, on_state=lambda *_: None)
    subscriber.start()
    subscriber.set_sources([engine.source()])
    async with engines(engine):
        for _ in range(3):
            await engine.publish()
        await until(lambda: len(seen) == 3)
        assert subscriber.stats.callback_errors == 3
        await subscriber.stop()
    assert "a callback of cache events raised" in {record.message for record in caplog.records}


async def test_what_a_flood_overflows_is_replayed() -> None:
    """PUB drops what its subscriber is too slow for; the view is whole all the same."""
    engine = Engine(hwm=10, buffered=100_000)
    source = engine.source()
    event = {"type": "BlockRemoved", "block_hashes": [2**63] * 900}
    large = msgspec.msgpack.encode([time.time(), [event], 0])
    async with engines(engine), subscribed(source, live_queue=10) as view:
        await engine.publish()
        await until(view.has(source, 0, 1))
        for _ in range(3_000):  # 24 MB at once: more than all queues and kernel buffers together
            await engine.publish_raw(large)
        await until(lambda: len(view.batches) >= 2)
        await engine.publish()
        await until(lambda: len(view.batches) == 3_002 and view.states[-1] is SyncState.IN_SYNC)
        assert view.blocks[source] == [(0, 0), (0, 3_001)]
        assert view.clears == []
        assert view.subscriber.stats.sequence.gaps > 0


async def test_a_flood_does_not_starve_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a batch takes a whole turn, others have theirs after each one, live or replayed or held back."""
    monkeypatch.setattr("metadata_center.kv_events.subscriber.TURN_S", 1e-4)
    engine = Engine()
    source = engine.source()
    since_turn = longest = 0

    def on_batch(_: Source, __: Batch) -> None:
        nonlocal since_turn, longest
        since_turn += 1
        longest = max(longest, since_turn)
        until_s = time.perf_counter() + 3e-4
        while time.perf_counter() < until_s:
            pass

    async def others() -> None:
        nonlocal since_turn
        while True:
            since_turn = 0
            await asyncio.sleep(0)

    subscriber = KvEventSubscriber(on_batch=on_batch, on_clear=lambda _: None, on_state=lambda *_: None)
    task = asyncio.create_task(others())
    async with engines(engine):
        for _ in range(150):
            await engine.publish()
        subscriber.start()
        subscriber.set_sources([source])
        while subscriber.stats.batches < 500:
            await engine.publish(is_lost=len(engine.sent) % 50 == 0)
            if len(engine.sent) % 100 == 0:
                await asyncio.sleep(0.001)
        await subscriber.stop()
    task.cancel()
    assert longest <= 2


async def test_sources_come_and_go() -> None:
    """One that stays is not disturbed; one that goes is cleared and silent, even if it comes back."""
    one, two = Engine(), Engine()
    first, second = one.source(), two.source(rank=1)
    async with engines(one, two), subscribed(first) as view:
        await one.publish()
        await two.publish()
        await until(view.has(first, 0, 1))
        asked = len(one.asked)
        view.subscriber.set_sources([first, second])
        await until(view.has(second, 0, 1))
        view.subscriber.set_sources([first])
        assert view.clears == [second]
        assert view.subscriber.state(second) is None
        await two.publish()
        await one.publish()
        await until(view.has(first, 0, 2))
        assert second not in view.blocks
        view.subscriber.set_sources([first, second])
        await until(view.has(second, 0, 2))
        assert len(one.asked) == asked
        view.subscriber.set_sources([])
        assert not view.blocks


async def test_sources_that_nothing_distinguishes_are_refused() -> None:
    """As are too many; nothing changes then."""
    view = View()
    one = Source(ENGINE, 0, "tcp://127.0.0.1:1")
    with pytest.raises(ValueError):
        view.subscriber.set_sources([one, replace(one, rank=1)])
    with pytest.raises(ValueError):
        view.subscriber.set_sources(
            Source(ENGINE, rank, f"tcp://127.0.0.1:{1 + rank}") for rank in range(MAX_SOURCES + 1)
        )
    assert view.subscriber.state(one) is None
    await view.subscriber.stop()


async def test_an_address_in_use_is_reported_and_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not disturb other sources."""
    monkeypatch.setattr("metadata_center.kv_events.subscriber._REOPEN_S", 0.05)
    context = zmq.Context()
    taken = context.socket(zmq.SUB)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    address = f"tcp://127.0.0.1:{port}"
    engine = Engine()
    bound = Engine(pub=address, connect=True, topic=b"t")
    sources = (engine.source(), Source(ENGINE, 1, address, bound.replay_address, "t", True))
    async with engines(engine, bound), subscribed(*sources) as view:
        await engine.publish()
        await until(view.has(sources[0], 0, 1))
        await until(
            lambda: "cannot subscribe to cache events" in {record.message for record in caplog.records}
        )
        context.destroy(linger=0)
        while not view.blocks.get(sources[1]):
            await bound.publish()
            await asyncio.sleep(0.01)


async def test_it_starts_once_and_stops_any_number_of_times() -> None:
    """Nothing is left open."""
    view = View()
    view.subscriber.set_sources([Source(ENGINE, 0, "tcp://127.0.0.1:1", "tcp://127.0.0.1:1")])
    view.subscriber.start()
    with pytest.raises(RuntimeError):
        view.subscriber.start()
    await view.subscriber.stop()
    await view.subscriber.stop()
    assert len(asyncio.all_tasks()) == 1


async def test_others_get_their_turn_within_a_large_message() -> None:
    """30,000 blocks in one message come in order, with the loop's other tasks in between; then the next."""
    seen: list[tuple[int, int]] = []
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    def on_batch(_: Source, batch: Batch) -> None:
        seen.extend((ticks, block) for event in batch.events for block in getattr(event, "hashes", ()))

    engine = Engine()
    subscriber = KvEventSubscriber(
        on_batch=on_batch, on_clear=lambda _: seen.clear(), on_state=lambda *_: None
    )
    subscriber.start()
    other = asyncio.create_task(tick())
    try:
        subscriber.set_sources([engine.source()])
        await engine.publish_raw(msgspec.msgpack.encode([0.0, [_blocks(1, 2)], 0]))
        await until(lambda: len(seen) == 2)
        await engine.publish_raw(msgspec.msgpack.encode([0.0, [_blocks(3, 30_000)], 0]))
        await engine.publish_raw(msgspec.msgpack.encode([0.0, [_blocks(30_003, 1)], 0]))
        await until(lambda: len(seen) == 30_003)
        assert [block for _, block in seen] == list(range(1, 30_004))
        assert len({at for at, _ in seen[2:30_002]}) > 1
        seen.clear()
        await engine.publish_raw(msgspec.msgpack.encode([0.0, [_blocks(1, 30_000), ["BlockRemoved"]], 0]))
        await until(lambda: subscriber.stats.unreadable_events == 1)
        assert seen == []
        await until(lambda: subscriber.stats.sources[SyncState.INCOMPLETE] == 1)
    finally:
        other.cancel()
        await subscriber.stop()
        await engine.stop()


def _blocks(first: int, count: int) -> dict[str, Any]:
    """Consecutive blocks of one token each."""
    hashes = list(range(first, first + count))
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": None}
    return event | {"token_ids": [1] * count, "block_size": 1}
