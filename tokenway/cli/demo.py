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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import ProxyHandler, build_opener

from extproc.config.loading import clusters_path, load_all
from extproc.observing.wording import counted
from extproc.server.envoys.bootstrap import shipped
from extproc.server.process.modules import ROOT, python_module
from metadata_center.addresses import Address
from tokenway.cli.bootstrap import listen_address, rendered
from tokenway.cli.demo_needs import ENGINES_HOST, refuse_taken, refuse_unfit
from tokenway.cli.envoy import envoy_binary

START_TIMEOUT_S = 30.0

SAMPLES = ("etc/tokenway.yaml", "etc/clusters.json", "etc/tokenway.schema.json")


class Started(NamedTuple):
    """A process of the demo and what it writes."""

    process: subprocess.Popen[bytes]
    log: Path


def demo(
    path: Path | None,
    listen: str,
    envoy_admin_port: int,
    time_scale: float,
    *,
    default_admin: str,
) -> int:
    """Run everything until Ctrl-C.

    Args:
        path: tokenway.yaml or clusters.json; None for a copy of the shipped sample.
        listen: `ip:port` for clients.
        envoy_admin_port: On loopback.
        time_scale: Real seconds per simulated second of the engines.
        default_admin: Where `explain` and `top` ask unless an option says otherwise.

    Raises:
        ConfigError: The configuration cannot be used.
        OSError: Something cannot be started.
    """
    source = path or shipped("etc/tokenway.yaml")
    config, clusters = load_all(source)
    refuse_unfit(source, config, clusters)
    envoy = envoy_binary()
    admin = f"http://{Address(config.server.admin.address, config.server.admin.port)}"
    models = [name for model, section in config.models.items() for name in (model, *section.aliases)]
    # An address that two clusters list is one engine.
    specs = [*{spec.port: spec for cluster in clusters for spec in cluster.endpoints}.values()]
    refuse_taken(
        [
            (listen_address(listen), "Envoy (--listen)"),
            ((ENGINES_HOST, envoy_admin_port), "Envoy's own admin surface (--envoy-admin-port)"),
            (
                (config.server.admin.address, config.server.admin.port),
                "the gateway's admin port (server.admin of --config)",
            ),
            *(((ENGINES_HOST, spec.port), "a simulated engine (its endpoint in --config)") for spec in specs),
        ]
    )
    _end_on_signal()
    folder = Path(tempfile.mkdtemp(prefix="tokenway-demo-"))
    path = path or _samples(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_removed_unless_failed(folder))  # when all that is started has ended
        print(f"Starting {counted(len(specs), 'simulated engine')} and the gateway ...", flush=True)
        engines = [
            _start_engine(stack, number, spec.port, models, time_scale, folder)
            for number, spec in enumerate(specs)
        ]
        serve = python_module("tokenway.cli.main", "serve", str(path))
        gateway = _start(stack, serve, folder / "tokenway.log")
        for spec, engine in zip(specs, engines, strict=True):
            _wait(f"http://127.0.0.1:{spec.port}/health", engine)
        _wait(f"{admin}/readyz", gateway)
        print("Starting Envoy ...", flush=True)
        bootstrap = rendered(config, listen, envoy_admin_port)
        _wait(f"http://{listen}/v1/models", _start_envoy(stack, envoy, bootstrap, folder))
        asking = "" if admin == default_admin else f" --admin {admin}"
        keys = [str(Address(spec.address, spec.port)) for spec in specs]
        pids = {key: engine.process.pid for key, engine in zip(keys, engines, strict=True)}
        model = models[-1] if models else ""
        editable = clusters_path(config, path) if path.suffix != ".json" else path
        command = own_command(Path(sys.argv[0]))
        print(_banner(listen, model, pids, admin, folder, command, asking, editable), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    print("\nstopped")
    return 0


@contextlib.contextmanager
def _removed_unless_failed(folder: Path) -> Iterator[None]:
    """The folder goes when the block ends, by Ctrl-C as well; what says why a start failed is kept."""
    has_failed = False
    try:
        yield
    except Exception:
        has_failed = True
        raise
    finally:
        if not has_failed:
            shutil.rmtree(folder)


def _end_on_signal() -> None:
    """A closed terminal, too, ends what is started here."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))


def own_command(script: Path) -> str:
    """The command that, typed here, runs this very installation again.

    Args:
        script: What was run this time: `sys.argv[0]`.
    """
    path_entries = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found_by = f"PYTHONPATH={ROOT} " if any(entry.absolute() == ROOT for entry in path_entries) else ""
    if script.name != "tokenway":
        return f"{found_by}{sys.executable} -m tokenway"
    on_path = shutil.which("tokenway")
    if on_path is not None and Path(on_path).resolve() == script.resolve():
        return f"{found_by}tokenway"
    absolute = script.absolute()
    near = absolute.is_relative_to(Path.cwd()) and absolute.parent != Path.cwd()
    return f"{found_by}{absolute.relative_to(Path.cwd()) if near else absolute}"


def _samples(folder: Path) -> Path:
    """Copy the shipped configuration to where its user may edit it; the path of the tokenway.yaml."""
    for name in SAMPLES:
        shutil.copyfile(shipped(name), folder / Path(name).name)
    return folder / "tokenway.yaml"


def _start_engine(
    stack: contextlib.ExitStack, number: int, port: int, models: list[str], time_scale: float, folder: Path
) -> Started:
    """Start a simulated engine on loopback that serves all models."""
    words = ["--port", str(port), "--engine-id", str(number), "--profile", "demo"]
    words += ["--time-scale", str(time_scale)]
    words += [word for model in models for word in ("--model", model)]
    return _start(stack, python_module("tokenway.simulator", *words), folder / f"engine{number}.log")


def _start_envoy(stack: contextlib.ExitStack, envoy: Path, bootstrap: str, folder: Path) -> Started:
    """Start Envoy with this bootstrap."""
    configured = folder / "envoy.yaml"
    configured.write_text(bootstrap)
    words = ["-c", str(configured), "--concurrency", "2", "--use-dynamic-base-id", "-l", "warning"]
    return _start(stack, [str(envoy), *words], folder / "envoy.log")


def _start(stack: contextlib.ExitStack, command: list[str], log: Path) -> Started:
    """Start a process that ends with the stack."""
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
    return Started(process, log)


def _wait(url: str, started: Started) -> None:
    """Wait until `url` answers.

    Raises:
        OSError: The process ended, or nothing came in time; names the log and shows its last line.
    """
    asking = build_opener(ProxyHandler({}))  # what was started here, of no proxy
    deadline = time.monotonic() + START_TIMEOUT_S
    why = f"did not answer within {START_TIMEOUT_S:.0f} s"
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            asking.open(url, timeout=1) as response,
        ):
            if response.status == 200:
                return
        if started.process.poll() is not None:
            why = "cannot answer: its process ended"
            break
        time.sleep(0.05)
    *_, last = ["nothing", *started.log.read_text(errors="replace").splitlines()]
    raise OSError(f"{url} {why}; {started.log} ends with: {last}")


def _banner(
    listen: str,
    model: str,
    pids: dict[str, int],
    admin: str,
    folder: Path,
    command: str,
    asking: str,
    clusters_file: Path,
) -> str:
    engines = "\n".join(f"    {key}   pid {pid}" for key, pid in pids.items())
    return f"""
Tokenway is up: Envoy on http://{listen}, admin on {admin}, logs in {folder}
Engines (simulated; kill one, nothing breaks):
{engines}

Try it:

  curl -N http://{listen}/v1/chat/completions -H 'content-type: application/json' -d '{{
    "model": "{model}", "stream": true, "max_tokens": 32,
    "messages": [{{"role": "user", "content": "Say hello."}}]}}'

  {command} explain --last{asking}
      why it went where it went
  {command} top{asking}
      live endpoints
  edit {clusters_file}
      takes effect within 2 s

Ctrl-C stops everything and removes the folder of logs.
"""
