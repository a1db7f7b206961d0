"""Standard input, output and error that are closed, full or of another encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.processes import REPOSITORY

SAMPLE = str(REPOSITORY / "etc" / "tokenway.yaml")
REPLAY = ("replay", "sample", "--max-requests", "5", "--policies", "round_robin", "--rates", "x1")


def command(words: tuple[str, ...]) -> list[str]:
    """Our command with these words."""
    return [sys.executable, "-m", "tokenway", *words]


def environment(is_buffered: bool, **more: str) -> dict[str, str]:
    """That of this process; what is written waits, as it does by default, or does not."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**kept, **({} if is_buffered else {"PYTHONUNBUFFERED": "1"}), **more}


CASES = pytest.mark.parametrize(
    ("words", "is_buffered"),
    [
        (("--help",), True),
        (("--version",), True),
        (("check", SAMPLE), True),
        (("check", SAMPLE), False),
        (("bootstrap", SAMPLE), True),
        (REPLAY, True),
        (REPLAY, False),
    ],
)


@CASES
def test_a_full_disk_is_a_sentence_and_exit_1(words: tuple[str, ...], is_buffered: bool) -> None:
    """Whenever it is found: Python's own end would say "Exception ignored" and 120."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(words), stdout=full, stderr=subprocess.PIPE, cwd=REPOSITORY, env=environment(is_buffered)
        )
    assert done.returncode == 1
    said = done.stderr.decode().splitlines()
    assert len(said) == 1
    assert said[0].startswith("tokenway")
    assert said[0].endswith(": No space left on device")


@CASES
def test_a_reader_that_left_is_no_words_and_exit_1(words: tuple[str, ...], is_buffered: bool) -> None:
    """`| head` has what it wanted."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command(words), stdout=writing, stderr=subprocess.PIPE, cwd=REPOSITORY, env=environment(is_buffered)
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("words", [REPLAY, ("serve", "--help")], ids=lambda words: words[0])
def test_what_an_encoding_lacks_is_written_by_its_number(words: tuple[str, ...]) -> None:
    """Rather than a traceback, or the table of a replay of hours lost."""
    done = subprocess.run(
        command(words),
        capture_output=True,
        cwd=REPOSITORY,
        env=environment(True, PYTHONIOENCODING="ascii"),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u2264" in done.stdout or b"\\u2026" in done.stdout


@pytest.mark.parametrize(
    ("words", "closed"), [(("check", SAMPLE), ">&-"), (REPLAY, "2>&-"), (REPLAY, "<&- >&- 2>&-")]
)
def test_closed_streams_lead_nowhere(words: tuple[str, ...], closed: str, tmp_path: Path) -> None:
    """All verbs work without them, and no file of theirs is taken for one."""
    copy = tmp_path / "all.json"
    words = (*words, "--json", str(copy)) if words is REPLAY else words
    script = f'"$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command(words)],
        capture_output=True,
        cwd=REPOSITORY,
        env=environment(True),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert words[0] != "replay" or copy.read_bytes().startswith(b"{")
