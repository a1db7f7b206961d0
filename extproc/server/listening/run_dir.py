"""The folder of the sockets and the shared load table: found, made ours, and closed to everybody else.

A user who can put a socket of his own in place of `gw0.sock` gets every prompt from Envoy, and chooses.

Rules:
    1. The folder is a directory, no link, owned by this user, and closed to others. If it is ours and open,
       it is closed.
    2. No other user may rename it away: each folder above it is owned by root or this user, and writable by
       others only with the sticky bit, as /tmp is.
    3. One gateway lives in it: a lock that the kernel drops with its process.
    4. Sockets are bound under a umask, so that they are never open, not even for the moment until a chmod.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from extproc.config.collisions import in_folder
from extproc.config.document import dotted
from extproc.config.schema import Config
from extproc.config.sections.listening import MAX_RUN_DIR_BYTES, Server
from extproc.errors import ConfigError

SYSTEM_DIR = Path("/run/tokenway")
"""For a system service: systemd makes it (`RuntimeDirectory=tokenway`), root may."""

_LOCK_FILE = "lock"

Identity = tuple[int, int]
"""Of a file: device and inode."""

_SOCKET_NAME = re.compile(r"(?:gw|admin|bus)\d+\.sock")
_PRIVATE = 0o700
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def run_dir(server: Server, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the gateway lives: `server.run_dir`, or the place that this user has for such things.

    `$XDG_RUNTIME_DIR/tokenway`; else /run/tokenway for root, and for a user who owns it; else
    /tmp/tokenway-UID. Every `tokenway` command of a user finds the same one.
    """
    if server.run_dir is not None:
        return Path(server.run_dir)
    user = os.geteuid()
    given = Path(environment.get("XDG_RUNTIME_DIR", ""))
    if given.is_absolute() and _owner(given) == user:
        return given / "tokenway"
    if user == 0 or _owner(SYSTEM_DIR) == user:
        return SYSTEM_DIR
    return Path(f"/tmp/tokenway-{user}")  # noqa: S108 - sticky, and held to the rules above


def home_of(config: Config, path: Path) -> Path:
    """`run_dir`, if nothing else is to be where its files are.

    Args:
        config: The configuration.
        path: Where it came from, for messages.

    Raises:
        ConfigError: A Unix socket of the configuration's has the path of one of the gateway's own files.
    """
    folder = run_dir(config.server)
    problems = in_folder(config, str(folder.absolute()))
    if problems:
        raise ConfigError(str(path), [f"{dotted(location)}: {text}" for location, text in problems])
    return folder


