"""The environment of the routers that run beside ours: installed as `requirements/peers.txt` locks it.

    make bench-peers             (python -m benchmarks.peer_environment installs alone)

It is an environment of its own: two of the wheels bring a command of one and the same name, and nothing of
ours imports any of them. A router whose wheel cannot be had on this machine is left out, and named.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
LOCK: Final = ROOT / "requirements/peers.txt"
FOLDER: Final = ROOT / ".tools/peers"
PYTHON: Final = FOLDER / "bin/python"

ROUTERS: Final = ("smg", "vllm-router", "sglang-router")
"""Distributions; all else in the lock is what they need."""

_INSTALLED: Final = FOLDER / ".installed"
"""The lock as it was installed, less what could not be had."""

_OPTIONS: Final = (
    *("--quiet", "--disable-pip-version-check", "--no-compile"),
    *("--no-deps", "--require-hashes", "--only-binary", ":all:"),
)


def entries(lock: str) -> dict[str, str]:
    """Distributions of a lock, each with its lines: version, then hashes."""
    return {
        found[1]: found[0]
        for found in re.finditer(r"^([A-Za-z0-9][\w.-]*)==.*(?:\n[ \t]+.*)*", lock, re.MULTILINE)
    }


def install() -> dict[str, str]:
    """Make the environment what the lock says; at once where it is that already.

    Returns:
        Versions by router, of those that could be had.

    Raises:
        OSError: No environment can be made here.
        subprocess.CalledProcessError: Not even what all of them need can be installed.
    """
    lock = LOCK.read_text(encoding="utf-8")
    locked = entries(lock)
    if not _INSTALLED.exists() or _INSTALLED.read_text(encoding="utf-8") != lock:
        venv.create(FOLDER, clear=True, with_pip=True)
        _pip("".join(f"{lines}\n" for name, lines in locked.items() if name not in ROUTERS))
        missing = [name for name in ROUTERS if not _can_be_had(f"{locked[name]}\n")]
        if not missing:
            _INSTALLED.write_text(lock, encoding="utf-8")
    return {name: _version(locked[name]) for name in ROUTERS if _is_there(name)}


def _version(lines: str) -> str:
    return lines.partition("==")[2].split()[0]


def _is_there(name: str) -> bool:
    return any(FOLDER.glob(f"lib/*/site-packages/{name.replace('-', '_')}-*.dist-info"))


def _can_be_had(lines: str) -> bool:
    try:
        _pip(lines)
    except subprocess.CalledProcessError:
        return False
    return True


def _pip(requirements: str) -> None:
    """Install locked lines.

    Raises:
        subprocess.CalledProcessError: One of them cannot be had; pip has said why.
    """
    wanted = FOLDER / "wanted.txt"
    wanted.write_text(requirements, encoding="utf-8")
    subprocess.run(  # noqa: S603 - our own command
        [str(PYTHON), "-m", "pip", "install", *_OPTIONS, "--requirement", str(wanted)], check=True
    )


def main() -> None:
    """Install; name what there is and what there is not."""
    found = install()
    for name in ROUTERS:
        print(
            f"{name} {found[name]}" if name in found else f"{name}: cannot be had on this machine", flush=True
        )
    sys.exit(0 if found else 1)


if __name__ == "__main__":
    main()
