"""Two of our own sockets at one place: refused before anything listens, with both keys named."""

from __future__ import annotations

import asyncio
import itertools
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from extproc.config.collisions import run_dir_files
from extproc.config.loading import load_all, parse
from extproc.errors import ConfigError
from extproc.server.listening.run_dir import admin_path, bus_path, counters_path, home_of, socket_path
from extproc.server.listening.self_signed import self_signed_files
from extproc.transport.native import tcp_socket
from tokenway.cli.check import check


def problems(text: str) -> list[str]:
    """Of a file; none for a good one."""
    try:
        parse(text, "tokenway.yaml")
    except ConfigError as error:
        return error.problems
    return []


PICKER = "endpoint_picker: {listen_insecure: true, "

COLLIDING = [
    ("server: {listen: ['127.0.0.1:1', '127.0.0.1:1']}", "server.listen[1]", "server.listen[0]"),
    ("server: {listen: ['unix:/a/b', 'unix:/a//./b']}", "server.listen[1]", "server.listen[0]"),
    ("server: {listen: ['unix:/a', 'unix:/a/b']}", "server.listen[1]", "server.listen[0]"),
    ("server: {listen: ['[::1]:1', '[0:0::1]:1']}", "server.listen[1]", "server.listen[0]"),
    ("server: {listen: ['[::ffff:127.0.0.1]:1', '127.0.0.1:1']}", "server.listen[1]", "server.listen[0]"),
    (
        "server: {listen: ['0.0.0.0:1', '127.0.0.1:1'], listen_insecure: true}",
        "server.listen[1]",
        "server.listen[0]",
    ),
    (
        "server: {listen: ['127.0.0.2:1', '[::]:1'], listen_insecure: true}",
        "server.listen[1]",
        "server.listen[0]",
    ),
    ("server: {listen: ['127.0.0.1:10080']}", "server.listen[0]", "server.admin.port"),
    ("server: {listen: ['127.0.0.1:7'], admin: {port: 7}}", "server.listen[0]", "server.admin.port"),
    (
        "server: {listen: ['127.0.0.1:7'], admin: {address: 0.0.0.0, port: 7}}",
        "server.listen[0]",
        "server.admin.port",
    ),
    (PICKER + "listen: ['0.0.0.0:10080']}", "endpoint_picker.listen[0]", "server.admin.port"),
    (
        "server: {listen: ['127.0.0.1:2']}\n" + PICKER + "listen: ['127.0.0.1:2']}",
        "endpoint_picker.listen[0]",
        "server.listen[0]",
    ),
    (
        PICKER + "listen: ['127.0.0.1:2'], health_listen: ['127.0.0.1:2']}",
        "endpoint_picker.health_listen[0]",
        "endpoint_picker.listen[0]",
    ),
    (
        PICKER + "listen: ['127.0.0.1:2'], metrics_listen: ['0.0.0.0:2']}",
        "endpoint_picker.metrics_listen[0]",
        "endpoint_picker.listen[0]",
    ),
    (
        PICKER + "listen: ['127.0.0.1:2'], metrics_listen: ['0.0.0.0:10080']}",
        "endpoint_picker.metrics_listen[0]",
        "server.admin.port",
    ),
    (
        "server: {workers: 2}\n" + PICKER + "listen: ['127.0.0.1:2', '127.0.0.1:2']}",
        "endpoint_picker.listen[1]",
        "endpoint_picker.listen[0]",
    ),
    (
        "server: {listen: ['127.0.0.1:5557']}\ncache: {kv_events: {listen: {'tcp://gw:1': 'tcp://*:5557'}}}",
        "cache.kv_events.listen.tcp://gw:1",
        "server.listen[0]",
    ),
    (
        "server: {listen: ['127.0.0.1:9']}\ncache: {kv_events: {listen: {'tcp://gw:1': 'tcp://localhost:9'}}}",
        "cache.kv_events.listen.tcp://gw:1",
        "server.listen[0]",
    ),
    (
        "cache: {kv_events: {listen: {'tcp://a:1': 'tcp://*:9', 'tcp://b:1': 'tcp://0.0.0.0:9'}}}",
        "cache.kv_events.listen.tcp://b:1",
        "cache.kv_events.listen.tcp://a:1",
    ),
    (
        "server: {listen: ['unix:/a']}\ncache: {kv_events: {listen: {'ipc:///b': 'ipc:///a'}}}",
        "cache.kv_events.listen.ipc:///b",
        "server.listen[0]",
    ),
    (
        "server: {run_dir: /r, listen: ['unix:/r/gw0.sock']}",
        "server.listen[0]",
        "`gw0.sock` in server.run_dir",
    ),
    ("server: {run_dir: /r/, listen: ['unix:/r/lock']}", "server.listen[0]", "`lock` in server.run_dir"),
    ("server: {run_dir: /r/x, listen: ['unix:/r']}", "server.listen[0]", "server.run_dir"),
    ("server: {run_dir: /r, listen: ['unix:/r']}", "server.listen[0]", "server.run_dir"),
    (
        "server: {run_dir: /r, workers: 3, listen: ['unix:/q/../r/bus2.sock']}",
        "server.listen[0]",
        "`bus2.sock` in server.run_dir",
    ),
    (
        "server: {run_dir: /r}\nendpoint_picker: {self_signed: true, listen: ['unix:/r/picker0.key']}",
        "endpoint_picker.listen[0]",
        "`picker0.key` in server.run_dir",
    ),
]


