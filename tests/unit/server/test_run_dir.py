"""The folder that Envoy trusts: ours, closed to others, and no other user's to replace."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from extproc.config.schema import Config
from extproc.config.sections.listening import Server
from extproc.errors import ConfigError
from extproc.server.listening import run_dir as module
from extproc.server.listening.run_dir import (
    Residence,
    admin_path,
    bus_path,
    closed_to_others,
    counters_path,
    lock,
    prepare,
    run_dir,
    socket_path,
)
from tokenway.cli.bootstrap import sockets_of

NOBODY = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run directory that is not there yet."""
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """Modes are those the product asks for."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    """Permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def why(folder: Path) -> str:
    """The one problem of a refused folder."""
    with pytest.raises(ConfigError) as refused:
        prepare(folder)
    assert refused.value.path == str(folder)
    (problem,) = refused.value.problems
    assert problem.startswith("server.run_dir cannot be used: ")
    return problem


def test_missing_folder_is_made_private(folder: Path) -> None:
    """With those above it, and whatever the umask."""
    prepare(folder / "a" / "b")
    assert mode(folder) == mode(folder / "a") == mode(folder / "a" / "b") == 0o700


def test_a_folder_whose_sockets_would_have_no_name_is_refused(folder: Path) -> None:
    """Of $XDG_RUNTIME_DIR, say; the kernel's own word for it names neither folder nor setting."""
    assert "too long a name; accepted: 94 bytes" in why(folder / ("r" * 90))


def test_envoy_finds_the_sockets_wherever_it_is_started() -> None:
    """A relative folder is the one seen from where the bootstrap was made."""
    assert sockets_of(Config(server=Server(run_dir="run"))) == [f"{Path.cwd()}/run/gw0.sock"]


@pytest.mark.parametrize("open_mode", [0o777, 0o770, 0o755, 0o701, 0o2770])
def test_own_folder_that_is_open_is_closed(folder: Path, open_mode: int) -> None:
    """It is ours to close."""
    folder.mkdir()
    folder.chmod(open_mode)
    prepare(folder)
    assert mode(folder) & 0o077 == 0


def test_link_is_refused(folder: Path, tmp_path: Path) -> None:
    """Even to a folder that would do: the owner of the link chooses where it leads."""
    (tmp_path / "real").mkdir(mode=0o700)
    folder.symlink_to("real")
    assert "symbolic link" in why(folder)


@pytest.mark.parametrize("target", ["nowhere", "file"])
def test_what_is_no_directory_is_refused(folder: Path, target: str) -> None:
    """A dangling link and a file."""
    if target == "file":
        folder.write_text("")
    else:
        folder.symlink_to("nowhere")
    assert "not a directory" in why(folder)


@as_root
@pytest.mark.parametrize("open_mode", [0o700, 0o777])
def test_folder_of_another_user_is_refused(folder: Path, open_mode: int) -> None:
    """Whatever its mode: its owner can change it."""
    folder.mkdir()
    folder.chmod(open_mode)
    os.chown(folder, NOBODY, NOBODY)
    assert f"belongs to user {NOBODY}" in why(folder)


@as_root
def test_folder_below_another_users_is_refused(folder: Path) -> None:
    """He could rename ours away and put his own there."""
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    assert f"{folder} belongs to user {NOBODY}" in why(folder / "tokenway")


@as_root
def test_way_through_another_users_link_is_refused(folder: Path, tmp_path: Path) -> None:
    """He could turn it to another place, which is fine as well."""
    (tmp_path / "real").mkdir(mode=0o700)
    folder.symlink_to("real")
    os.chown(folder, NOBODY, NOBODY, follow_symlinks=False)
    assert f"belongs to user {NOBODY}" in why(folder / "tokenway")


@pytest.mark.parametrize("open_mode", [0o777, 0o757, 0o775])
def test_folder_below_one_that_others_may_write_to_is_refused(folder: Path, open_mode: int) -> None:
    """Others, or a group; the sticky bit keeps them from renaming what is not theirs."""
    folder.mkdir()
    group = os.getegid() if os.geteuid() else 1  # one that is not private
    os.chown(folder, -1, group)
    folder.chmod(open_mode)
    if open_mode == 0o775 and os.geteuid() and os.getegid() == os.geteuid():
        pytest.skip("this user's group is private")
    assert f"{folder} is writable by others" in why(folder / "tokenway")
    folder.chmod(open_mode | stat.S_ISVTX)
    prepare(folder / "tokenway")


