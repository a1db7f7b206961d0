"""What `benchmarks.real_path` compares: Tokenway by one rule, alone, with workers, or several gateways."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml

from benchmarks import processes
from benchmarks.real_engines import (
    ENGINES,
    MODEL,
    START_TIMEOUT_S,
    Engine,
    Front,
    until_answers,
    until_completes,
    value_of,
)
from benchmarks.setups import ENVOY, envoy_config, python_module
from extproc.config.loading import parse
from extproc.errors import ConfigError
from testbed import redis_server
from testbed.processes import free_port

CLUSTER: Final = "engines"


def folder_of(run_dir: Path, number: int = 0) -> Path:
    """Where a gateway's configuration, clusters, bootstrap and sockets are."""
    return run_dir / str(number)


@dataclass(frozen=True, slots=True)
class Setup:
    """One line of the comparison.

    Attributes:
        name: For reports.
        algorithm: `load_balancing.algorithm` of the model.
        replayed: Name of the same rule in `tokenway.simulator.replay`.
        is_rival: It sets the knee.
        workers: Of Tokenway, all of which choose among the same engines.
        gateways: Tokenways that share load by a redis-server, each with an Envoy; requests take turns.
        sections: Further sections of tokenway.yaml.
    """

    name: str
    algorithm: str
    replayed: str
    is_rival: bool = True
    workers: int = 1
    gateways: int = 1
    sections: Mapping[str, Any] = field(default_factory=dict)

    @asynccontextmanager
    async def serving(
        self, engines: Sequence[Engine], run_dir: Path, tokenizer: Path
    ) -> AsyncIterator[Front]:
        """Tokenway and Envoy, each so often as there are gateways; see `Gateway`.

        Every engine's announcements are followed before they are there, and every gateway sees all others.
        """
        endpoints = [{"address": "127.0.0.1", "port": engine.port} for engine in engines]
        clusters = {"clusters": [{"name": CLUSTER, "endpoints": endpoints}]}
        async with AsyncExitStack() as stack:
            store = ""
            if self.gateways > 1:
                redis = stack.enter_context(redis_server.running(run_dir / "redis"))
                store = f"redis://127.0.0.1:{redis.port}"
            session = await stack.enter_async_context(
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0))
            )
            running = []
            for number in range(self.gateways):
                folder = folder_of(run_dir, number)
                folder.mkdir()
                (folder / "clusters.json").write_text(json.dumps(clusters))
                running.append(_start(stack, self, folder, tokenizer, store))
            for each in running:
                await _until_ready(session, each, self.gateways)
            roles: dict[str, tuple[int, ...]] = {
                "tokenway": tuple(each.gateway_pid for each in running),
                "envoy": tuple(each.envoy_pid for each in running),
            }
            first, *others = running
            yield Front(
                first.url,
                first.admin_url,
                roles,
                first.envoy_admin_url,
                tuple(each.url for each in others),
                tuple(each.admin_url for each in others),
            )


@dataclass(frozen=True, slots=True)
class _Running:
    url: str
    admin_url: str
    envoy_admin_url: str
    gateway_pid: int
    envoy_pid: int


def _start(stack: AsyncExitStack, setup: Setup, folder: Path, tokenizer: Path, store: str) -> _Running:
    """One gateway with its Envoy; `store` is where gateways meet, empty where there is one."""
    port, envoy_admin_port, admin_port = free_port(), free_port(), free_port()
    config = folder / "tokenway.yaml"
    config.write_text(gateway_config(setup, str(folder), admin_port, str(tokenizer.parent), store))
    sockets = [str(folder / f"gw{worker}.sock") for worker in range(setup.workers)]
    bootstrap = folder / "envoy.yaml"
    bootstrap.write_text(
        envoy_config("tokenway", port, envoy_admin_port, sockets[0], [], other_sockets=sockets[1:])
    )
    quiet = ("--concurrency", "1", "--use-dynamic-base-id", "-l", "off")
    return _Running(
        f"http://127.0.0.1:{port}",
        f"http://127.0.0.1:{admin_port}",
        f"http://127.0.0.1:{envoy_admin_port}",
        stack.enter_context(python_module("tokenway.cli.main", "serve", str(config))),
        stack.enter_context(processes.running(str(ENVOY), "-c", str(bootstrap), *quiet)),
    )


async def _until_ready(session: aiohttp.ClientSession, gateway: _Running, gateways: int) -> None:
    await until_answers(session, f"{gateway.admin_url}/readyz", "tokenway")
    await until_completes(session, gateway.url, "envoy")
    await processes.until(lambda: _announcing(session, gateway.admin_url), "events", START_TIMEOUT_S)
    if gateways > 1:
        await processes.until(
            lambda: _sees(session, gateway.admin_url, gateways), "gateways", START_TIMEOUT_S
        )


async def _announcing(session: aiohttp.ClientSession, admin_url: str) -> bool:
    async with session.get(f"{admin_url}/endpoints") as reply:
        rows = (await reply.json())["endpoints"]
    return len(rows) == ENGINES and all(row["announcing"] for row in rows)


async def _sees(session: aiohttp.ClientSession, admin_url: str, gateways: int) -> bool:
    async with session.get(f"{admin_url}/metrics") as reply:
        seen = value_of(await reply.text(), "tokenway_sharing_gateways")
    return seen == gateways


def _ours(name: str, replayed: str, holds: bool, workers: int, gateways: int) -> Setup:
    """Our own rule, sent at once or held."""
    more = f" ({workers} workers)" if workers > 1 else f" ({gateways} gateways)" if gateways > 1 else ""
    return Setup(
        name + more,
        "least_completion",
        replayed,
        is_rival=False,
        workers=workers,
        gateways=gateways,
        sections={"holding": {"enabled": holds}},
    )


SETUPS: Final = (
    *(Setup(name, name, name) for name in ("round_robin", "least_request", "inference_lb")),
    *(
        setup
        for workers, gateways in ((1, 1), (2, 1), (1, 2))
        for setup in (
            _ours("least_completion", "least_completion", holds=False, workers=workers, gateways=gateways),
            _ours(
                "least_completion + holding",
                "late_completion",
                holds=True,
                workers=workers,
                gateways=gateways,
            ),
        )
    ),
)


def gateway_config(setup: Setup, run_dir: str, admin_port: int, tokenizer: str, store: str = "") -> str:
    """tokenway.yaml of a set-up.

    Args:
        setup: Which.
        run_dir: For its socket.
        admin_port: On 127.0.0.1.
        tokenizer: Folder of the model's tokenizer.
        store: URL of what several gateways share load by; empty for none.
    """
    sharing = {"metadata_center": {"url": store}} if store else {}
    return yaml.safe_dump(
        {
            "server": {
                "run_dir": run_dir,
                "admin": {"port": admin_port},
                "drain_s": 0,
                "workers": setup.workers,
            },
            "logging": {"requests": False, "level": "warning"},
            "models": {
                MODEL: {
                    "rules": [{"cluster": CLUSTER}],
                    "tokenizer": tokenizer,
                    "load_balancing": {"algorithm": setup.algorithm},
                }
            },
            **sharing,
            **setup.sections,
        }
    )


def refusal(setup: Setup) -> str | None:
    """Why Tokenway does not take a set-up's configuration, or None."""
    try:
        parse(gateway_config(setup, "/run", 1, "/tokenizer"), setup.name)
    except ConfigError as error:
        return str(error)
    return None