@pytest.mark.parametrize(("text", "key", "other"), COLLIDING)
def test_two_sockets_at_one_place_are_refused_by_both_keys(text: str, key: str, other: str) -> None:
    """One sentence, of the later key, that names the earlier one."""
    (problem,) = problems(text)
    assert problem.split(": ")[1] == key
    assert other in problem.removeprefix(key)
    assert "accepted: " in problem


@pytest.mark.parametrize(
    "text",
    [
        "server: {listen: ['127.0.0.1:0', '127.0.0.1:0'], admin: {port: 0}}",
        "server: {listen: ['127.0.0.1:1', '127.0.0.2:1', '[::1]:1', '127.0.0.1:2']}",
        "server: {listen: ['unix:/a', 'unix:/ab', 'unix:/r/gw1.sock'], run_dir: /r}",
        "server: {listen: ['0.0.0.0:1', '[::1]:1'], listen_insecure: true}",
        "server: {listen: ['0.0.0.0:1'], listen_insecure: true, admin: {address: '::', port: 1}}",
        "cache: {kv_events: {listen: {'tcp://a:1': 'tcp://*:9', 'tcp://b:1': 'tcp://*:9'}}}",
        "cache: {kv_events: {enabled: false, listen: {'tcp://a:1': 'tcp://*:10080'}}}",
        "cache: {kv_events: {listen: {'ipc:///a': 'ipc://@a', 'tcp://b:1': 'tcp://eth0:x'}}}",
    ],
)
def test_what_can_be_listened_to_at_once_is_accepted(text: str) -> None:
    """Free ports, other addresses of a machine, one socket that many engines connect to."""
    assert problems(text) == []


HOSTS = ("127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::")


async def _open(host: str, port: int, *, is_http: bool) -> asyncio.Server | socket.socket:
    """As the worker opens them: gRPC by `tcp_socket`, HTTP by the loop."""
    if is_http:
        return await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
    return tcp_socket(host, port)


async def _both_open(grpc: str, second: str, *, is_http: bool) -> bool:
    first = tcp_socket(grpc, 0)
    try:
        with suppress(OSError):
            (await _open(second, first.getsockname()[1], is_http=is_http)).close()
            return True
        return False
    finally:
        first.close()


@pytest.mark.parametrize("is_http", [False, True])
@pytest.mark.parametrize(("grpc", "second"), list(itertools.product(HOSTS, HOSTS)))
async def test_what_is_refused_is_what_the_kernel_refuses(grpc: str, second: str, is_http: bool) -> None:
    """For each pair of addresses at one port, of gRPC and of the admin page."""
    written = [f"[{host}]:9" if ":" in host else f"{host}:9" for host in (grpc, second)]
    asked = f"listen: {written}"
    if is_http:
        asked = f"listen: ['{written[0]}'], admin: {{address: '{second}', port: 9}}"
    text = f"server: {{listen_insecure: true, {asked}}}"
    assert (problems(text) == []) == await _both_open(grpc, second, is_http=is_http)


def test_files_of_the_run_dir_are_those_that_are_made() -> None:
    """The names that are looked at are the ones that the parts which make them use."""
    folder = Path("/r")
    picker = "endpoint_picker: {self_signed: true, listen: ['unix:/x']}"
    config = parse(f"server: {{workers: 2, run_dir: /r}}\n{picker}", "x")
    made = {"lock", counters_path(folder).name}
    for index in range(2):
        tls = self_signed_files(folder, index)
        made |= {socket_path(folder, index).name, admin_path(folder, index).name}
        made |= {tls.cert_file.name, tls.key_file.name, bus_path(folder, index).name}
    assert set(run_dir_files(config)) == made


def test_the_folder_that_nobody_named_is_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`server.run_dir` is left out: check and a start refuse a socket at the place of the worker's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    file = tmp_path / "tokenway.yaml"
    file.write_text(f"server: {{listen: ['unix:{tmp_path}/tokenway/gw0.sock']}}")
    (tmp_path / "clusters.json").write_text('{"clusters": []}')
    assert check(file) == 1
    assert "server.listen[0]: unix:" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"gw0\.sock"):
        home_of(load_all(file)[0], file)


def test_flags_that_collide_are_refused() -> None:
    """What the command's flags say goes through the same rule, with a clusters.json alone as well."""
    listen = {"listen": ["127.0.0.1:9090"], "metrics_listen": ["127.0.0.1:9090"]}
    with pytest.raises(ConfigError, match=r"endpoint_picker\.listen\[0\]"):
        parse("", "x", {"endpoint_picker": listen})
