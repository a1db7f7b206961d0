"""Large bodies read by real processes: answers, refusals, deaths, bounds, and clients that leave."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

import orjson
import pytest

from extproc.errors import Reason, RouterError
from extproc.request.parse import parse
from extproc.request.reading import BodyRead, ReadOrder, read_body
from extproc.request.structure import MAX_CONTAINERS
from extproc.routing.router import MAX_PATIENCE_S
from extproc.routing.settings import RouterSettings
from extproc.server.bodies import body_readers
from extproc.server.bodies.body_readers import BodyReaders
from extproc.values.deciding import Later, Now
from extproc.values.placements import Decision
from tests.conftest import build_rig, request_line, result_of

CHAT = "/v1/chat/completions"
ORDER = ReadOrder(CHAT, frozenset(), False, frozenset({"m"}), 4096)


def large(**fields: Any) -> bytes:
    """A body that is not read on the loop."""
    return orjson.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "x" * 3_000_000}], "stream": True, **fields}
    )


def upload(num_bytes: int) -> bytes:
    """A form with a file."""
    fields = {"model": "m", "language": "de", "priority": "5"}
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{said}\r\n'
        for name, said in fields.items()
    ]
    head = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    return "".join((*parts, head)).encode() + b"\0\r\n--" * (num_bytes // 5) + b"\r\n--b--\r\n"


@pytest.fixture
async def readers() -> AsyncIterator[BodyReaders]:
    """No process yet."""
    readers = BodyReaders()
    yield readers
    await readers.close()


def alive(pid: int) -> bool:
    """Whether a process of ours is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_body_is_read_as_it_would_be_here(readers: BodyReaders) -> None:
    """The same request and the same body to send, from a process that is started then and ends with us."""
    assert readers.pids == []
    body = large(priority=1, n=3)
    read = await result_of(readers.read(ORDER, body))
    here = read_body(ORDER, body)
    assert (read.request, read.is_changed) == (here.request, True)
    assert read.new_body("other") == here.new_body("other")
    (pid,) = readers.pids
    await result_of(readers.read(ORDER, body))
    assert readers.pids == [pid]
    await readers.close()
    assert not alive(pid)


async def test_a_model_that_a_proxy_renames_is_renamed_from_there(readers: BodyReaders) -> None:
    """Whatever it is called in the body: its name is not among those that rules replace."""
    order = replace(ORDER, rewritten=frozenset(), is_renamed=True)
    read = await result_of(readers.read(order, large()))
    assert read.new_body("other") == read_body(order, large()).new_body("other")


@pytest.mark.parametrize("model", [None, "other"])
async def test_a_form_is_read_as_it_would_be_here(readers: BodyReaders, model: str | None) -> None:
    """An upload of many megabytes: what is asked for, and the same body to send."""
    body = upload(3_000_000)
    order = replace(ORDER, path="/v1/audio/transcriptions")
    read = await result_of(readers.read(order, body))
    here = parse(order.path, body)
    assert here.form is not None
    assert (read.request.model, read.request.stream, read.request.prompt) == ("m", here.stream, here.prompt)
    new_body = read.new_body(model)
    assert new_body is not None, "a client may not set priorities"
    assert b"".join(new_body) == here.form.rewritten(model, frozenset())


async def test_a_large_form_is_decided_later(readers: BodyReaders) -> None:
    """So that nobody waits while the ends of its parts are looked for; a small one is decided at once."""
    rig = build_rig(readers=readers)
    line = replace(request_line("r"), path="/v1/audio/transcriptions")
    deferred = rig.gateway.decide(line, upload(3_000_000))
    assert isinstance(deferred, Later)
    decision = await result_of(deferred.pending)
    assert isinstance(decision, Decision)
    assert decision.new_body is not None
    assert isinstance(rig.gateway.decide(replace(line, headers={}), upload(30_000)), Now)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"model":"m","x":[' + b"[]," * (MAX_CONTAINERS + 1) + b"1]}", Reason.BODY_TOO_LARGE),
        (b'{"model":"m","messages":[' + b" " * 3_000_000, Reason.INVALID_JSON),
        (b'{"model":"m","x":"' + b"\xff" * 3_000_000, Reason.INVALID_JSON),
        (large(messages=[]), Reason.EMPTY_MESSAGES),
    ],
)
async def test_a_refusal_is_the_same_from_there(readers: BodyReaders, body: bytes, reason: Reason) -> None:
    """Reason, field and sentence come back, and the process goes on."""
    with pytest.raises(RouterError) as here:
        read_body(ORDER, body)
    with pytest.raises(RouterError) as there:
        await result_of(readers.read(ORDER, body))
    assert there.value.reason is here.value.reason is reason
    assert (there.value.message, there.value.param) == (here.value.message, here.value.param)
    assert (await result_of(readers.read(ORDER, large()))).request.model == "m"


