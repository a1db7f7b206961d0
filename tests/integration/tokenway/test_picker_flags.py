"""`tokenway serve` by the flags of other pickers: what they come to, and a gateway that runs by them."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from extproc.config.loading import load_all
from extproc.errors import ConfigError
from testbed.processes import Subprocess, free_port, get
from tests.e2e.harness import answers
from tokenway.cli.picker_flags import add_picker_flags, picker_settings

CLUSTERS = {"clusters": [{"name": "m", "endpoints": [{"address": "127.0.0.1", "port": 9}]}]}


def settings(*words: str) -> dict[str, Any]:
    """What these flags come to."""
    parser = argparse.ArgumentParser()
    add_picker_flags(parser)
    return picker_settings(parser.parse_args(words))


def test_without_flags_the_file_alone_counts() -> None:
    """Nothing is said."""
    assert settings() == {}


@pytest.mark.parametrize(
    ("words", "ports", "tls"),
    [
        (["--grpc-port", "1"], (1, 9003, 9090), (True, None)),
        (["--grpc-health-port=2", "--metrics-port", "3"], (9002, 2, 3), (True, None)),
        (["--secure-serving=false"], (9002, 9003, 9090), (False, None)),
        (["--secure-serving"], (9002, 9003, 9090), (True, None)),
        (["--cert-path", "/certs/"], (9002, 9003, 9090), (False, "/certs/tls.crt")),
        (["--cert-path", "/certs", "--secure-serving", "false"], (9002, 9003, 9090), (False, None)),
    ],
)
def test_flags_are_settings(
    words: list[str], ports: tuple[int, int, int], tls: tuple[bool, str | None]
) -> None:
    """Any of them brings llm-d's ports and its TLS."""
    picker = settings(*words)["endpoint_picker"]
    listened = [picker[name] for name in ("listen", "health_listen", "metrics_listen")]
    assert [int(addresses[0].rpartition(":")[2]) for addresses in listened] == list(ports)
    cert = None if picker["listen_tls"] is None else picker["listen_tls"]["cert_file"]
    assert (picker["self_signed"], cert) == tls
    assert picker["listen_insecure"] is (tls == (False, None))


@pytest.mark.parametrize(
    "words", [["--grpc-port", "0"], ["--metrics-port", "x"], ["--secure-serving", "maybe"]]
)
def test_what_is_no_value_is_refused(words: list[str]) -> None:
    """As every flag of ours."""
    with pytest.raises(SystemExit):
        settings(*words)


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    """Where it listens is theirs; the rest of the section is the file's. A bad result is refused."""
    (tmp_path / "clusters.json").write_text(json.dumps(CLUSTERS))
    path = tmp_path / "tokenway.yaml"
    path.write_text("endpoint_picker: {listen: ['127.0.0.1:1'], fallbacks: 3}\n")
    config, _ = load_all(path, settings("--grpc-port", "7", "--secure-serving=false"))
    assert config.endpoint_picker is not None
    assert config.endpoint_picker.fallbacks == 3
    assert config.endpoint_picker.listen[0].endswith(":7")
    path.write_text("endpoint_picker: null\n")
    config, _ = load_all(path, settings("--grpc-port", "7"))
    assert config.endpoint_picker is not None
    config, _ = load_all(tmp_path / "clusters.json", settings("--grpc-port", "7"))
    assert config.endpoint_picker is not None
    path.write_text("endpoint_picker: 3\n")
    with pytest.raises(ConfigError, match="endpoint_picker"):
        load_all(path, settings("--grpc-port", "7"))


@pytest.mark.asyncio
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_gateway_runs_by_flags(tmp_path: Path, workers: int) -> None:
    """TLS by a certificate of its own, health and metrics at their ports, in each worker."""
    picker, probed, scraped, admin = (free_port() for _ in range(4))
    (tmp_path / "clusters.json").write_text(json.dumps(CLUSTERS))
    path = tmp_path / "tokenway.yaml"
    server = {"run_dir": str(tmp_path / "run"), "admin": {"port": admin}, "workers": workers}
    path.write_text(json.dumps({"server": server}))
    flags = ["--grpc-port", str(picker), "--grpc-health-port", str(probed), "--metrics-port", str(scraped)]
    gateway = await Subprocess.start(
        [sys.executable, "-m", "tokenway.cli.main", "serve", str(path), *flags], tmp_path / "log"
    )
    try:

        def all_ready(body: bytes) -> bool:
            return bool(json.loads(body).get("workers_ready", 1) == workers)

        await answers(gateway, f"http://127.0.0.1:{admin}/readyz", all_ready)
        assert b"tokenway_" in await get(f"http://127.0.0.1:{scraped}/metrics")
        made = [tmp_path / "run" / f"picker{index}" for index in range(workers)]
        assert [key.with_suffix(".key").stat().st_mode & 0o777 for key in made] == [0o600] * workers
        roots = b"".join(each.with_suffix(".crt").read_bytes() for each in made)
        name = (("grpc.ssl_target_name_override", "tokenway"),)
        async with (
            grpc.aio.secure_channel(f"127.0.0.1:{picker}", grpc.ssl_channel_credentials(roots), name) as tls,
            grpc.aio.insecure_channel(f"127.0.0.1:{probed}") as plain,
        ):
            for channel in (tls, plain):
                check = channel.unary_unary("/grpc.health.v1.Health/Check")
                assert await check(b"\x0a\x09readiness", timeout=20) == b"\x08\x01"
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        assert [path.name for path in (tmp_path / "run").glob("picker*")] == []
    finally:
        await gateway.kill()
