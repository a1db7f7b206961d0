"""Sockets whose names lead nowhere are made anew, whoever serves them; what others put there stays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from extproc.admin.table import PAGES
from extproc.config.sections.listening import Transport
from extproc.errors import ConfigError
from extproc.server.exchanging.bus import Bus
from extproc.server.listening import grpcio_server, socket_watch
from extproc.server.listening.admin_answers import AllWorkers
from extproc.server.listening.admin_port import AdminPort
from extproc.server.listening.rpc_places import Places
from extproc.server.listening.rpc_server import RpcServer, check_free, rpc_server
from extproc.server.listening.run_dir import Residence, prepare
from extproc.server.listening.socket_watch import Kept, SocketWatch, kept_of
from extproc.transport.native import tcp_socket
from extproc.transport.seam import Call, Received, Rpc
from tests.waiting import until

pytestmark = pytest.mark.asyncio

WAIT_S = 20.0


class Echo:
    """Answers a message by itself."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        self._call.finish(bytes(message))

    def on_half_close(self) -> None:
        """See `Receiver`."""

    def on_reset(self) -> None:
        """See `Receiver`."""


async def echoed(path: Path) -> bytes:
    """What a new connection is answered."""
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        answer: bytes = await channel.stream_unary("/s/m")(iter([b"hello"]), timeout=WAIT_S)
        return answer


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other closely."""
    monkeypatch.setattr(socket_watch, "LOOK_S", 0.01)


@pytest.fixture
async def watch(tmp_path: Path) -> AsyncIterator[SocketWatch]:
    """Of a folder of its own; started by the test."""
    made = SocketWatch(partial(prepare, tmp_path / "run"), lambda: True)
    prepare(tmp_path / "run")
    yield made
    await made.stop()


def are_renewed(watch: SocketWatch, renewals: int) -> bool:
    """So many files were."""
    return watch.renewals == renewals


def empty(folder: Path) -> None:
    """And take it away."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.fixture(params=list(Transport))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RpcServer]:
    """At a socket of its own and another one, by each transport."""
    prepare(tmp_path / "run")
    places = Places(tmp_path / "run" / "gw0.sock", (f"unix:{tmp_path / 'run' / 'more.sock'}",))
    made = rpc_server(request.param, [Rpc("s", "m", Echo, has_last=True)], places, 65_536, lambda *_: None)
    await made.listen()
    yield made
    await made.close()


async def test_a_server_listens_anew(server: RpcServer, watch: SocketWatch, tmp_path: Path) -> None:
    """As often as need be, closed to others; calls on connections from before go on."""
    folder = tmp_path / "run"
    watch.keep(kept_of(server))
    watch.start()
    async with grpc.aio.insecure_channel(f"unix:{folder / 'gw0.sock'}") as before:
        assert await before.stream_unary("/s/m")(iter([b"first"])) == b"first"
        for renewals in (2, 4, 6):
            empty(folder)
            await until(partial(are_renewed, watch, renewals))
            assert folder.stat().st_mode & 0o077 == 0
            assert (folder / "gw0.sock").stat().st_mode & 0o077 == 0
            assert await echoed(folder / "gw0.sock") == await echoed(folder / "more.sock") == b"hello"
        assert await before.stream_unary("/s/m")(iter([b"last"])) == b"last"
    assert watch.are_in_place
    await server.drain(WAIT_S)