async def test_a_process_that_dies_fails_its_body_and_is_replaced(readers: BodyReaders) -> None:
    """One answer of 500, and the next body finds another process."""
    await result_of(readers.read(ORDER, large()))
    (pid,) = readers.pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RouterError) as raised:
        await result_of(readers.read(ORDER, large()))
    assert raised.value.reason is Reason.INTERNAL
    assert (await result_of(readers.read(ORDER, large()))).request.stream
    assert readers.pids != [pid]


async def test_a_process_that_hangs_is_replaced(
    readers: BodyReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It got no processor, and says nothing of the body: 503 with Retry-After; the next one is read."""
    await result_of(readers.read(ORDER, large()))
    (pid,) = readers.pids
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(body_readers, "MAX_READ_S", 0.2)
    with pytest.raises(RouterError) as raised:
        await result_of(readers.read(ORDER, large()))
    assert (raised.value.reason, raised.value.retry_after_s) == (Reason.READERS_BUSY, 1)
    assert readers.pids == []
    monkeypatch.setattr(body_readers, "MAX_READ_S", 30.0)
    assert (await result_of(readers.read(ORDER, large()))).request.model == "m"


WORKS_ON: Final = """
import socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
channel.sendall(b"!")
channel.recv(1)
while True:
    pass
"""


async def test_a_body_that_a_process_works_on_too_long_is_too_large(
    readers: BodyReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process had the processor all the time: 413, for another try would go the same way."""
    command = partial(_command, WORKS_ON)
    monkeypatch.setattr(body_readers, "python_module", command)
    monkeypatch.setattr(body_readers, "MAX_READ_S", 1.0)
    monkeypatch.setattr(body_readers, "OWN_SHARE", 0.05)  # others want the processor as well
    with pytest.raises(RouterError) as raised:
        await result_of(readers.read(ORDER, large()))
    assert raised.value.reason is Reason.BODY_TOO_LARGE
    assert readers.pids == []


def _command(program: str, _module: str, *words: str) -> list[str]:
    """What runs a program in place of a module of ours."""
    return [sys.executable, "-c", program, *words]


async def test_a_process_that_does_not_start_says_nothing_of_the_body(
    readers: BodyReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that is too busy for it: 503 with Retry-After, where 413 would end the client's tries."""
    monkeypatch.setattr(body_readers, "MAX_START_S", 1e-6)
    with pytest.raises(RouterError) as raised:
        await result_of(readers.read(ORDER, large()))
    assert (raised.value.reason, raised.value.retry_after_s) == (Reason.READERS_BUSY, 1)
    assert readers.pids == []
    monkeypatch.setattr(body_readers, "MAX_START_S", 30.0)
    assert (await result_of(readers.read(ORDER, large()))).request.model == "m"


async def test_more_than_may_wait_is_refused_at_once(
    readers: BodyReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 with Retry-After, and what waits is read all the same."""
    monkeypatch.setattr(body_readers, "MAX_WAITING", 3)
    reading = [asyncio.ensure_future(result_of(readers.read(ORDER, large()))) for _ in range(5)]
    await asyncio.sleep(0)
    assert len(readers) == 3
    with pytest.raises(RouterError) as raised:
        await result_of(readers.read(ORDER, large()))
    assert (raised.value.reason, raised.value.status) == (Reason.READERS_BUSY, 503)
    assert raised.value.retry_after_s == 1
    assert len(await asyncio.gather(*reading)) == 5
    assert len(readers) == 0


async def test_bytes_that_wait_are_bounded(readers: BodyReaders, monkeypatch: pytest.MonkeyPatch) -> None:
    """As their number is."""
    monkeypatch.setattr(body_readers, "MAX_WAITING_BYTES", 1_000_000)
    with pytest.raises(RouterError) as raised:
        await result_of(readers.read(ORDER, large()))
    assert raised.value.reason is Reason.READERS_BUSY


async def test_a_client_that_leaves_takes_its_body_with_it(readers: BodyReaders) -> None:
    """One that waits is forgotten, one that is being read ends without a reader; others are read as ever."""
    reading = [asyncio.ensure_future(result_of(readers.read(ORDER, large()))) for _ in range(6)]
    await asyncio.sleep(0)
    for one in reading[:5]:
        one.cancel()
    await asyncio.gather(*reading[:5], return_exceptions=True)
    assert len(readers) <= 1
    assert (await reading[5]).request.model == "m"
    assert len(readers) == 0


async def test_the_cheapest_is_read_first(readers: BodyReaders) -> None:
    """Requests with more wait for requests with less, not the other way round."""
    order: list[int] = []

    async def read(number: int, body: bytes) -> None:
        await result_of(readers.read(ORDER, body))
        order.append(number)

    huge = large(x="y" * 12_000_000)
    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(read(number, huge))
        await asyncio.sleep(0)
        group.create_task(read(9, large()))
    assert order.index(9) < 3


async def test_closing_refuses_requests_that_wait(readers: BodyReaders) -> None:
    """No request is left without an answer."""
    reading = [asyncio.ensure_future(result_of(readers.read(ORDER, large()))) for _ in range(5)]
    await asyncio.sleep(0)
    await readers.close()
    ended = await asyncio.gather(*reading, return_exceptions=True)
    refused = [one for one in ended if isinstance(one, RouterError)]
    assert len(refused) + sum(isinstance(one, BodyRead) for one in ended) == 5
    assert {one.reason for one in refused} == {Reason.SHUTTING_DOWN}


async def test_a_large_body_is_decided_later(readers: BodyReaders) -> None:
    """Envoy is asked for patience; the decision, its charge and the body to send are those of a small one."""
    rig = build_rig(settings=RouterSettings(block_bytes=64), readers=readers)
    deferred = rig.gateway.decide(request_line("r"), large(priority=1))
    assert isinstance(deferred, Later)
    assert deferred.patience_s is not None
    assert 1.0 < deferred.patience_s <= MAX_PATIENCE_S
    assert rig.scheduling.load.in_flight == 0
    decision = await result_of(deferred.pending)
    assert isinstance(decision, Decision)
    assert decision.stream
    assert decision.new_body is not None
    assert b'"priority"' not in b"".join(decision.new_body)
    assert rig.scheduling.load.in_flight == 1
    assert rig.record().prompt_bytes > 3_000_000


async def test_a_client_that_leaves_while_its_body_is_read_is_not_charged(readers: BodyReaders) -> None:
    """Neither at once nor when the process is done with it."""
    rig = build_rig(readers=readers)
    deferred = rig.gateway.decide(request_line("r"), large())
    assert isinstance(deferred, Later)
    await asyncio.sleep(0.01)
    deferred.pending.cancel()
    await result_of(readers.read(ORDER, large()))
    assert rig.scheduling.load.in_flight == 0
    assert len(rig.scheduling.running) == 0


async def test_a_large_body_that_is_refused_leaves_no_trace(readers: BodyReaders) -> None:
    """The refusal comes from the decision, as ever."""
    rig = build_rig(readers=readers)
    deferred = rig.gateway.decide(request_line("r"), large(model="unknown"))
    assert isinstance(deferred, Later)
    with pytest.raises(RouterError) as raised:
        await result_of(deferred.pending)
    assert raised.value.reason is Reason.MODEL_NOT_FOUND
    assert rig.scheduling.load.in_flight == 0


async def test_small_bodies_are_decided_at_once(readers: BodyReaders) -> None:
    """No process is started for them."""
    rig = build_rig(readers=readers)
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 1_000_000}]})
    assert isinstance(rig.gateway.decide(request_line("r"), body), Now)
    assert readers.pids == []


async def test_many_slow_bodies_are_read_elsewhere(readers: BodyReaders) -> None:
    """Each is small enough to be read here; together they are not, and only small ones still are."""

    def slow() -> int:
        rig.clock.advance(0.05)
        return 1

    rig = build_rig(readers=readers, work_clock=lambda: rig.clock(), processes=slow)
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 100_000}]})
    decisions = [rig.gateway.decide(request_line(f"r{number}"), body) for number in range(6)]
    assert [type(decision) for decision in decisions] == [Now] * 3 + [Later] * 3
    small = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
    assert isinstance(rig.gateway.decide(request_line("small"), small), Now)
    for deferred in decisions[3:]:
        assert isinstance(deferred, Later)
        decision: Any = await result_of(deferred.pending)
        assert isinstance(decision, Decision)
    rig.clock.advance(10.0)
    assert isinstance(rig.gateway.decide(request_line("later"), body), Now)
