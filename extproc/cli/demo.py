"""`tokenway demo`: Envoy, simulated engines and the gateway in the foreground, ready to be tried and broken."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from extproc.config.loading import load_all
from extproc.discovery.clusters import EndpointSpec
from extproc.server import bootstrap
from extproc.server.worker import socket_path

ENVOY_ENV = "TOKENWAY_ENVOY"
SOURCE_ENVOY = Path(__file__).parents[2] / ".tools" / "envoy" / "envoy" / "_bin" / "envoy"

START_TIMEOUT_S = 30.0


def envoy_binary() -> Path:
    """Envoy itself: $TOKENWAY_ENVOY, what `make envoy` installed, or `envoy` on the PATH.

    Raises:
        FileNotFoundError: None of them is there.
    """
    named = os.environ.get(ENVOY_ENV)
    if named:
        return Path(named)
    if SOURCE_ENVOY.exists():
        return SOURCE_ENVOY
    found = shutil.which("envoy")
    if found is None:
        raise FileNotFoundError(f"no Envoy: run `make envoy`, or set {ENVOY_ENV} to an Envoy 1.40 binary")
    return Path(found)


def demo(options: argparse.Namespace) -> int:
    """Run everything until Ctrl-C.

    Args:
        options: `config` (tokenway.yaml), `listen`, `envoy_admin_port`, `time_scale`.
    """
    config, clusters = load_all(options.config)
    envoy = envoy_binary()
    host, _, port = options.listen.rpartition(":")
    run_dir = Path(config.server.run_dir)
    admin = f"http://{config.server.admin.address}:{config.server.admin.port}"
    engines = [spec for cluster in clusters for spec in cluster.endpoints]
    models = [name for model, section in config.models.items() for name in (model, *section.aliases)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="tokenway-demo-"))
        pids = {}
        for i, spec in enumerate(engines):
            command = [sys.executable, "-m", "simulator", "--port", str(spec.port), "--engine-id", str(i)]
            command += ["--profile", "demo", "--time-scale", str(options.time_scale)]
            command += [part for model in models for part in ("--model", model)]
            pids[_key(spec)] = _start(stack, command, logs / f"engine{i}.log")
        _start(stack, [sys.executable, "-m", "extproc.cli.main", "serve", str(options.config)], logs / "tokenway.log")
        _wait(f"{admin}/readyz", logs / "tokenway.log")
        rendered = logs / "envoy.yaml"
        rendered.write_text(
            bootstrap.render(
                bootstrap.template(),
                listen=(host.strip("[]"), int(port)),
                admin_port=options.envoy_admin_port,
                sockets=[str(socket_path(run_dir, index)) for index in range(config.server.workers)],
                allow_headers=config.request.allow_headers,
                max_body_bytes=config.request.max_body_bytes,
            )
        )
        _start(
            stack,
            [str(envoy), "-c", str(rendered), "--concurrency", "2", "--use-dynamic-base-id", "-l", "warning"],
            logs / "envoy.log",
        )
        _wait(f"http://{options.listen}/v1/models", logs / "envoy.log")
        print(_banner(options, models[-1] if models else "", pids, admin, logs), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    print("\nstopped")
    return 0


def _key(spec: EndpointSpec) -> str:
    return f"{spec.address}:{spec.port}"


def _start(stack: contextlib.ExitStack, command: list[str], log: Path) -> int:
    """Start a process that ends with the stack; returns its pid."""
    output = stack.enter_context(log.open("w"))
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)  # noqa: S603

    def stop() -> None:
        process.terminate()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)
    return process.pid


def _wait(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(url, timeout=1) as response:  # noqa: S310 - our own http address
                if response.status == 200:
                    return
        time.sleep(0.05)
    raise TimeoutError(f"{url} did not answer within {START_TIMEOUT_S:.0f} s; see {log}")


def _banner(
    options: argparse.Namespace, model: str, pids: dict[str, int], admin: str, logs: Path
) -> str:
    engines = "\n".join(f"    {key}   pid {pid}" for key, pid in pids.items())
    return f"""
Tokenway is up: Envoy on http://{options.listen}, admin on {admin}, logs in {logs}
Engines (simulated; kill one, nothing breaks):
{engines}

Try it:

  curl -N http://{options.listen}/v1/chat/completions -H 'content-type: application/json' -d '{{
    "model": "{model}", "stream": true, "max_tokens": 32,
    "messages": [{{"role": "user", "content": "Say hello."}}]}}'

  tokenway explain --last        why it went where it went    (.venv/bin/tokenway)
  tokenway top                   live endpoints
  edit {bootstrap.shipped("etc/clusters.json")}    takes effect within 2 s

Ctrl-C stops everything.
"""
