"""Workers' wire over real sockets: entries arrive, lost peers are found again, nothing piles up."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from extproc.server.exchanging.bus import MAX_FRAME_BYTES, MAX_QUEUED_BYTES, Bus
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEvent
from extproc.values.evidence import FailureKind
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey, RequestId, Waiter
from tests.conftest import request_end
from tests.waiting import until

pytestmark = pytest.mark.asyncio

KEY = EndpointKey("uid/1")
AT = Address("10.0.0.1", 8000)
ENTRY = RequestAlive(RequestId("r"), "1.a")
DEADLINE_S = 5.0


class Peer:
    """A bus and what it received."""

    def __init__(self, run_dir: Path, index: int, workers: int = 2) -> None:
        self.entries: list[RequestEvent] = []
        self.cached: list[tuple[EndpointKey, list[int]]] = []
        self.known: dict[EndpointKey, list[int]] = {}
        self.lines: list[tuple[str, list[Waiter]]] = []
        self.found = 0
        self.lost = 0
        self.bus = Bus(
            run_dir,
            index,
            workers,
            self.entries.append,
            lambda key, blocks: self.cached.append((key, list(blocks))),
            lambda: self.known,
            lambda worker, line: self.lines.append((worker, line)),
        )
        self.bus.found.add(self._find)
        self.bus.lost.add(self._lose)

    def _find(self, number: int) -> None:
        self.found += number

    def _lose(self, number: int) -> None:
        self.lost += number


async def connected(*peers: Peer) -> None:
    """Wait until each peer reaches all others."""
    await until(lambda: all(len(peer.bus._writers) == len(peer.bus._peers) for peer in peers))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Peer, Peer]]:
    """Two peers that reach each other."""
    peers = Peer(tmp_path, 0), Peer(tmp_path, 1)
    for peer in peers:
        await peer.bus.start()
    await connected(*peers)
    yield peers
    for peer in peers:
        await peer.bus.stop()


async def test_who_waits_is_told_to_every_other_worker(tmp_path: Path) -> None:
    """With its place on the hearer's clock, which is the same on one host."""
    peers = [Peer(tmp_path, index, workers=3) for index in range(3)]
    for peer in peers:
        await peer.bus.start()
    try:
        await connected(*peers)
        now_s = time.monotonic()
        peers[1].bus.tell_line([Waiter(KEY, now_s - 1.0, 0.5, 0.25)])
        peers[1].bus.tell_line([])
        await until(lambda: len(peers[0].lines) == len(peers[2].lines) == 2)
        for peer in (peers[0], peers[2]):
            (worker, (waiter,)), gone = peer.lines
            assert (worker, waiter.endpoint, waiter.work_s, waiter.least_s) == ("1", KEY, 0.5, 0.25)
            assert 0.0 <= waiter.rank - (now_s - 1.0) < DEADLINE_S
            assert gone == ("1", [])
        assert peers[1].lines == []
    finally:
        for peer in peers:
            await peer.bus.stop()


async def test_a_worker_knows_whether_somebody_is_connected_to_any(tmp_path: Path) -> None:
    """To one that said nothing yet somebody may be, to one that is gone nobody is, one that comes is told."""
    first, second, third = peers = [Peer(tmp_path, index, workers=3) for index in range(3)]

    def is_reached(peer: Peer, *, is_here: bool = False) -> bool:
        return peer.bus.is_reached("own", lambda: is_here)

    await first.bus.start()
    await second.bus.start()
    try:
        await until(lambda: all(len(peer.bus._served) == 1 for peer in (first, second)))
        assert is_reached(first), "the second said nothing yet"
        await until(lambda: not is_reached(second))
        await until(lambda: not is_reached(first))
        assert first.bus.is_reached("picker", lambda: False), "that is another server"
        assert is_reached(first, is_here=True)
        await until(lambda: is_reached(second))
        await third.bus.start()
        await until(lambda: all(len(peer.bus._served) == 2 for peer in peers))
        assert is_reached(third)
        await until(lambda: not is_reached(first) and not is_reached(third))
        assert is_reached(first, is_here=True)
        await until(lambda: is_reached(third))
        await first.bus.stop()
        await until(lambda: not is_reached(third))
    finally:
        for peer in peers:
            await peer.bus.stop()


async def test_entries_and_blocks_arrive_in_order(pair: tuple[Peer, Peer]) -> None:
    """Every kind of entry arrives equal to what was sent, and so do cached blocks."""
    left, right = pair
    entries: list[RequestEvent] = [
        request_end("r", owner=None, address=AT, flags=("DC",), prompt_tokens=3),
        ENTRY,
        AttemptStarted(RequestId("r"), "1.a", AT),
        AttemptFailed(RequestId("r"), "1.a", AT, FailureKind.RESET),
    ]
    assert all(left.bus.hand_over("1.a", entry) for entry in entries)
    left.bus.share(KEY, (1, 2**64 - 1))
    right.bus.broadcast(ENTRY)
    await until(lambda: bool(right.cached and left.entries))
    assert right.entries == entries
    assert right.cached == [(KEY, [1, 2**64 - 1])]
    assert (left.entries, left.cached) == ([ENTRY], [])
    assert left.bus.dropped == right.bus.dropped == 0


