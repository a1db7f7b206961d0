"""What every server promises its services: the same calls, delivered and answered in the same way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from extproc.transport.seam import Call, Received, Rpc, Status
from tests.contract.rpc_servers import SERVERS, Serve
from tests.waiting import until

pytestmark = pytest.mark.asyncio

SERVICE = "tests.Seam"
DEADLINE_S = 5.0


class Scripted:
    """A receiver that does what the test says, and remembers what it received.

    Args:
        call: Its call.
        react: Called with itself and each message; `b"<half-close>"` stands for that event.
    """

    def __init__(self, call: Call, react: Callable[[Scripted, bytes], None]) -> None:
        self.call = call
        self.received: list[bytes | str] = []
        self._react = react

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        self.received.append(bytes(message))
        self._react(self, bytes(message))

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self.received.append("half-close")
        self._react(self, b"<half-close>")

    def on_reset(self) -> None:
        """See `Receiver`."""
        self.received.append("reset")


class Peer:
    """A client, and the receivers of the calls it made.

    Args:
        channel: To the server.
        receivers: Filled by the server.
    """

    def __init__(self, channel: grpc.aio.Channel, receivers: list[Scripted]) -> None:
        self.receivers = receivers
        self._methods = {name: channel.stream_stream(f"/{SERVICE}/{name}") for name in ("Free", "Lasting")}

    def call(self, method: str = "Free") -> Any:
        """Open a call; messages are bytes."""
        return self._methods[method]()

    async def receiver(self) -> Scripted:
        """The receiver of the first call."""
        await until(lambda: bool(self.receivers))
        return self.receivers[0]


@asynccontextmanager
async def serving(
    serve: Serve, socket: Path, react: Callable[[Scripted, bytes], None]
) -> AsyncIterator[Peer]:
    """A server of two methods that react alike: `Free`, and `Lasting`, whose endings bring a last message."""
    receivers: list[Scripted] = []

    def opened(call: Call) -> Scripted:
        receivers.append(Scripted(call, react))
        return receivers[-1]

    rpcs = [Rpc(SERVICE, "Free", opened), Rpc(SERVICE, "Lasting", opened, has_last=True)]
    async with serve(rpcs, socket), grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        yield Peer(channel, receivers)


@pytest.fixture(params=sorted(SERVERS))
def serve(request: pytest.FixtureRequest) -> Serve:
    """Each server in turn."""
    return SERVERS[request.param]


def echo(receiver: Scripted, message: bytes) -> None:
    """Answer each message with itself, and the half-close with the end."""
    if message == b"<half-close>":
        receiver.call.finish(b"end")
    else:
        receiver.call.send(message)


@pytest.mark.parametrize("method", ["Free", "Lasting"])
async def test_messages_come_and_go_in_order(serve: Serve, tmp_path: Path, method: str) -> None:
    """Messages are delivered whole and in order, whatever their length, and so are answers; then the last."""
    async with serving(serve, tmp_path / "s", echo) as peer:
        call = peer.call(method)
        sent = [b"", b"1", b"2" * 70_000, b"3" * 1_000_000]
        for message in sent:
            await call.write(message)
        await call.done_writing()
        assert [await call.read() for _ in sent] == sent
        assert await call.read() == b"end"
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        assert (await peer.receiver()).received == [*sent, "half-close"]


async def test_an_ending_without_a_last_message(serve: Serve, tmp_path: Path) -> None:
    """A call may end well with nothing more to say, while its peer could still write."""
    async with serving(serve, tmp_path / "s", lambda receiver, _: receiver.call.finish()) as peer:
        call = peer.call()
        await call.write(b"x")
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("method", ["Free", "Lasting"])
async def test_what_is_done_later_and_unasked(serve: Serve, tmp_path: Path, method: str) -> None:
    """A receiver sends and finishes while its call waits for a message that never comes."""
    async with serving(serve, tmp_path / "s", lambda *_: None) as peer:
        call = peer.call(method)
        await call.write(b"x")
        receiver = await peer.receiver()
        await until(lambda: receiver.received == [b"x"])
        receiver.call.send(b"later")
        assert await call.read() == b"later"
        receiver.call.send(b"and")
        receiver.call.send(b"more")
        receiver.call.finish(b"last")
        assert [await call.read() for _ in range(3)] == [b"and", b"more", b"last"]
        assert await call.code() is grpc.StatusCode.OK
        assert receiver.received == [b"x"]


async def test_messages_still_arrive_after_an_unasked_answer(serve: Serve, tmp_path: Path) -> None:
    """What was sent in between costs the call nothing of what the peer writes."""
    async with serving(serve, tmp_path / "s", lambda *_: None) as peer:
        call = peer.call()
        receiver = None
        for number in range(20):
            await call.write(b"%d" % number)
            receiver = receiver or await peer.receiver()
            receiver.call.send(b"a%d" % number)
            assert await call.read() == b"a%d" % number
        assert receiver is not None
        await until(lambda: len(receiver.received) == 20)
        receiver.call.finish()
        assert await call.code() is grpc.StatusCode.OK


async def test_an_answer_after_the_half_close(serve: Serve, tmp_path: Path) -> None:
    """A peer that says nothing more is still answered."""
    async with serving(serve, tmp_path / "s", lambda *_: None) as peer:
        call = peer.call()
        await call.write(b"x")
        await call.done_writing()
        receiver = await peer.receiver()
        await until(lambda: receiver.received == [b"x", "half-close"])
        receiver.call.send(b"answer")
        receiver.call.finish(b"last")
        assert [await call.read(), await call.read()] == [b"answer", b"last"]
        assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("method", ["Free", "Lasting"])
@pytest.mark.parametrize("is_unasked", [False, True])
async def test_an_abort_comes_after_what_was_sent(
    serve: Serve, tmp_path: Path, method: str, is_unasked: bool
) -> None:
    """The peer reads what was sent and then the status with its detail."""

    def abort(receiver: Scripted, _: bytes) -> None:
        receiver.call.send(b"sent")
        receiver.call.abort(Status.RESOURCE_EXHAUSTED, "too much")

    async with serving(serve, tmp_path / "s", (lambda *_: None) if is_unasked else abort) as peer:
        call = peer.call(method)
        await call.write(b"x")
        if is_unasked:
            receiver = await peer.receiver()
            await until(lambda: receiver.received == [b"x"])
            abort(receiver, b"")
        assert await call.read() == b"sent"
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await call.details() == "too much"


async def test_a_peer_that_leaves_is_reported_once_it_was_served(serve: Serve, tmp_path: Path) -> None:
    """A cancelled call is reported as half-closed or reset, and acts on it then have no effect."""
    async with serving(serve, tmp_path / "s", lambda *_: None) as peer:
        call = peer.call()
        await call.write(b"x")
        receiver = await peer.receiver()
        await until(lambda: receiver.received == [b"x"])
        call.cancel()
        await until(lambda: len(receiver.received) > 1)
        assert set(receiver.received[1:]) <= {"half-close", "reset"}
        receiver.call.send(b"y")
        receiver.call.finish(b"z")
        receiver.call.abort(Status.INTERNAL, "late")
        other = peer.call()  # the server serves on
        await other.write(b"x")
        await until(lambda: len(peer.receivers) == 2 and peer.receivers[1].received == [b"x"])
        other.cancel()


async def test_nothing_is_called_or_done_after_the_end(serve: Serve, tmp_path: Path) -> None:
    """The first ending counts; messages that come later go nowhere."""

    def end_twice(receiver: Scripted, _: bytes) -> None:
        receiver.call.finish(b"first")
        receiver.call.send(b"second")
        receiver.call.abort(Status.INTERNAL, "third")

    async with serving(serve, tmp_path / "s", end_twice) as peer:
        call = peer.call()
        await call.write(b"x")
        assert [await call.read(), await call.read()] == [b"first", grpc.aio.EOF]
        assert await call.code() is grpc.StatusCode.OK
        assert (await peer.receiver()).received == [b"x"]


async def test_sent_is_called_later(serve: Serve, tmp_path: Path) -> None:
    """`sent` is called once for its message, in order, and not before `send` has returned."""
    heard: list[str] = []

    def send(receiver: Scripted, _: bytes) -> None:
        receiver.call.send(b"1", lambda: heard.append("1"))
        receiver.call.send(b"2", lambda: heard.append("2"))
        heard.append("returned")

    async with serving(serve, tmp_path / "s", send) as peer:
        call = peer.call()
        await call.write(b"x")
        assert [await call.read(), await call.read()] == [b"1", b"2"]
        await until(lambda: len(heard) == 3)
        assert heard == ["returned", "1", "2"]
        call.cancel()


async def test_a_peer_that_does_not_read_holds_back_sent(serve: Serve, tmp_path: Path) -> None:
    """A service that waits for `sent` before it sends more keeps few messages for a slow peer."""
    heard: list[int] = []

    def send(receiver: Scripted, message: bytes) -> None:
        def again() -> None:
            heard.append(1)
            receiver.call.send(message, again)

        receiver.call.send(message, again)

    async with serving(serve, tmp_path / "s", send) as peer:
        call = peer.call()
        await call.write(b"x" * 1_000_000)
        await call.read()
        before = -1
        async with asyncio.timeout(DEADLINE_S):
            while before != len(heard):
                before = len(heard)
                await asyncio.sleep(0.2)
        stuck = len(heard)
        for _ in range(stuck + 2):
            await call.read()
        await until(lambda: len(heard) > stuck)
        call.cancel()


async def test_a_fault_of_a_receiver_ends_its_call_alone(serve: Serve, tmp_path: Path) -> None:
    """The call gets UNKNOWN and its receiver hears no more; calls beside it go on."""

    def fail(receiver: Scripted, message: bytes) -> None:
        if message == b"fail":
            raise ValueError("a bug")
        echo(receiver, message)

    async with serving(serve, tmp_path / "s", fail) as peer:
        beside, call = peer.call(), peer.call()
        await beside.write(b"1")
        assert await beside.read() == b"1"
        await call.write(b"fail")
        assert await call.code() is grpc.StatusCode.UNKNOWN
        await beside.write(b"2")
        assert await beside.read() == b"2"
        assert sorted(map(len, (each.received for each in peer.receivers))) == [1, 2]
        beside.cancel()


async def test_a_server_that_stops_resets_its_calls(serve: Serve, tmp_path: Path) -> None:
    """A service that waits for a message when the server stops learns of it."""
    async with serving(serve, tmp_path / "s", lambda *_: None) as peer:
        call = peer.call()
        await call.write(b"x")
        receiver = await peer.receiver()
        await until(lambda: receiver.received == [b"x"])
    await until(lambda: len(receiver.received) > 1)
    assert set(receiver.received[1:]) <= {"half-close", "reset"}


async def test_many_calls_at_once(serve: Serve, tmp_path: Path) -> None:
    """Two hundred calls, half of them given up, do not mix their messages."""

    async def use(peer: Peer, number: int) -> None:
        call = peer.call()
        await call.write(b"%d" % number)
        if number % 2:
            call.cancel()
            return
        assert await call.read() == b"%d" % number
        await call.done_writing()
        assert await call.read() == b"end"

    async with serving(serve, tmp_path / "s", echo) as peer:
        await asyncio.gather(*(use(peer, number) for number in range(200)))


async def test_the_peer_has_a_name(serve: Serve, tmp_path: Path) -> None:
    """Text for a log; a Unix socket's may be empty."""
    async with serving(serve, tmp_path / "s", echo) as peer:
        call = peer.call()
        await call.write(b"x")
        await call.read()
        assert isinstance((await peer.receiver()).call.peer, str)
        call.cancel()
