"""Signals that come before the command has handlers for them, and after it had."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from extproc.server.envoys.cluster_encoder import _process
from extproc.server.process.modules import ROOT

SIGNALS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]

SIGNALLING = """
import os, signal, sys

class Signalling:
    def find_spec(self, name, path=None, target=None):
        if name == "tokenway.cli.main" and SENT:
            os.kill(os.getpid(), SENT.pop())

SENT = [int(os.environ["SENT"])]
sys.meta_path.insert(0, Signalling())
"""
"""A `sitecustomize`: the signal comes at the one moment when the command's first module is looked for."""

SERVING = {
    "serve": (["serve", "missing.yaml"], 1, "missing.yaml: cannot be read: No such file or directory"),
    "worker": (["worker", "missing.yaml", "0"], 1, "missing.yaml: cannot be read: No such file or directory"),
    "metadata-center": (["metadata-center", "--token-env", "UNSET"], 1, "variable UNSET holds no token"),
}
"""Verb -> words that cannot be served, the exit code and the end of the last line for them."""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """With the `sitecustomize` before any other, and no signal ignored, as under `nohup` SIGHUP is."""
    (tmp_path / "sitecustomize.py").write_text(SIGNALLING)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(
    module: str, words: list[str], number: signal.Signals, environment: Mapping[str, str]
) -> tuple[int, str]:
    """Exit code, negative for a signal, and the last line that a command said."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env={**environment, "SENT": str(int(number))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, (done.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", SERVING)
def test_what_serves_outlives_a_signal_before_its_imports(
    verb: str, number: signal.Signals, environment: Mapping[str, str]
) -> None:
    """It goes on to what is wrong with its words, and ends for that."""
    words, code, problem = SERVING[verb]
    found, line = ended("tokenway", words, number, environment)
    assert (found, line.endswith(problem)) == (code, True), line


@pytest.mark.parametrize("module", ["tokenway.cli.main", "extproc.cli.main"])
def test_however_it_is_started(module: str, environment: Mapping[str, str]) -> None:
    """As the supervisor starts its workers, and under the former name."""
    words, code, _ = SERVING["serve"]
    assert ended(module, words, signal.SIGHUP, environment)[0] == code


@pytest.mark.parametrize("verb", ["check", "serve", "worker", "explain"])
def test_an_interrupt_before_the_imports_needs_no_traceback(
    verb: str, environment: Mapping[str, str]
) -> None:
    """Ctrl-C at once: the process ends by the signal, as a shell wants it, and says nothing."""
    words = SERVING.get(verb, ([verb],))[0]
    assert ended("tokenway", words, signal.SIGINT, environment) == (-signal.SIGINT, "")


def test_an_interrupt_before_a_helpers_imports_is_none() -> None:
    """A terminal sends it to all; the helper is the gateway's to end."""
    with _process() as helper:
        helper.send_signal(signal.SIGINT)
        assert helper.communicate(b"", timeout=120)[0] == b""
    assert helper.returncode == 0


ENDING = """
import asyncio, os, signal

class Signalling(asyncio.Runner):
    def close(self):
        super().close()
        os.kill(os.getpid(), int(os.environ["SENT"]))

asyncio.Runner = asyncio.runners.Runner = Signalling
"""
"""A `sitecustomize`: the signal comes when the event loop is closed, and its handlers with it."""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("verb", ["serve", "metadata-center"])
def test_what_serves_outlives_a_signal_as_it_ends(
    verb: str, number: signal.Signals, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """It ends for its own reason, here a port that another has, with the exit code of that."""
    (tmp_path / "sitecustomize.py").write_text(ENDING)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [verb, "--listen", f"127.0.0.1:{port}"]
        if verb == "serve":
            path = tmp_path / "tokenway.yaml"
            path.write_text(f"server: {{run_dir: {tmp_path}/run, admin: {{port: {port}}}}}\n")
            path.with_name("clusters.json").write_text('{"clusters": []}')
            words = [verb, str(path)]
        code, line = ended("tokenway", words, number, environment)
    assert (code, "in use" in line) == (1, True), line


def test_other_verbs_end_when_their_terminal_is_gone(environment: Mapping[str, str]) -> None:
    """SIGHUP means nothing but that to a verb that answers and leaves."""
    assert ended("tokenway", ["check", "missing.yaml"], signal.SIGHUP, environment)[0] == -signal.SIGHUP


def test_a_process_that_ignores_the_signal_from_its_start_outlives_it_everywhere(
    environment: Mapping[str, str], tmp_path: Path
) -> None:
    """The interpreter's own start is the shell's to cover: `trap '' HUP; exec tokenway serve`."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGHUP)\n")
    command = [sys.executable, "-m", "tokenway", *SERVING["serve"][0]]
    codes = [
        subprocess.run(
            ["sh", "-c", f'{before} exec "$@"', "sh", *command],
            env=environment,
            capture_output=True,
            timeout=120,
            check=False,
        ).returncode
        for before in ("trap '' HUP;", "")
    ]
    assert codes == [1, -signal.SIGHUP]