async def test_an_entry_that_cannot_be_taken_loses_no_other(
    pair: tuple[Peer, Peer], caplog: pytest.LogCaptureFixture
) -> None:
    """A bug with one request is logged, and what was sent behind it arrives on the same connection."""
    left, right = pair
    broken = AttemptStarted(RequestId("broken"), "1.a", AT)

    def take(entry: RequestEvent) -> None:
        if entry == broken:
            raise ValueError("a bug")
        right.entries.append(entry)

    right.bus._on_entry = take
    for entry in (broken, ENTRY):
        assert left.bus.hand_over("1.a", entry)
    await until(lambda: bool(right.entries))
    assert right.entries == [ENTRY]
    assert caplog.messages == ["what another worker sent failed"]
    assert left.bus.dropped == 0


@pytest.mark.parametrize("owner", ["0.a", "2.a", "", "-", "x.1", "-1.a"])
async def test_only_a_peer_can_be_handed_something(pair: tuple[Peer, Peer], owner: str) -> None:
    """Oneself, an unknown worker and nonsense are refused, and are no drops."""
    assert not pair[0].bus.hand_over(owner, ENTRY)
    assert pair[0].bus.dropped == 0


async def test_a_broadcast_reaches_all_others(tmp_path: Path) -> None:
    """What concerns everybody goes to each other worker once, and not to oneself."""
    peers = [Peer(tmp_path, index, workers=3) for index in range(3)]
    for peer in peers:
        await peer.bus.start()
    await connected(*peers)
    peers[1].bus.broadcast(ENTRY)
    await until(lambda: bool(peers[0].entries and peers[2].entries))
    assert [peer.entries for peer in peers] == [[ENTRY], [], [ENTRY]]
    for peer in peers:
        await peer.bus.stop()


async def test_a_peer_that_is_away_costs_a_drop(tmp_path: Path) -> None:
    """What cannot be sent is dropped and counted at once: nothing waits for a dead worker."""
    alone = Peer(tmp_path, 0)
    await alone.bus.start()
    assert not alone.bus.hand_over("1.a", ENTRY)
    alone.bus.share(KEY, [1])
    assert alone.bus.dropped == 2
    assert not alone.bus.answer(1, 7, {})  # whoever answers does so again until it is heard
    assert alone.bus.dropped == 2
    await alone.bus.stop()


async def test_a_peer_that_restarts_is_found_again(pair: tuple[Peer, Peer], tmp_path: Path) -> None:
    """A stopped peer hears nothing more; its successor is reached without any notice."""
    left, right = pair
    await right.bus.stop()
    await until(lambda: not left.bus._writers)
    assert not left.bus.hand_over("1.a", ENTRY)
    successor = Peer(tmp_path, 1)
    await successor.bus.start()
    await connected(left, successor)
    assert left.bus.hand_over("1.b", ENTRY)
    successor.bus.broadcast(ENTRY)
    await until(lambda: bool(successor.entries and left.entries))
    assert right.entries == []
    assert left.bus.dropped == 1
    await successor.bus.stop()


async def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    """A peer that does not read holds no more than its bound; all that does not fit is counted."""
    sender = Peer(tmp_path, 0)
    accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        accepted.put_nowait(writer)

    deaf = await asyncio.start_unix_server(never_read, tmp_path / "bus1.sock")
    await sender.bus.start()
    await connected(sender)
    writer = await accepted.get()
    blocks = list(range(2**63, 2**63 + 50_000))
    frame_bytes = len(msgspec.msgpack.encode(["cached", KEY, blocks]))
    sent = 2 * MAX_QUEUED_BYTES // frame_bytes
    for _ in range(sent):
        sender.bus.share(KEY, blocks)
    held = sender.bus._writers[1].transport.get_write_buffer_size()
    assert MAX_QUEUED_BYTES < held <= MAX_QUEUED_BYTES + frame_bytes + 4
    assert 0 < sender.bus.dropped < sent
    assert not sender.bus.hand_over("1.a", ENTRY)
    await sender.bus.stop()
    writer.transport.abort()
    deaf.close()
    await asyncio.sleep(0)


