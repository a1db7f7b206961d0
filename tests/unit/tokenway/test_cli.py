"""The command line as a whole: every word is understood or refused, in a sentence and with an exit code."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from errno import EADDRINUSE, ENOENT
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import pytest

from extproc.build_kind import build_kind
from extproc.server.process.environment import secret
from extproc.server.process.modules import ROOT, python_module
from tokenway.cli.admin_url import ADMIN_ENV
from tokenway.cli.demo import own_command
from tokenway.cli.main import main

SAMPLE = "etc/tokenway.yaml"
VERBS = ("serve", "check", "bootstrap", "render", "explain", "top", "metadata-center", "replay", "demo")


def misused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run words that must be refused; the sentence on standard error."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    return captured.err.splitlines()[-1]


def test_without_a_verb_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole help, as misuse: on standard error with exit code 2."""
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(f"    {verb}" in captured.err for verb in VERBS)


def test_help_names_the_verbs_for_people_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    """What `serve` starts itself is not among them."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "SUPPRESS" not in shown
    assert "worker" not in shown
    assert "'worker'" not in misused(["nothing"], capsys)


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    """On standard output, with exit code 0."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    said = f"tokenway {version('tokenway')} ({build_kind()})\n"
    assert (ended.value.code, capsys.readouterr().out) == (0, said)


