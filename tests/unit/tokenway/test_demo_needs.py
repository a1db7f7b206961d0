"""What a demo refuses before it starts anything."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from testbed.processes import free_port
from tokenway.cli import demo as demo_module
from tokenway.cli.main import main


def configured(folder: Path, text: str, *addresses: str) -> list[str]:
    """The words for a demo of a configuration with endpoints there, on free ports."""
    endpoints = [{"address": address, "port": free_port()} for address in addresses]
    (folder / "clusters.json").write_text(
        json.dumps({"clusters": [{"name": "llama", "endpoints": endpoints}]})
    )
    path = folder / "tokenway.yaml"
    path.write_text(text)
    listen = f"127.0.0.1:{free_port()}"
    return ["demo", "--config", str(path), "--listen", listen, "--envoy-admin-port", str(free_port())]


PAIR = "{cert_file: /a.pem, key_file: /a.key}"


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would start a process fails."""

    def fail(*_: object) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr(demo_module, "_start", fail)


@pytest.mark.parametrize(
    ("text", "addresses", "named"),
    [
        ("", ("10.1.2.3",), "`llama` has an endpoint at 10.1.2.3:"),
        ("", ("127.0.0.1", "::1"), "`llama` has an endpoint at [::1]:"),
        (f"edge: {{tls: {PAIR}}}", ("127.0.0.1",), "edge.tls: "),
        ("engine_tls: {llama: {ca_file: /a.pem, server_name: x}}", ("127.0.0.1",), "engine_tls: "),
        ("discovery: {istio: {address: '127.0.0.1:15010'}}", (), "discovery.istio: "),
        ("server: {admin: {port: 0}}", ("127.0.0.1",), "server.admin.port: "),
    ],
)
def test_what_it_cannot_stand_in_for_is_named(
    text: str, addresses: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It called a real fleet simulated, and sent its requests there."""
    assert main(configured(tmp_path, text, *addresses)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    assert line.startswith(f"{tmp_path / 'tokenway.yaml'}: ")
    assert named in line


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "0.0.0.0"],
)
def test_two_of_its_own_at_one_port_are_named(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what says another; Envoy's log said it after the engines had started."""
    words = configured(tmp_path, f"server: {{admin: {{port: {free_port()}}}}}", "127.0.0.1")
    words[words.index("--listen") + 1] = f"{host}:{words[-1]}"
    assert main(words) == 1
    said = f"tokenway: 127.0.0.1:{words[-1]}, for Envoy's own admin surface (--envoy-admin-port): "
    assert capsys.readouterr().err == f"{said}Address already in use\n"


def test_a_port_that_is_taken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what says another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = configured(tmp_path, f"server: {{admin: {{port: {port}}}}}", "127.0.0.1")
        assert main(words) == 1
    assert (
        f"127.0.0.1:{port}, for the gateway's admin port (server.admin of --config): "
        in capsys.readouterr().err
    )


def test_an_interrupted_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that fails keeps it, for its logs say why."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(demo_module, "_end_on_signal", lambda: None)
    (tmp_path / "tmp").mkdir()
    words = configured(tmp_path, f"server: {{admin: {{port: {free_port()}}}}}", "127.0.0.1")

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo_module, "_start", interrupt)
    assert main(words) == 130
    assert list((tmp_path / "tmp").iterdir()) == []
