"""Counters shared by the worker processes of one gateway."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from metadata_center.errors import CapacityError, LayoutError
from metadata_center.load.ledger import Entry
from metadata_center.load.shared_counters import QUIET_S, SharedCounters, create
from metadata_center.load.table import LoadTable
from metadata_center.types import Charge, EndpointKey, RequestId

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")
spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A fresh file for two workers and two endpoints."""
    file = tmp_path / "load"
    create(file, workers=2, capacity=2)
    return file


def leg(
    slot: int, prefill: int, context: int, *, held: bool = True, generated: int = 0
) -> Entry[str, EndpointKey, int]:
    """A leg that is counted at a slot."""
    return Entry("1", 0, 1, A, slot, prefill, context, 0, 0.0, held, generated)


def test_totals_are_the_sum_over_workers(path: Path) -> None:
    """Each worker sees its own load and the other's, under the same slot."""
    one, two = SharedCounters(path, 0), SharedCounters(path, 1)
    one.put(leg(one.place(A), 10, 20))
    two.put(leg(two.place(B), 1, 2, held=False))
    two.put(leg(two.place(A), 30, 40, generated=7))

    expected = [[2, 1], [2, 0], [40, 0], [60, 2], [7, 0]]
    assert one.totals(one.slots([A, B])) == expected
    assert two.totals(two.slots([A, B])) == expected


def test_many_totals_in_any_order(tmp_path: Path) -> None:
    """Slots that follow each other are read as one piece, others one by one: the same counts."""
    create(tmp_path / "load", workers=2, capacity=200)
    one, two = (SharedCounters(tmp_path / "load", worker) for worker in range(2))
    keys = [EndpointKey(f"10.0.0.9:{port}") for port in range(150)]
    slots = one.slots(keys)
    for port, key in enumerate(keys):
        one.put(leg(one.place(key), port, 2 * port))
        two.put(leg(two.place(key), 1, 1))
    one.add_others(lambda key: (int(key[-1]), 0, 0, 0, 0))
    in_order, turned = one.totals(slots), one.totals(slots[::-1])
    assert slots == tuple(range(slots[0], slots[0] + 150))
    assert list(in_order[0]) == [2 + port % 10 for port in range(150)]
    assert list(in_order[2]) == [port + 1 for port in range(150)]
    assert [list(kind) for kind in turned] == [list(kind)[::-1] for kind in in_order]
    assert [list(kind) for kind in one.totals(slots)] == [list(kind) for kind in in_order]


def test_a_restarted_worker_starts_from_zero(path: Path) -> None:
    """Attaching zeroes the worker's own row, frees its claims and leaves the other row alone."""
    one, two = SharedCounters(path, 0), SharedCounters(path, 1)
    one.put(leg(one.place(A), 1, 1))
    two.put(leg(two.place(A), 5, 5))
    two.put(leg(two.place(B), 5, 5))

    again = SharedCounters(path, 1)

    assert one.totals(one.slots([A])) == [[1], [1], [1], [1], [0]]
    assert again.place(EndpointKey("10.0.0.3:8000")) == two.place(B)


def test_a_slot_is_reused_only_when_no_worker_needs_it(path: Path) -> None:
    """A slot stays with its endpoint while any worker claims it or any request is counted there."""
    one, two = SharedCounters(path, 0), SharedCounters(path, 1)
    new = EndpointKey("10.0.0.3:8000")
    slots = one.slots([A, B])
    assert two.slots([A, B]) == slots
    kept = leg(two.place(B), 0, 0, held=False)
    two.put(kept)

    one.retain([])
    with pytest.raises(CapacityError):
        one.place(new)
    two.retain([A])
    with pytest.raises(CapacityError):
        one.place(new)
    two.take(kept)
    assert one.place(new) == slots[1]
    assert one.totals(one.slots([new])) == [[0]] * 5
    with pytest.raises(CapacityError):
        two.place(B)


def test_a_name_torn_by_a_killed_worker_is_not_found(path: Path) -> None:
    """A name in a slot that is not claimed and nothing loads does not attract its endpoint."""
    one = SharedCounters(path, 0)
    one._names[1] = A.encode()

    assert one.place(A) == 0
    assert one.place(B) == 1


def test_two_load_tables_share_their_view(path: Path) -> None:
    """A charge of one worker weighs in the other's decision and goes with its release."""
    one, two = LoadTable(SharedCounters(path, 0)), LoadTable(SharedCounters(path, 1))
    with one.lock():
        one.charge(Charge(RequestId("1"), A, 100, 200), 0.0, None)

    assert two.view(two.slots([A])).prefill_tokens == [100]
    assert two.decoding(A) == 0
    one.release_prefill(RequestId("1"))
    assert (one.decoding(A), two.decoding(A)) == (1, 1)
    one.release(RequestId("1"), 1.0)
    assert two.decoding(A) == 0
    assert two.view(two.slots([A])).requests == [0]


