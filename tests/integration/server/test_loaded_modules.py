"""What a gateway that serves has in memory: libraries that it does not need are not imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SERVE = """
import asyncio, json, sys
from pathlib import Path
from extproc.server.building import build_worker
from extproc.server.envoys.cluster_encoder import ClusterEncoder
import tokenway.cli.serve

async def serve():
    with ClusterEncoder() as encoder:
        worker = build_worker(Path(sys.argv[1]), encode=encoder.encode)
    await worker.start()
    print(json.dumps(sorted(sys.modules)))
    await worker.stop()

asyncio.run(serve())
"""

NEEDLESS = {
    "envoy_data_plane": "another process encodes clusters with it",
    "betterproto2": "what it is made by",
    "grpc": "our own transport serves",
    "redis": "no store is configured",
    "tokenizers": "no model has a tokenizer",
    "jinja2": "no model has a template",
    "zmq": "no engine announces its cache",
    "jsonschema": "tests alone use it",
    "matplotlib": "`replay` alone draws",
}
"""Package -> why a gateway with the defaults does without."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Top-level packages of all modules of a gateway with two engines that serves."""
    folder = tmp_path_factory.mktemp("loaded")
    endpoints = [{"address": "127.0.0.1", "port": port} for port in (1, 2)]
    (folder / "clusters.json").write_text(json.dumps({"clusters": [{"name": "c", "endpoints": endpoints}]}))
    server = {"run_dir": str(folder / "run"), "admin": {"port": 0}}
    path = folder / "tokenway.yaml"
    path.write_text(json.dumps({"server": server, "models": {"m": {"rules": [{"cluster": "c"}]}}}))
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(path)], check=True, capture_output=True, text=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize("package", NEEDLESS)
def test_a_gateway_that_serves_does_without(package: str, loaded: set[str]) -> None:
    """Each would be resident for as long as it runs."""
    assert package not in loaded, NEEDLESS[package]


def test_what_is_looked_at_is_what_was_loaded(loaded: set[str]) -> None:
    """Our own modules, and what they do need."""
    assert {"extproc", "metadata_center", "aiohttp", "numpy", "msgspec", "prometheus_client"} <= loaded