async def test_a_frame_that_is_too_large_is_never_sent(pair: tuple[Peer, Peer]) -> None:
    """It would make the peer hang up: it is dropped here, and later frames still arrive."""
    left, right = pair
    left.bus.share(KEY, list(range(2**63, 2**63 + MAX_FRAME_BYTES // 9)))
    assert left.bus.dropped == 1
    assert left.bus.hand_over("1.a", ENTRY)
    await until(lambda: bool(right.entries))
    assert right.cached == []


async def test_a_stranger_that_sends_nonsense_is_hung_up_on(pair: tuple[Peer, Peer], tmp_path: Path) -> None:
    """A length beyond the bound ends the connection before anything is read; peers are not disturbed."""
    left, right = pair
    reader, writer = await asyncio.open_unix_connection(tmp_path / "bus1.sock")
    writer.write(struct.pack("<I", MAX_FRAME_BYTES + 1) + b"x" * 100)
    async with asyncio.timeout(DEADLINE_S):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()
    assert left.bus.hand_over("1.a", ENTRY)
    await until(lambda: bool(right.entries))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x04\x95",  # the beginning of a pickle
        b"",
        msgspec.msgpack.encode(["unknown", 1]),
        msgspec.msgpack.encode(["cached", "10.0.0.1:80", ["no number"]]),
        msgspec.msgpack.encode(["end", {"request_id": "r"}]),
        msgspec.msgpack.encode(
            ["failed", {"request_id": "r", "owner": None, "address": ["e", 1], "kind": "?"}]
        ),
    ],
)
async def test_a_frame_of_another_type_is_hung_up_on(
    pair: tuple[Peer, Peer], tmp_path: Path, payload: bytes
) -> None:
    """Whatever is not exactly one of the frames ends the connection, and nothing of it is taken."""
    _, right = pair
    reader, writer = await asyncio.open_unix_connection(tmp_path / "bus1.sock")
    writer.write(struct.pack("<I", len(payload)) + payload)
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.read() == b""
    writer.close()
    assert (right.entries, right.cached) == ([], [])


async def test_sockets_are_private_and_do_not_outlive_their_worker(tmp_path: Path) -> None:
    """No other user may open the socket; a stale one is replaced."""
    path = tmp_path / "bus0.sock"
    path.write_bytes(b"left by a worker that was killed")
    peer = Peer(tmp_path, 0)
    await peer.bus.start()
    assert path.is_socket()
    assert path.stat().st_mode & 0o077 == 0
    await peer.bus.stop()
    assert not path.exists()


async def test_a_worker_that_comes_is_informed(tmp_path: Path) -> None:
    """The first time and after a restart, by the first of the others alone."""
    first, second, third = (Peer(tmp_path, number, workers=3) for number in range(3))
    first.known[KEY] = [2**64 - 1, 7]
    second.known[KEY] = [2**64 - 1, 8]
    third.known[KEY] = [2**64 - 1, 9]
    for peer in (first, second, third):
        await peer.bus.start()
    await connected(first, second, third)
    await until(lambda: all(peer.cached for peer in (first, second, third)))
    assert first.cached == [(KEY, [2**64 - 1, 8])]
    assert second.cached == third.cached == [(KEY, [2**64 - 1, 7])]
    await second.bus.stop()
    again = Peer(tmp_path, 1, workers=3)
    await again.bus.start()
    await until(lambda: bool(again.cached))
    assert again.cached == [(KEY, [2**64 - 1, 7])]
    assert len(third.cached) == 1
    for peer in (first, again, third):
        await peer.bus.stop()


async def test_envoys_of_a_worker_that_goes_are_told_of(pair: tuple[Peer, Peer]) -> None:
    """How many more it has, and how many it had when it went: not those that had left it before."""
    one, other = pair
    for number in (2, 2, 3, 1):
        one.bus.tell_envoys(number)
    await until(lambda: other.found == 3)
    one.bus.broadcast(ENTRY)
    await until(lambda: other.entries == [ENTRY])
    assert other.lost == 0
    await one.bus.stop()
    await until(lambda: other.lost == 1)


async def test_a_worker_that_comes_is_told_of_envoys(tmp_path: Path) -> None:
    """They came before it did."""
    one, other = Peer(tmp_path, 0), Peer(tmp_path, 1)
    await one.bus.start()
    one.bus.tell_envoys(2)
    await other.bus.start()
    await until(lambda: other.found == 2)
    for peer in (one, other):
        await peer.bus.stop()


async def test_those_that_are_there_are_asked(pair: tuple[Peer, Peer], tmp_path: Path) -> None:
    """A worker that is gone is not among them, and who comes is said."""
    one, other = pair
    came, away, asked = [list[int]() for _ in range(3)]
    one.bus.came.add(came.append)
    one.bus.away.add(away.append)
    other.bus.questions.add(lambda _, number, *__: asked.append(number))
    assert one.bus.ask(1, ["a"]) == {1}
    await until(lambda: asked == [1])
    await other.bus.stop()
    await until(lambda: away == [1])
    assert one.bus.ask(2, ["a"]) == frozenset()
    again = Peer(tmp_path, 1)
    again.bus.questions.add(lambda _, number, *__: asked.append(number))
    await again.bus.start()
    await until(lambda: came == [1])
    assert one.bus.ask(3, ["a"], worker=0) == frozenset()
    assert one.bus.ask(4, ["a"], worker=1) == {1}
    await until(lambda: asked == [1, 4])
    await again.bus.stop()
