"""Lines of the log, whoever reads them, or does not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from extproc.observing import log_writer
from extproc.observing.log_writer import LogWriter, lines_lost, log_handler
from extproc.observing.request_log import JsonFormatter

WAIT_S = 20.0
PIPE_BYTES = 4096


def record(text: str) -> logging.LogRecord:
    """One of INFO."""
    return logging.LogRecord("tokenway.x", logging.INFO, "", 0, text, (), None)


def writer(descriptor: int) -> LogWriter:
    """As `serve` has it."""
    made = LogWriter(descriptor)
    made.setFormatter(JsonFormatter())
    return made


def said(text: bytes) -> list[str | int]:
    """The event of each line; of those that tell of lost ones, how many."""
    lines = [json.loads(line) for line in text.decode().splitlines()]
    return [line["lines"] if line["logger"] == log_writer.LOGGER else line["event"] for line in lines]


class Reader:
    """The other side."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.text = b""
        self._read = read
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Read from now on, to the end."""
        self._thread.start()

    def ended(self) -> bytes:
        """All that came, once the writing side is closed."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.text

    def _run(self) -> None:
        while piece := self._read(65_536):
            self.text += piece


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A small one: reading side, writing side."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    inode = os.fstat(reading).st_ino
    yield reading, writing
    for descriptor in (reading, writing):
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:  # else it is closed, and its number another's
                os.close(descriptor)


def in_time(work: Callable[[], object]) -> None:
    """Fail rather than wait for ever."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "it waits for the reader"


def close(made: LogWriter) -> None:
    """All that waits is written."""
    assert made._is_idle.wait(WAIT_S)
    made.close()


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_pipe_that_nobody_reads_holds_up_nobody(
    pipe: tuple[int, int], is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is read, every line comes, whole and in order; also where the pipe may not be opened anew."""
    reading, writing = pipe
    if not is_ours:
        monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError()))
    made = writer(writing)
    events = [f"{number} {'x' * (number % 7 * 1000)}" for number in range(200)]
    in_time(lambda: [made.handle(record(event)) for event in events])
    reader = Reader(lambda size: os.read(reading, size))
    reader.start()
    close(made)
    os.close(writing)
    assert said(reader.ended()) == events
    assert made.lost == 0


def test_lines_beyond_the_bound_are_lost_and_told_of(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones stay; what comes after the pipe is read again is written as before."""
    reading, writing = pipe
    monkeypatch.setattr(log_writer, "MOST_WAITING_BYTES", 20_000)
    made = writer(writing)
    in_time(lambda: [made.handle(record(str(number))) for number in range(1_000)])
    lost = made.lost
    assert 700 < lost < 1_000
    reader = Reader(lambda size: os.read(reading, size))
    reader.start()
    assert made._is_idle.wait(WAIT_S)
    made.handle(record("after"))
    close(made)
    os.close(writing)
    assert said(reader.ended()) == [*map(str, range(1_000 - lost)), lost, "after"]
    assert (made.lost, made.lost_in_all, lines_lost(made)) == (0, lost, lost)


def test_the_end_of_the_process_waits_for_a_second_at_most(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops a gateway whose log is stuck need not kill it."""
    monkeypatch.setattr(log_writer, "_END_S", 0.01)
    made = writer(pipe[1])
    in_time(lambda: [made.handle(record("x" * 1_000)) for _ in range(10)])
    in_time(made.flush)
    assert not made._is_idle.is_set()
    os.read(pipe[0], PIPE_BYTES)
    reader = Reader(lambda size: os.read(pipe[0], size))
    reader.start()
    close(made)
    os.close(pipe[1])
    assert reader.ended()


def test_a_full_disk_loses_lines_and_no_request() -> None:
    """They are counted, without a stack for each; `/dev/full` refuses every byte."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    made = writer(descriptor)
    for number in range(3):
        made.handle(record(str(number)))
    assert made.lost == 3
    os.close(descriptor)


def test_a_disk_that_was_full_has_whole_lines_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of which a part was written ends there; the next one says that lines were lost."""
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b'"there before"\n')
    made, write, space = writer(descriptor), os.write, [20]

    def scarce(to: int, line: bytes) -> int:
        if space[0] <= 0:
            raise OSError(28, "No space left on device")
        line = line[: space[0]]
        space[0] -= len(line)
        return write(to, line)

    monkeypatch.setattr(os, "write", scarce)
    made.handle(record("cut"))
    assert made._is_idle.wait(WAIT_S)
    made.handle(record("lost"))
    space[0] = 10_000
    made.handle(record("whole"))
    first, cut, *lines = path.read_bytes().splitlines()
    os.close(descriptor)
    assert first == b'"there before"', "the file is not opened anew, which would begin at its start"
    assert len(cut) == 20
    assert said(b"\n".join(lines)) == [2, "whole"]
    assert made.lost_in_all == 2


def test_a_count_that_cannot_be_told_is_not_forgotten(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that says how many were lost is refused as well: the next one that is written says so."""
    reading, writing = pipe
    monkeypatch.setattr(log_writer, "MOST_WAITING_BYTES", 20_000)
    made, write, is_full = writer(writing), os.write, [False]

    def refuse(to: int, line: bytes) -> int:
        if is_full[0] and log_writer.LOGGER.encode() in line:
            raise OSError(28, "No space left on device")
        return write(to, line)

    monkeypatch.setattr(os, "write", refuse)
    in_time(lambda: [made.handle(record(str(number))) for number in range(1_000)])
    lost, is_full[0] = made.lost, True
    reader = Reader(lambda size: os.read(reading, size))
    reader.start()
    assert made._is_idle.wait(WAIT_S)
    assert (made.lost, made.lost_in_all) == (lost, lost)
    is_full[0] = False
    made.handle(record("after"))
    close(made)
    os.close(writing)
    assert said(reader.ended()) == [*map(str, range(1_000 - lost)), lost, "after"]


def test_a_closed_pipe_is_as_a_full_disk(pipe: tuple[int, int]) -> None:
    """No reader will come."""
    made = writer(pipe[1])
    os.close(pipe[0])
    in_time(lambda: [made.handle(record("x" * 1_000)) for _ in range(20)])
    assert made.lost == 20
    close(made)


def test_a_socket_that_nobody_reads_holds_up_nobody() -> None:
    """As journald's is one."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made = writer(ours.fileno())
    events = [f"{number} {'x' * 1000}" for number in range(200)]
    in_time(lambda: [made.handle(record(event)) for event in events])
    reader = Reader(theirs.recv)
    reader.start()
    close(made)
    assert ours.getblocking(), "others write there too"
    ours.shutdown(socket.SHUT_WR)
    assert said(reader.ended()) == events
    ours.close()
    theirs.close()


def test_a_system_without_threads_loses_lines(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """And no request."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = writer(pipe[1])
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(10):
            made.handle(record("x" * 1_000))
    assert made.lost > 0
    close(made)


def test_standard_error_that_is_no_descriptor_is_written_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a test, or where it is closed."""
    made = log_handler()
    made.setFormatter(JsonFormatter())
    made.handle(record("here"))
    assert said(capsys.readouterr().err.encode()) == ["here"]
