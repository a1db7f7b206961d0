"""Commands that the documents have run in a pod exist, with the options that they are given."""

from __future__ import annotations

import shlex

import pytest

from testbed.documented import exec_commands
from tokenway.cli.admin_url import ADMIN_ENV
from tokenway.cli.main import main

MISUSED = 2

COMMANDS = exec_commands()


def code_of(words: list[str]) -> int | str | None:
    """The exit code of a command that finds neither a gateway nor its files."""
    try:
        return main(words)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("command", COMMANDS, ids=map(shlex.join, COMMANDS))
def test_a_documented_command_is_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails for want of a gateway; with an option that there is not it is misused."""
    monkeypatch.setenv(ADMIN_ENV, "http://127.0.0.1:1")
    program, *words = command
    assert program == "tokenway"
    assert code_of(words) not in (0, MISUSED)
    assert code_of([*words, "--no-such-option"]) == MISUSED


def test_the_documents_have_some() -> None:
    """The operator's own look at a pod, in docs/kubernetes.md and in the notes of the chart."""
    assert {command[1] for command in COMMANDS} >= {"top", "check", "explain", "render"}
