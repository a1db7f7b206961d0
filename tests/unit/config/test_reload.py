"""Noticing changed files, with real files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from extproc.config import reload
from extproc.config.reload import FileWatcher, look

INTERVAL_S = 0.005


class Changes:
    """A call-back that remembers what was in the file at each call."""

    def __init__(self, path: Path) -> None:
        self.seen: list[str] = []
        self._path = path
        self._called = asyncio.Event()

    def __call__(self) -> None:
        """Called by the watcher."""
        self.seen.append(read(self._path))
        self._called.set()

    async def next(self) -> None:
        """Wait for a call since the last wait."""
        async with asyncio.timeout(5):
            await self._called.wait()
        self._called.clear()


async def several_looks() -> None:
    """Give the watcher time for a false report."""
    await asyncio.sleep(10 * INTERVAL_S)


def read(path: Path) -> str:
    """The file's text, or "gone"."""
    return path.read_text() if path.exists() else "gone"


def write(path: Path, text: str) -> None:
    """Write in place."""
    path.write_text(text)


def replace_unnoticeably(path: Path, text: str) -> None:
    """Move a new file over the old one, with the old one's modification time."""
    before = path.stat()
    fresh = path.with_name("fresh")
    fresh.write_text(text)
    os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
    fresh.replace(path)


def remove(path: Path) -> None:
    """Delete the file."""
    path.unlink()


@asynccontextmanager
async def watching(*paths: Path) -> AsyncIterator[Changes]:
    """A started watcher's changes; the first path is the one read."""
    changes = Changes(paths[0])
    watcher = FileWatcher(paths, changes, interval_s=INTERVAL_S)
    watcher.start()
    try:
        yield changes
    finally:
        await watcher.stop()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with text "one"."""
    path = tmp_path / "f.yaml"
    path.write_text("one")
    return path


@pytest.mark.asyncio
async def test_unchanged_files_are_not_reported(file: Path) -> None:
    """Watching alone calls no listener."""
    async with watching(file) as changes:
        await several_looks()
        assert changes.seen == []


@pytest.mark.asyncio
async def test_writing_in_place_is_reported_once(file: Path) -> None:
    """One write, one call."""
    async with watching(file) as changes:
        write(file, "two")
        await changes.next()
        await several_looks()
        assert changes.seen == ["two"]


@pytest.mark.asyncio
async def test_file_being_written_is_not_read_half_way(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that grows from look to look is reported once, when it is complete."""
    monkeypatch.setattr(reload, "_MAX_RESTLESS_LOOKS", 1000)
    async with watching(file) as changes:
        for size in range(30):
            write(file, "x" * size)
            await asyncio.sleep(INTERVAL_S / 5)
        await changes.next()
        await several_looks()
        assert changes.seen == ["x" * 29]


@pytest.mark.asyncio
async def test_change_before_start_is_not_lost(file: Path) -> None:
    """What happens between construction and start is reported."""
    changes = Changes(file)
    watcher = FileWatcher([file], changes, interval_s=INTERVAL_S)
    write(file, "two!")
    watcher.start()
    await changes.next()
    await watcher.stop()


@pytest.mark.asyncio
async def test_atomic_rename_is_reported(file: Path) -> None:
    """A file of the same size and time moved over the old one is a change: the inode shows it."""
    async with watching(file) as changes:
        replace_unnoticeably(file, "two")
        await changes.next()
        assert changes.seen == ["two"]


@pytest.mark.asyncio
async def test_config_map_swap_is_reported(tmp_path: Path) -> None:
    """Kubernetes swaps a directory symlink that the file's symlink leads through."""
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "f.yaml").write_text(version)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "f.yaml").symlink_to("..data/f.yaml")
    async with watching(tmp_path / "f.yaml") as changes:
        (tmp_path / "..data_tmp").symlink_to("v2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        await changes.next()
        assert changes.seen == ["v2"]


def dangle(path: Path) -> None:
    """A symlink to nowhere in the file's place."""
    path.unlink()
    path.symlink_to("nowhere")


def make_a_folder(path: Path) -> None:
    """A folder in the file's place."""
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path) -> None:
    """A pipe in the file's place, without a writer: opening it would never return."""
    path.unlink()
    os.mkfifo(path)


def restore(path: Path, kept: Path) -> None:
    """The file back in its place."""
    if path.is_dir():
        path.rmdir()
    kept.replace(path)


