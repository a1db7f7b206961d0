"""`tokenway demo`: Envoy, simulated engines and the gateway in the foreground, to be tried and broken."""

from __future__ import annotations

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

from extproc.cli.bootstrap import rendered
from extproc.config.loading import load_all
from extproc.server.bootstrap import shipped

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


def demo(path: Path | None, listen: str, envoy_admin_port: int, time_scale: float) -> int:
    """Run everything until Ctrl-C.

    Args:
        path: tokenway.yaml; None for the shipped sample.
        listen: `ip:port` for clients.
        envoy_admin_port: On loopback.
        time_scale: Real seconds per simulated second of the engines.

    Raises:
        ConfigError: The configuration cannot be used.
        OSError: Something cannot be started.
    """
    path = path or shipped("etc/tokenway.yaml")
    config, clusters = load_all(path)
    envoy = envoy_binary()
    admin = f"http://{config.server.admin.address}:{config.server.admin.port}"
    models = [name for model, section in config.models.items() for name in (model, *section.aliases)]
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal too ends what was started here
        signal.signal(number, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="tokenway-demo-"))
        pids = {}
        for i, spec in enumerate(spec for cluster in clusters for spec in cluster.endpoints):
            command = [
                sys.executable,
                "-m",
                "tokenway.simulator",
                "--port",
                str(spec.port),
                "--engine-id",
                str(i),
            ]
            command += ["--profile", "demo", "--time-scale", str(time_scale)]
            command += [part for model in models for part in ("--model", model)]
            pids[f"{spec.address}:{spec.port}"] = _start(stack, command, logs / f"engine{i}.log")
        command = [sys.executable, "-m", "extproc.cli.main", "serve", str(path)]
        _start(stack, command, logs / "tokenway.log")
        _wait(f"{admin}/readyz", logs / "tokenway.log")
        configured = logs / "envoy.yaml"
        configured.write_text(rendered(config, listen, envoy_admin_port))
        command = [str(envoy), "-c", str(configured), "--concurrency", "2", "--use-dynamic-base-id"]
        _start(stack, [*command, "-l", "warning"], logs / "envoy.log")
        _wait(f"http://{listen}/v1/models", logs / "envoy.log")
        print(_banner(listen, models[-1] if models else "", pids, admin, logs), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    print("\nstopped")
    return 0


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
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(url, timeout=1) as response,  # noqa: S310 - our own http address
        ):
            if response.status == 200:
                return
        time.sleep(0.05)
    raise TimeoutError(f"{url} did not answer within {START_TIMEOUT_S:.0f} s; see {log}")


def _banner(listen: str, model: str, pids: dict[str, int], admin: str, logs: Path) -> str:
    engines = "\n".join(f"    {key}   pid {pid}" for key, pid in pids.items())
    return f"""
Tokenway is up: Envoy on http://{listen}, admin on {admin}, logs in {logs}
Engines (simulated; kill one, nothing breaks):
{engines}

Try it:

  curl -N http://{listen}/v1/chat/completions -H 'content-type: application/json' -d '{{
    "model": "{model}", "stream": true, "max_tokens": 32,
    "messages": [{{"role": "user", "content": "Say hello."}}]}}'

  .venv/bin/tokenway explain --last     why it went where it went
  .venv/bin/tokenway top                live endpoints
  edit {shipped("etc/clusters.json")}   takes effect within 2 s

Ctrl-C stops everything.
"""