def _decide(path: Path, worker: int, rounds: int, pipe: Connection) -> None:
    """Charge the least loaded endpoint `rounds` times; send the largest difference ever left behind."""
    table = LoadTable(SharedCounters(path, worker))
    slots = table.slots([A, B])
    pipe.send(0)
    pipe.recv()
    apart = 0
    for number in range(rounds):
        with table.lock():
            requests = table.view(slots).requests
            least = requests.index(min(requests))
            table.charge(Charge(RequestId(f"{worker}-{number}"), (A, B)[least], 1, 1), 0.0, None)
            first, second = table.view(slots).requests
            apart = max(apart, abs(first - second))
    pipe.send(apart)


def test_decisions_of_two_processes_do_not_interleave(path: Path) -> None:
    """Two processes that take the least loaded endpoint under the lock never leave them two apart."""
    pipes, workers = [], []
    for worker in (0, 1):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_decide, args=(path, worker, 2000, theirs))
        process.start()
        pipes.append(ours)
        workers.append(process)
        assert ours.poll(20)
        ours.recv()
    for pipe in pipes:
        pipe.send(True)

    for pipe, process in zip(pipes, workers, strict=True):
        assert pipe.poll(20)
        assert pipe.recv() == 1
        process.join(20)
    left = np.memmap(path, np.int64, mode="r", offset=64, shape=(2, 5, 2))
    assert left.sum(axis=0).tolist() == [[2000, 2000]] * 4 + [[0, 0]]


def _stay(path: Path, where: str, ready: Connection) -> None:
    """Charge one request and stay inside a lock until told to go on, or for good; then decide once more."""
    table = LoadTable(SharedCounters(path, 1))
    slots = table.slots([A])
    counters = table._counters
    with counters.lock() if where == "decision" else counters.slots_lock():
        table.charge(Charge(RequestId("stays"), A, 1, 1), 0.0, None)
        ready.send(True)
        ready.recv()
    with table.lock():
        ready.send(table.view(slots).requests[0])
        ready.recv()
    table.release(RequestId("stays"), 1.0)
    ready.send(True)


@contextlib.contextmanager
def _inside(path: Path, where: str) -> Iterator[tuple[Connection, BaseProcess]]:
    """Worker 1, in that lock; killed with the block if it still runs."""
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_stay, args=(path, where, theirs))
    process.start()
    try:
        assert ours.poll(20)
        ours.recv()
        yield ours, process
    finally:
        process.kill()
        process.join(20)


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize("where", ["decision", "slots"])
def test_a_killed_holder_releases_the_lock(path: Path, where: str) -> None:
    """The lock of a worker killed inside it is free at once; its load goes when its row is taken again."""
    with _inside(path, where) as (_, process):
        _signal(process, signal.SIGKILL)
        process.join(20)

    one = SharedCounters(path, 0)
    with one.lock(), one.lock():
        assert one._lock._is_held
        assert one.totals(one.slots([A])) == [[1], [1], [1], [1], [0]]
    SharedCounters(path, 1)
    assert one.totals(one.slots([A])) == [[0]] * 5


def _go_on(path: Path, pipe: Connection) -> None:
    """Worker 0 charges and releases a request, as often as it is told to; sends what it saw."""
    counters = SharedCounters(path, 0)
    table = LoadTable(counters)
    slots = table.slots([A, B])
    pipe.send(True)
    while pipe.recv():
        with table.lock():
            table.charge(Charge(RequestId("goes on"), B, 1, 1), 0.0, None)
            seen = table.view(slots).requests
        table.release(RequestId("goes on"), 1.0)
        pipe.send((seen, counters._lock._is_held))


def test_a_stopped_holder_does_not_stop_the_others(path: Path) -> None:
    """While a worker is stopped inside its decision the others decide without the lock, and with it after.

    They see what it charged, and nothing is counted twice or lost.
    """
    ours, theirs = spawn.Pipe()
    other = spawn.Process(target=_go_on, args=(path, theirs))
    other.start()
    try:
        assert ours.poll(20)
        ours.recv()
        with _inside(path, "decision") as (pipe, process):
            _signal(process, signal.SIGSTOP)
            for _ in range(100):
                ours.send(True)
                assert ours.poll(20), "it waits for one that does not go on"
                assert ours.recv() == ([1, 1], False)
            _signal(process, signal.SIGCONT)
            pipe.send(True)
            assert pipe.poll(20)
            assert pipe.recv() == 1
            pipe.send(True)
            assert pipe.poll(20)
            pipe.recv()
            ours.send(True)
            assert ours.poll(20)
            assert ours.recv() == ([0, 1], True)
    finally:
        other.kill()
        other.join(20)
    left = np.memmap(path, np.int64, mode="r", offset=64, shape=(2, 5, 2))
    assert not left.any()


