"""`tokenway demo` as a reader of README.md runs it: it answers, and nothing of it is left when it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from extproc.server.process.modules import python_module
from testbed.processes import free_port
from tokenway.cli.envoy import ENVOY_ENV, SOURCE_ENVOY

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
async def test_a_demo_leaves_nothing_behind(how: signal.Signals, tmp_path: Path) -> None:
    """Neither a process, nor its folder of logs, nor a socket."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    engines = [{"address": "127.0.0.1", "port": free_port()}]
    clusters = {"clusters": [{"name": "llama", "endpoints": engines}]}
    (tmp_path / "clusters.json").write_text(json.dumps(clusters))
    config = tmp_path / "tokenway.yaml"
    config.write_text(f"server: {{run_dir: {tmp_path}/run, admin: {{port: {free_port()}}}}}\n")
    listen = f"127.0.0.1:{free_port()}"
    words = ["demo", "--config", str(config), "--listen", listen, "--envoy-admin-port", str(free_port())]
    demo = await asyncio.create_subprocess_exec(
        *python_module("tokenway.cli.main", *words),
        env={**os.environ, "TMPDIR": str(temporary), ENVOY_ENV: str(SOURCE_ENVOY)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert demo.stdout is not None
    try:
        said = await demo.stdout.readuntil(b"removes the folder of logs.")
        assert str(temporary).encode() in said
        async with aiohttp.ClientSession() as session, session.get(f"http://{listen}/v1/models") as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["llama"]
    finally:
        demo.send_signal(how)
        ended = await demo.wait()
    assert ended == 0
    assert list(temporary.iterdir()) == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