async def test_renewals_by_grpcio_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a server more."""
    monkeypatch.setattr(grpcio_server, "MAX_RENEWALS", 1)
    path = tmp_path / "gw0.sock"
    made = rpc_server(Transport.GRPCIO, [], Places(path), 65_536, lambda *_: None)
    await made.listen()
    path.unlink()
    await made.renew(path)
    path.unlink()
    with pytest.raises(OSError, match="it was made anew 1 times"):
        await made.renew(path)
    await made.close()


async def test_workers_and_the_admin_port_listen_anew(watch: SocketWatch, tmp_path: Path) -> None:
    """A worker that starts anew finds the others, and the supervisor finds the workers."""
    folder = tmp_path / "run"
    bus = Bus(folder, 0, 2, lambda _: None, lambda *_: None)
    admin = AdminPort(PAGES, AllWorkers([]), folder / "admin0.sock")
    await bus.start()
    await admin.start()
    watch.keep([Kept(bus.path, bus.renew), Kept(folder / "admin0.sock", admin.renew)])
    watch.start()
    for renewals in (2, 4):
        empty(folder)
        await until(partial(are_renewed, watch, renewals))
    other = Bus(folder, 1, 2, lambda _: None, lambda *_: None)
    await other.start()
    assert await other.met() == {0}
    _, writer = await asyncio.open_unix_connection(folder / "admin0.sock")
    writer.close()
    for each in (other, bus, admin):
        await each.stop()


async def test_what_another_process_put_there_is_left_alone(
    watch: SocketWatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and shown until it is over."""
    path, renewed = tmp_path / "run" / "gw0.sock", 0

    def renew() -> None:
        nonlocal renewed
        renewed += 1
        path.write_text("ours")

    path.write_text("ours")
    watch.keep([Kept(path, renew)])
    watch.start()
    path.rename(tmp_path / "aside")
    path.write_text("theirs")
    await until(lambda: not watch.are_in_place)
    await asyncio.sleep(0.1)
    assert (renewed, path.read_text()) == (0, "theirs")
    (said,) = [line for line in caplog.records if line.levelno == logging.ERROR]
    assert said.__dict__["problem"] == "another process has put a file in its place"
    path.unlink()
    await until(lambda: watch.are_in_place)
    assert (renewed, path.read_text()) == (1, "ours")


async def test_what_cannot_be_made_anew_is_said_once_and_tried_again(
    watch: SocketWatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that another gateway has taken, a disk that is full."""
    path, tried, is_full = tmp_path / "run" / "gw0.sock", 0, True

    def renew() -> None:
        nonlocal tried
        tried += 1
        if is_full:
            raise OSError(28, "No space left on device")
        path.write_text("")

    path.write_text("")
    watch.keep([Kept(path, renew)])
    watch.start()
    path.unlink()
    await until(lambda: tried > 3)
    assert not watch.are_in_place
    assert [line.__dict__["problem"] for line in caplog.records] == ["No space left on device"]
    is_full = False
    await until(lambda: watch.are_in_place)
    assert watch.renewals == 1


async def test_the_lock_is_taken_anew(watch: SocketWatch, tmp_path: Path) -> None:
    """No other gateway may come into a folder that was emptied."""
    folder = tmp_path / "run"
    residence = Residence(folder, is_alone=True)
    residence.start()
    watch.keep([Kept(residence.lock_path, residence.renew)])
    watch.start()
    empty(folder)
    await until(lambda: watch.renewals == 1)
    with pytest.raises(ConfigError, match="another gateway runs there"):
        Residence(folder, is_alone=True).start()
    residence.stop()
    Residence(folder, is_alone=True).start()


async def test_a_folder_that_another_gateway_has_taken_is_not_cleared(tmp_path: Path) -> None:
    """The one that was there first leaves it as it is."""
    folder = tmp_path / "run"
    first, second = Residence(folder, is_alone=True), Residence(folder, is_alone=True)
    first.start()
    empty(folder)
    second.start()
    (folder / "gw0.sock").write_text("of the second")
    with pytest.raises(ConfigError, match="another gateway runs there"):
        first.renew()
    first.stop()
    assert (folder / "gw0.sock").exists()
    second.stop()
    assert not (folder / "gw0.sock").exists()


@pytest.mark.parametrize("transport", list(Transport))
async def test_an_address_that_cannot_be_listened_at_is_named(transport: Transport, tmp_path: Path) -> None:
    """Not by a stack of calls, nor by the system's word alone, which names none."""
    taken = tcp_socket("127.0.0.1", 0)
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    for place, named in ((address, address), (f"unix:{tmp_path}/none/x.sock", f"{tmp_path}/none/x.sock")):
        made = rpc_server(transport, [], Places(tmp_path / "gw0.sock", (place,)), 65_536, lambda *_: None)
        with pytest.raises(OSError, match=r"address|Address|folder|file") as refused:
            await made.listen()
        assert named in (refused.value.filename or str(refused.value))
        await made.close()
        with pytest.raises(OSError, match=r"in use|No such file"):
            check_free([place])
    taken.close()