def prepare(folder: Path) -> None:
    """Make the folder, or make sure that it is ours alone.

    Raises:
        ConfigError: It is not and cannot be made so; says why and what to do.
    """
    if len(os.fsencode(folder)) > MAX_RUN_DIR_BYTES:  # $XDG_RUNTIME_DIR's; a configuration's was looked at
        raise _refused(folder, f"its sockets would have too long a name; accepted: {MAX_RUN_DIR_BYTES} bytes")
    folder = folder.absolute()  # not resolved: a link in its place is refused, not followed
    try:
        with closed_to_others():  # `mode` is for the last folder, those above it follow the umask
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        found = folder.lstat()
    except FileExistsError:
        raise _refused(folder, "it is not a directory") from None
    except OSError as error:
        raise _refused(folder, f"it cannot be made: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise _refused(folder, f"it is a symbolic link; accepted: the folder itself, {folder.resolve()}")
    if found.st_uid != os.geteuid():
        raise _refused(folder, f"it belongs to user {found.st_uid}, not to {os.geteuid()}, who runs Tokenway")
    _check_parents(folder)
    if found.st_mode & _OTHERS:
        try:
            folder.chmod(_PRIVATE)
        except OSError as error:
            raise _refused(folder, f"it cannot be closed to others: {error.strerror}") from error


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Be the one gateway that lives in a folder, until the block or the process ends.

    Raises:
        ConfigError: Another one does.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        held = os.open(folder / _LOCK_FILE, flags, 0o600)
    except OSError as error:
        raise _refused(folder, f"its lock cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise _refused(folder, "another gateway runs there; accepted: a folder of its own for each") from None
    try:
        yield
    finally:
        os.close(held)


@contextlib.contextmanager
def closed_to_others() -> Iterator[None]:
    """Files and sockets made in the block are this user's alone.

    Never await in it: the umask is the process's.
    """
    before = os.umask(_OTHERS)
    try:
        yield
    finally:
        os.umask(before)


class Residence:
    """A gateway's place in its folder; a part of its process.

    Args:
        folder: Where.
        is_alone: False for one of several workers, whose supervisor holds the lock.
    """

    def __init__(self, folder: Path, *, is_alone: bool) -> None:
        self._folder = folder
        self._is_alone = is_alone
        self._held = contextlib.ExitStack()
        self._lock_identity: Identity | None = None

    def start(self) -> None:
        """Make the folder ours.

        Raises:
            ConfigError: It cannot be, or another gateway lives there.
        """
        prepare(self._folder)
        if self._is_alone:
            self._held.enter_context(lock(self._folder))
            self._lock_identity = identity_of(self.lock_path)

    @property
    def lock_path(self) -> Path:
        """What says that the folder is ours."""
        return self._folder / _LOCK_FILE

    def renew(self) -> None:
        """Somebody took the folder away, or all that was in it: make it ours again.

        Raises:
            ConfigError: It cannot be, or another gateway has come there meanwhile.
        """
        held, self._held = self._held, contextlib.ExitStack()
        try:
            self.start()
        finally:
            held.close()  # of a file that has no name any more

    def stop(self) -> None:
        """Leave; nothing but the lock stays, also of workers that were killed."""
        with self._held:
            if self._lock_identity is not None and identity_of(self.lock_path) in (None, self._lock_identity):
                _clear(self._folder)


def socket_path(folder: Path, index: int) -> Path:
    """The gRPC socket of a worker."""
    return folder / f"gw{index}.sock"


def admin_path(folder: Path, index: int) -> Path:
    """The admin socket of a worker, for its supervisor."""
    return folder / f"admin{index}.sock"


def bus_path(folder: Path, index: int) -> Path:
    """The socket of a worker for the other workers."""
    return folder / f"bus{index}.sock"


def counters_path(folder: Path) -> Path:
    """The load of all workers, in shared memory."""
    return folder / "load.counters"


def _clear(folder: Path) -> None:
    """Take away what processes of ours made; whoever calls has the lock, and they have ended."""
    with contextlib.suppress(FileNotFoundError):  # somebody took the folder away
        for path in folder.iterdir():
            if path == counters_path(folder) or _SOCKET_NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)


def identity_of(path: Path) -> Identity | None:
    """Which file a name leads to, links not followed; None if there is none, or it cannot be seen."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _check_parents(folder: Path) -> None:
    """Rule 2, along the path as written and as it leads."""
    for path in dict.fromkeys([*folder.parents, *folder.resolve().parents]):
        found = path.lstat()
        if found.st_uid not in (0, os.geteuid()):
            raise _refused(folder, f"{path} belongs to user {found.st_uid}, who could replace it")
        if stat.S_ISLNK(found.st_mode):
            continue  # only the owner of a link can change it, and its folder is looked at as well
        open_to = stat.S_IWOTH | (0 if _is_private_group(found.st_gid) else stat.S_IWGRP)
        if found.st_mode & open_to and not found.st_mode & stat.S_ISVTX:
            raise _refused(
                folder,
                f"{path} is writable by others, who could replace it (mode {stat.S_IMODE(found.st_mode):o}); "
                f"accepted: `chmod go-w` or `chmod +t` for {path}, or a folder elsewhere",
            )


def _is_private_group(gid: int) -> bool:
    """True for root's group, and for one that a user has for himself, of his own number."""
    return gid == 0 or gid == os.getegid() == os.geteuid()


def _owner(folder: Path) -> int | None:
    try:
        found = folder.lstat()
    except OSError:
        return None
    return found.st_uid if stat.S_ISDIR(found.st_mode) else None


def _refused(folder: Path, why: str) -> ConfigError:
    return ConfigError(str(folder), [f"server.run_dir cannot be used: {why}"])
