"""The Containerfile without a builder of images: read, and its commands run in a plain folder.

    python -m testbed.containerfile FOLDER [PYTHON] [NAME=VALUE]...

leaves in FOLDER/opt/tokenway what the image has there, by the very commands, with the folder before their
absolute paths. PYTHON is the builder's, else the one that runs this.

Rules:
    1. Only what the Containerfile uses is understood; anything else is refused.
    2. COPY takes what .containerignore leaves of the repository, as a builder would.
    3. NAME=VALUE is a builder's `--build-arg`; what is not given has the default of its ARG.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed.processes import REPOSITORY

CONTAINERFILE: Final = REPOSITORY / "Containerfile"
IGNORE: Final = REPOSITORY / ".containerignore"

_KNOWN: Final = frozenset({"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"})
_OWN_PATHS: Final = re.compile(r"(?<![\w./-])(?=/(?:build|source|wheel|opt/tokenway)\b)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line."""

    name: str
    words: str


def instructions(text: str) -> list[Instruction]:
    """What a Containerfile says, in order.

    Raises:
        ValueError: There is something that is not understood here.
    """
    found = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, words = line.partition(" ")
        if name not in _KNOWN or line.endswith("\\"):
            raise ValueError(f"not understood here: {line}")
        found.append(Instruction(name, words.strip()))
    return found


def stages(said: Sequence[Instruction]) -> list[list[Instruction]]:
    """By FROM, which is the first of each."""
    found: list[list[Instruction]] = []
    for each in said:
        if each.name == "FROM":
            found.append([])
        if found:
            found[-1].append(each)
    return found


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether a builder leaves out a path: the last pattern says that matches it or a folder above."""
    parts = path.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    ignored = False
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        anywhere = plain.removeprefix("**/")
        if any(fnmatch.fnmatchcase(each, plain) for each in above) or (
            anywhere != plain and any(fnmatch.fnmatchcase(part, anywhere) for part in parts)
        ):
            ignored = not pattern.startswith("!")
    return ignored


def ignore_patterns() -> list[str]:
    """Of .containerignore."""
    lines = IGNORE.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def sources(copying: Instruction) -> Iterator[tuple[Path, str]]:
    """Each file that a COPY takes from the repository, and its name at the destination.

    Raises:
        FileNotFoundError: A source is not there, or nothing is left of it.
    """
    *given, destination = shlex.split(copying.words)
    patterns = ignore_patterns()
    for source in given:
        root = REPOSITORY / source
        files = sorted(path for path in root.rglob("*") if not path.is_dir()) if root.is_dir() else [root]
        taken = [
            path
            for path in files
            if path.exists() and not is_ignored(str(path.relative_to(REPOSITORY)), patterns)
        ]
        if not taken:
            raise FileNotFoundError(f"COPY {copying.words}: nothing of {source} is there")
        for path in taken:
            below = path.relative_to(root) if root.is_dir() else Path(path.name)
            yield path, str(Path(destination) / below)


def arguments(stage: Sequence[Instruction], given: Mapping[str, str]) -> dict[str, str]:
    """What a stage's ARGs are; by name.

    Raises:
        ValueError: Something is given that the stage does not ask for.
    """
    asked = (each.words.partition("=") for each in stage if each.name == "ARG")
    defaults = {name: default for name, _, default in asked}
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise ValueError(f"no ARG of the first stage: {', '.join(sorted(unknown))}")
    return {**defaults, **given}


def make(folder: Path, python: Path, given: Mapping[str, str]) -> None:
    """Carry out the first stage below `folder`.

    Args:
        folder: A new one.
        python: What the builder has as `python`.
        given: Its arguments, by name.

    Raises:
        ValueError: See `arguments`.
        subprocess.CalledProcessError: A command failed.
    """
    stage = stages(instructions(CONTAINERFILE.read_text()))[0]
    folder = folder.resolve()
    environment = {
        **os.environ, **arguments(stage, given), "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
    }  # fmt: skip
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(python.resolve())
    at = folder
    for each in stage:
        if each.name == "ENV":
            for word in shlex.split(each.words):
                name, _, value = word.partition("=")
                environment[name] = value
        elif each.name == "WORKDIR":
            at = folder / each.words.removeprefix("/")
            at.mkdir(parents=True, exist_ok=True)
        elif each.name == "COPY":
            for path, name in sources(each):
                (at / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, at / name, follow_symlinks=False)
        elif each.name == "RUN":
            print(f"  {each.words}", flush=True)
            command = _OWN_PATHS.sub(str(folder), each.words)
            subprocess.run(["/bin/sh", "-ec", command], cwd=at, env=environment, check=True)


def main(words: Sequence[str]) -> None:
    """See above."""
    folder, *others = words
    given = dict(word.split("=", 1) for word in others if "=" in word)
    python = next((word for word in others if "=" not in word), sys.executable)
    make(Path(folder), Path(python), given)


if __name__ == "__main__":
    main(sys.argv[1:])