@pytest.mark.parametrize(
    "words",
    [
        ["serve", SAMPLE],
        ["check", SAMPLE],
        ["bootstrap", SAMPLE],
        ["render", "istio", "--config", SAMPLE],
        ["explain"],
        ["top", "--once"],
        ["metadata-center"],
        ["replay", "sample"],
        ["demo"],
        ["worker", SAMPLE, "0"],
    ],
)
@pytest.mark.parametrize("unknown", ["--no-such-flag", "-z"])
def test_every_verb_refuses_a_flag_it_does_not_know(
    words: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No verb ignores a word."""
    assert unknown in misused([*words, unknown], capsys)


@pytest.mark.parametrize("verb", ["explain", "replay", "top"])
def test_a_verbs_help_is_its_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of the verbs that read their words themselves."""
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: tokenway {verb}")
    assert verb == "replay" or "--admin" in shown


@pytest.mark.parametrize("verb", [[verb] for verb in VERBS if verb != "render"] + [["render", "istio"]])
def test_help_says_what_each_word_means(
    verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it, or below it where it is long; what has no default says no `None`."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    usage, _, described = capsys.readouterr().out.partition("\n\n")
    words = re.findall(r"^  (-\S[^\n]*?|[a-z]\w*)(?:\n? {2,}((?!-)\S[^\n]*))?$", described, re.MULTILINE)
    assert len(words) >= usage.count("[-")
    assert [word for word, meaning in words if not meaning] == []
    assert not any(said in described for said in ("None", "[]", "False"))


def test_help_of_the_replayer_has_the_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that docs/replay.md has in its table, in the same words."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["replay", "--help"])
    lines = capsys.readouterr().out.splitlines()
    table = re.findall(r"^\| (`--[^|]*) \|([^|]*)\|", (ROOT / "docs" / "replay.md").read_text(), re.MULTILINE)
    documented = {
        option: default
        for options, defaults in table
        for option, default in zip(options.split(", "), defaults.strip().split(", "), strict=True)
        if default
    }
    assert "`--view`" in documented
    for option, default in documented.items():
        start = f"  {option.strip('`')} "
        (described,) = [
            line + after for line, after in itertools.pairwise([*lines, ""]) if line.startswith(start)
        ]
        assert f"(default {default.strip('`')})" in described


@pytest.mark.parametrize("verb", [["explain"], ["top", "--once"]])
def test_the_variable_says_whom_to_ask(
    verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option says it before the variable does."""
    monkeypatch.setenv(ADMIN_ENV, "http://127.0.0.1:1")
    assert main(verb) == 1
    assert capsys.readouterr().err.startswith("admin port http://127.0.0.1:1 ")
    assert main([*verb, "--admin", "http://127.0.0.1:2"]) == 1
    assert capsys.readouterr().err.startswith("admin port http://127.0.0.1:2 ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bootstrap", SAMPLE, "--listen", "0.0.0.0"], "argument --listen: `0.0.0.0` has no port"),
        (["bootstrap", SAMPLE, "--listen", "localhost:80"], "`localhost` is no IP address"),
        (["bootstrap", SAMPLE, "--listen", "1.2.3.4:0"], "accepted: 1 to 65535"),
        (["bootstrap", SAMPLE, "--envoy-admin-port", "70000"], "--envoy-admin-port: `70000` is no port"),
        (["demo", "--listen", "::1:80"], "without brackets"),
        (["demo", "--envoy-admin-port", "0"], "`0` is no port"),
        (["demo", "--time-scale", "0"], "`0` is no number above 0"),
        (["demo", "--time-scale", "nan"], "`nan` is no number above 0"),
        (["metadata-center", "--listen", ":8080"], "`:8080` has no address"),
        (["metadata-center", "--listen", "127.0.0.1"], "`127.0.0.1` has no port"),
        (["metadata-center", "--request-expiry-s", "0"], "--request-expiry-s: `0` is no number above 0"),
        (["metadata-center", "--cache-expiry-s", "nan"], "--cache-expiry-s: `nan` is no number above 0"),
        (["top", "--interval", "-1"], "`-1` is no number above 0"),
        (["explain", "--last", "0"], "accepted: 1 or more"),
        (["explain", "--last", "-3"], "--last"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the flag it came with, before anything is started."""
    assert said in misused(words, capsys)


@pytest.mark.parametrize("verb", ["serve", "check", "bootstrap"])
@pytest.mark.parametrize("content", [None, "folder", b"\xff\xfe\x00", b"\x1f\x8b\x08"])
def test_a_file_that_cannot_be_read_is_a_sentence(
    verb: str, content: str | bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, a folder, or no text: one line that names it, and exit code 1."""
    path = tmp_path / "tokenway.yaml"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert main([verb, str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gone.jsonl", None),
        ("folder", "folder"),
        ("binary.jsonl", b"\xff\xfe\x00\x01"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03ab"),
        ("no.jsonl.gz", b"plain"),
        ("list.jsonl", b"[1, 2]\n"),
    ],
)
def test_a_trace_that_cannot_be_read_is_a_sentence(
    name: str, content: str | bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with it, exit code 1 and one line."""
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert main(["replay", str(path), "--rates", "x1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tokenway replay: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("rates", ["x1,nan", "inf", "x0", "-1", "x"])
def test_a_replay_at_no_speed_is_refused(rates: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is simulated."""
    assert (
        main(["replay", "sample", "--max-requests", "2", "--policies", "round_robin", "--rates", rates]) == 2
    )
    assert "rates are `auto` or factors above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "place"), [("--json", "gone/results.json"), ("--plots", "a-file/plots")])
def test_a_replay_finds_out_first_that_its_results_could_not_be_written(
    flag: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the runs, which may have taken hours."""
    runs: list[object] = []
    monkeypatch.setattr("tokenway.cli.replay.run_all", lambda *words: runs.append(words))
    (tmp_path / "a-file").touch()
    words = ["replay", "sample", "--max-requests", "2", "--policies", "round_robin", "--rates", "x1"]
    assert main([*words, flag, str(tmp_path / place)]) == 1
    assert not runs
    assert place.partition("/")[0] in capsys.readouterr().err


def test_a_replay_finds_out_first_that_pictures_could_not_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to install; after the runs the JSON was written, and the pictures were lost."""
    monkeypatch.setattr("tokenway.cli.replay.find_spec", lambda _: None)
    words = ["replay", "sample", "--max-requests", "2", "--policies", "round_robin", "--rates", "x1"]
    assert main([*words, "--plots", str(tmp_path / "plots")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "tokenway replay: No module named 'matplotlib': pip install 'tokenway[simulator]'\n"
    assert not (tmp_path / "plots").exists()


def test_a_reader_that_leaves_is_no_error_of_ours() -> None:
    """`tokenway bootstrap ... | head` ends without a traceback."""
    words = [sys.executable, "-m", "tokenway.cli.main", "bootstrap", SAMPLE]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_our_processes_do_not_import_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any file may lie there, under the name of any module; only the source tree may be run uninstalled."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yaml.py").write_text("raise SystemExit('imported from the working directory')")
    assert subprocess.run(python_module("tokenway.cli.main", "--help"), capture_output=True).returncode == 0
    monkeypatch.chdir(ROOT)
    assert python_module("a.b", "c") == [sys.executable, "-m", "a.b", "c"]


def test_the_banner_names_a_command_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bare name from the PATH, near by its relative path, else in full; else as a module."""
    script = tmp_path / "env" / "bin" / "tokenway"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert own_command(Path("env/bin/tokenway")) == "env/bin/tokenway"
    monkeypatch.chdir("/")
    assert own_command(script) == str(script).removeprefix("/")
    monkeypatch.chdir(script.parent)
    assert own_command(Path("tokenway")) == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert own_command(script) == "tokenway"
    assert own_command(Path("/x/tokenway/cli/main.py")) == f"{sys.executable} -m tokenway"
    monkeypatch.setenv("PYTHONPATH", f"/x:{ROOT}")
    assert own_command(script) == f"PYTHONPATH={ROOT} tokenway"


def test_an_error_of_the_system_is_said_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the file that it is about, without its number, and exit code 1."""
    gone = FileNotFoundError(ENOENT, os.strerror(ENOENT), "/no/cert.pem")
    taken = OSError(
        EADDRINUSE, "error while attempting to bind on address ('::1', 1): address already in use"
    )
    for error, said in (
        (gone, "/no/cert.pem: No such file or directory"),
        (taken, "error while attempting to bind on address ('::1', 1): address already in use"),
        (OSError("no Envoy"), "no Envoy"),
    ):
        monkeypatch.setattr("tokenway.cli.check.check", Mock(side_effect=error))
        assert main(["check", SAMPLE]) == 1
        assert capsys.readouterr().err == f"tokenway: {said}\n"


def test_a_variable_that_is_named_and_not_set_is_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, where it is empty as well; a password is not left out in silence."""
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("SET", "x")
    values = [secret(name) for name in ("NO_SUCH", "EMPTY", "SET", None)]
    assert values == [None, "", "x", None]
    said = [(record.getMessage(), record.__dict__["variable"]) for record in caplog.records]
    assert said == [
        ("an environment variable that is named is not set", name) for name in ("NO_SUCH", "EMPTY")
    ]


def test_a_bootstrap_by_secret_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They name certificates and hold nothing of them; the bootstrap names them by their whole paths."""
    config = tmp_path / "tokenway.yaml"
    pair = "cert_file: /a.pem, key_file: /a.key"
    gateway = f"{{addresses: ['10.0.0.1:1'], {pair}, ca_file: /b.pem, server_name: g}}"
    config.write_text(f"edge: {{tls: {{{pair}}}, gateway: {gateway}}}")
    (tmp_path / "clusters.json").write_text('{"clusters": []}')
    folder = tmp_path / "deep" / "sds"
    assert main(["bootstrap", str(config), "--sds", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["edge.yaml", "gateway-ca.yaml", "gateway.yaml"]
    for path in folder.iterdir():
        assert str(path) in printed
    assert "/a.pem" not in printed
    assert "/a.key" in (folder / "edge.yaml").read_text()
    assert "/b.pem" in (folder / "gateway-ca.yaml").read_text()