def test_decisions_without_the_lock_are_counted_and_told_of_seldom(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever has the lock keeps it, goes on, and keeps it again: each decision counts, one line a minute."""
    table = LoadTable(SharedCounters(path, 0))
    told = "another worker does not go on: deciding beside it, not one after the other"
    with path.open("rb") as other:

        def decide(times: int) -> None:
            for _ in range(times):
                with table.lock(), table.lock():
                    pass

        decide(1)
        assert table.unlocked == 0
        for round_ in (1, 2):
            fcntl.flock(other, fcntl.LOCK_EX)
            decide(3)
            fcntl.flock(other, fcntl.LOCK_UN)
            decide(2)
            assert table.unlocked == 3 * round_
        assert [record.message for record in caplog.records] == [told]
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + QUIET_S)
        fcntl.flock(other, fcntl.LOCK_EX)
        decide(1)
        assert [record.message for record in caplog.records] == [told, told]
        assert caplog.records[-1].__dict__["decisions"] == table.unlocked == 7


def test_slots_are_not_given_out_beside_a_stopped_worker(path: Path) -> None:
    """Two that take a free slot at once would share it: a new endpoint has none for now, the others go on."""
    one = SharedCounters(path, 0)
    with _inside(path, "slots") as (pipe, process):
        one._slots[B] = 1  # as if it had been claimed before
        _signal(process, signal.SIGSTOP)
        for _ in range(3):
            with pytest.raises(CapacityError, match="does not go on"):
                one.place(A)
            with one.lock():
                assert one._lock._is_held
                assert one.totals(one.slots([B])) == [[0]] * 5
        assert set(one._slots) == {B}
        _signal(process, signal.SIGCONT)
        pipe.send(True)
        assert pipe.poll(20)
        assert one.place(A) == 0


def test_create_leaves_workers_of_an_older_gateway_alone(path: Path) -> None:
    """A new file replaces the old one; older mappings stay, and only the owner may read it."""
    old = SharedCounters(path, 0)
    old.put(leg(old.place(A), 1, 1))

    create(path, workers=1)

    new = SharedCounters(path, 0)
    assert new.totals(new.slots([A])) == [[0]] * 5
    assert old.totals(old.slots([A])) == [[1], [1], [1], [1], [0]]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["load"]


def test_nothing_is_written_through_a_link(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links where the file is to be: the new one replaces its link, and no link is followed to a victim."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _size: "guessed")
    fresh = path.with_name(f"{path.name}.guessed")
    fresh.symlink_to(victim)
    with pytest.raises(FileExistsError):
        create(path, workers=1)
    fresh.unlink()
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(LayoutError):
        SharedCounters(path, 0)
    create(path, workers=1)
    assert not path.is_symlink()
    assert victim.read_text() == "precious"


def test_files_of_another_shape_are_refused(path: Path, tmp_path: Path) -> None:
    """A missing, foreign or truncated file, or one without the row asked for, is a `LayoutError`."""
    with pytest.raises(LayoutError):
        SharedCounters(path, 2)
    with pytest.raises(LayoutError):
        SharedCounters(tmp_path / "missing", 0)
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"x" * 1000)
    with pytest.raises(LayoutError):
        SharedCounters(foreign, 0)
    os.truncate(path, 100)
    with pytest.raises(LayoutError):
        SharedCounters(path, 0)


def test_close_gives_the_file_back(path: Path) -> None:
    """After `close` the descriptor is gone; the counters can still be read."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    counters = SharedCounters(path, 0)
    counters.put(leg(counters.place(A), 1, 1))
    opened = len(list(Path("/proc/self/fd").iterdir()))
    counters.close()

    assert len(list(Path("/proc/self/fd").iterdir())) == opened - 1
    assert opened > before
    assert counters.totals(counters.slots([A])) == [[1], [1], [1], [1], [0]]


def test_all_of_its_space_is_taken_at_once(tmp_path: Path) -> None:
    """A worker that first writes a page of a full disk later would be ended by SIGBUS."""
    create(tmp_path / "counters", 3)
    made = (tmp_path / "counters").stat()
    assert made.st_blocks * 512 >= made.st_size > 1_000_000


def test_a_full_disk_is_said_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left there."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fails)
    with pytest.raises(OSError, match=r"No space left on device: .*counters'"):
        create(tmp_path / "counters", 3)
    assert not list(tmp_path.iterdir())