def test_two_gateways_do_not_share_a_folder(folder: Path) -> None:
    """The second is refused while the first lives, killed or not, and not afterwards."""
    prepare(folder)
    script = (
        "import sys, time; from pathlib import Path; from extproc.server.listening.run_dir import lock\n"
        "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another gateway runs there"), lock(folder):
            pass
    finally:
        first.kill()
        first.communicate()
    for _ in range(2):
        with lock(folder):
            assert mode(folder / "lock") == 0o600


def test_lock_is_not_opened_through_a_link(folder: Path, tmp_path: Path) -> None:
    """Nothing is made where it leads."""
    prepare(folder)
    (folder / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="its lock cannot be opened"), lock(folder):
        pass
    assert not (tmp_path / "victim").exists()


def test_a_gateway_that_leaves_takes_its_files_along(folder: Path) -> None:
    """Those of its workers too; not what another made, nor as one that found the folder taken."""
    first, second = Residence(folder, is_alone=True), Residence(folder, is_alone=True)
    first.start()
    made = [socket_path(folder, 0), admin_path(folder, 12), bus_path(folder, 1), counters_path(folder)]
    others = {"lock", "other.sock", "gw.sock"}
    for path in (*made, *(folder / name for name in others)):
        path.touch()
    with pytest.raises(ConfigError):
        second.start()
    second.stop()
    Residence(folder, is_alone=False).stop()
    assert all(path.exists() for path in made)
    first.stop()
    assert {path.name for path in folder.iterdir()} == others


def test_a_folder_that_somebody_took_away_is_left_all_the_same(folder: Path) -> None:
    """The gateway stops as it would."""
    residence = Residence(folder, is_alone=True)
    residence.start()
    (folder / "lock").unlink()
    folder.rmdir()
    residence.stop()
    assert not folder.exists()


def test_umask_closes_what_is_made_and_is_put_back(tmp_path: Path) -> None:
    """Also when the block fails."""
    with contextlib.suppress(ValueError), closed_to_others():
        (tmp_path / "in").touch()
        raise ValueError("no")
    (tmp_path / "out").touch()
    assert (mode(tmp_path / "in"), mode(tmp_path / "out")) == (0o600, 0o666)


def test_named_folder_is_taken(tmp_path: Path) -> None:
    """Whatever the environment says."""
    assert run_dir(Server(run_dir="/srv/x"), {"XDG_RUNTIME_DIR": str(tmp_path)}) == Path("/srv/x")


@pytest.mark.parametrize(
    ("given", "user", "system", "expected"),
    [
        ("own", 1000, None, "own/tokenway"),
        ("own", 0, None, "own/tokenway"),
        ("relative", 1000, None, "/tmp/tokenway-1000"),
        ("gone", 1000, None, "/tmp/tokenway-1000"),
        ("else's", 1000, None, "/tmp/tokenway-1000"),
        ("", 0, None, "/run/tokenway"),
        ("", 1000, 1000, "/run/tokenway"),
        ("", 1000, 0, "/tmp/tokenway-1000"),
    ],
)
def test_default_is_the_users_own_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    user: int,
    system: int | None,
    expected: str,
) -> None:
    """The session's folder if it is his, the system's if he may use it, else one named after him."""
    owners = {tmp_path / "own": user, tmp_path / "else's": user + 1, module.SYSTEM_DIR: system}
    monkeypatch.setattr(module, "_owner", owners.get)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    value = {"": "", "relative": "own"}.get(given, str(tmp_path / given))
    found = run_dir(Server(), {"XDG_RUNTIME_DIR": value} if value else {})
    assert found == (tmp_path / expected if expected.startswith("own") else Path(expected))


def test_a_folder_that_cannot_be_closed_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that is read-only."""

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(ConfigError, match="it cannot be closed to others: Read-only file system"):
        prepare(tmp_path)
