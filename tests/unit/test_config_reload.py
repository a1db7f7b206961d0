"""Noticing changed files, with real files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from extproc.config.reload import FileWatcher

pytestmark = pytest.mark.asyncio

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


async def test_unchanged_files_are_not_reported(file: Path) -> None:
    """Watching alone calls nobody."""
    async with watching(file) as changes:
        await several_looks()
        assert changes.seen == []


async def test_writing_in_place_is_reported_once(file: Path) -> None:
    """One write, one call."""
    async with watching(file) as changes:
        write(file, "two")
        await changes.next()
        await several_looks()
        assert changes.seen == ["two"]


async def test_file_being_written_is_not_read_half_way(file: Path) -> None:
    """A file that grows from look to look is reported once, when it is complete."""
    async with watching(file) as changes:
        for size in range(30):
            write(file, "x" * size)
            await asyncio.sleep(INTERVAL_S / 5)
        await changes.next()
        await several_looks()
        assert changes.seen == ["x" * 29]


async def test_change_before_start_is_not_lost(file: Path) -> None:
    """What happens between construction and start is reported."""
    changes = Changes(file)
    watcher = FileWatcher([file], changes, interval_s=INTERVAL_S)
    write(file, "two!")
    watcher.start()
    await changes.next()
    await watcher.stop()


async def test_atomic_rename_is_reported(file: Path) -> None:
    """A file of the same size and time moved over the old one is a change: the inode tells."""
    async with watching(file) as changes:
        replace_unnoticeably(file, "two")
        await changes.next()
        assert changes.seen == ["two"]


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


async def test_missing_file_is_waited_for(file: Path) -> None:
    """Nothing is reported while a file is gone; its return is."""
    async with watching(file) as changes:
        remove(file)
        await several_looks()
        assert changes.seen == []
        write(file, "back")
        await changes.next()
        assert changes.seen == ["back"]


async def test_any_of_several_files_counts(file: Path, tmp_path: Path) -> None:
    """A change of the second file is a change, and a file may appear later."""
    second = tmp_path / "clusters.json"
    async with watching(file, second) as changes:
        write(second, "{}")
        await changes.next()
        write(second, "{ }")
        await changes.next()


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