@pytest.mark.asyncio
@pytest.mark.parametrize("spoil", [remove, dangle, make_a_folder, make_a_pipe])
async def test_file_that_vanishes_is_reported_and_so_is_its_return(
    file: Path, spoil: Callable[[Path], None]
) -> None:
    """Whatever takes the file's place is one change, and the same file moved back another."""
    kept = file.with_name("kept")
    kept.hardlink_to(file)
    reports: list[str | None] = []
    called = asyncio.Event()

    def report() -> None:
        reports.append(look(file).problem)
        called.set()

    watcher = FileWatcher([file], report, interval_s=INTERVAL_S)
    watcher.start()
    async with asyncio.timeout(5):
        spoil(file)
        await called.wait()
        await several_looks()
        assert len(reports) == 1
        assert reports[0]
        called.clear()
        restore(file, kept)
        await called.wait()
    await watcher.stop()
    assert reports[1:] == [None]


@pytest.mark.asyncio
async def test_short_absence_is_not_reported(file: Path) -> None:
    """An editor that deletes and writes anew between two looks leaves one change."""
    async with watching(file) as changes:
        remove(file)
        write(file, "two")
        await changes.next()
        await several_looks()
        assert changes.seen == ["two"]


@pytest.mark.asyncio
async def test_same_size_edits_within_one_tick_of_the_clock_are_distinguished(file: Path) -> None:
    """Two edits of which a look sees nothing but the content are two changes."""
    async with watching(file) as changes:
        for text in ("two", "six", "ten"):
            write(file, text)
            os.utime(file, ns=(0, 0))  # goes back, and stays the same
            await changes.next()
        assert changes.seen == ["two", "six", "ten"]


def test_content_of_a_young_file_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file changed just now is not known by its times, slower than edits; an old one is."""
    before = look(file)
    found = file.stat()
    file.write_text("six")
    monkeypatch.setattr(Path, "stat", lambda _path: found)  # a clock that has not ticked in between
    assert look(file, before) != before
    monkeypatch.setattr("time.time", lambda: found.st_ctime + 3)
    assert look(file, before) is before


@pytest.mark.asyncio
async def test_file_edited_without_end_is_read_all_the_same(file: Path) -> None:
    """A file that never looks the same twice is reported after eight looks, not never."""
    async with watching(file) as changes:
        async with asyncio.timeout(5):
            while not changes.seen:
                write(file, "x" * (1 + len(read(file)) % 1000))
                await asyncio.sleep(INTERVAL_S / 5)


@pytest.mark.asyncio
async def test_files_can_be_exchanged_from_the_call_back(file: Path, tmp_path: Path) -> None:
    """The new files count from then on, and the old ones no more."""
    other = tmp_path / "other"
    called = asyncio.Event()

    def follow() -> None:
        watcher.watch({other: look(other)})
        called.set()

    watcher = FileWatcher([file], follow, interval_s=INTERVAL_S)
    watcher.start()
    async with asyncio.timeout(5):
        write(file, "two")
        await called.wait()
        called.clear()
        write(file, "three")
        await several_looks()
        assert not called.is_set()
        write(other, "comes later")
        await called.wait()
    await watcher.stop()


@pytest.mark.asyncio
async def test_any_of_several_files_counts(file: Path, tmp_path: Path) -> None:
    """A change of the second file is a change, and a file may appear later."""
    second = tmp_path / "clusters.json"
    async with watching(file, second) as changes:
        write(second, "{}")
        await changes.next()
        write(second, "{ }")
        await changes.next()


@pytest.mark.asyncio
async def test_failing_call_back_does_not_end_the_watch(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in the call-back is logged, and the next change is still reported."""
    called = asyncio.Event()

    def fail() -> None:
        called.set()
        raise ValueError("bad file")

    watcher = FileWatcher([file], fail, interval_s=INTERVAL_S)
    watcher.start()
    async with asyncio.timeout(5):
        for content in ("second", "third"):
            write(file, content)
            await called.wait()
            called.clear()
    await watcher.stop()
    assert caplog.messages == ["config change call-back failed"] * 2


@pytest.mark.asyncio
async def test_stop_ends_the_watch_and_leaves_no_task(file: Path) -> None:
    """After stop nothing is called, no task remains, and stopping again is harmless."""
    changes = Changes(file)
    watcher = FileWatcher([file], changes, interval_s=INTERVAL_S)
    watcher.start()
    with pytest.raises(RuntimeError):
        watcher.start()
    await watcher.stop()
    await watcher.stop()
    write(file, "later")
    await several_looks()
    assert changes.seen == []
    assert asyncio.all_tasks() == {asyncio.current_task()}
