"""Routers from the package index as they run beside ours: which, and by which command line.

Each with its own defaults but for the policy, the level of its log and how soon it looks for its engines.
`benchmarks.peer_environment` installs them.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp

from benchmarks import peer_environment, processes
from benchmarks.peer_environment import PYTHON
from benchmarks.real_engines import MODEL, PROFILE, START_TIMEOUT_S, Engine, Front, until_completes
from benchmarks.setups import serves
from testbed.processes import free_port
from tokenway.simulator.engine.profile import PROFILES


@dataclass(frozen=True, slots=True)
class Router:
    """One router with one policy; a `Gateway` of `benchmarks.real_engines`.

    Attributes:
        distribution: Whose wheel.
        policy: Its own name for it.
        module: That is run, with what it takes before all options.
        options: Of the command line, whatever its engines.
        follows_events: It is given the engines' KV events and their tokenizer.
    """

    distribution: str
    policy: str
    module: tuple[str, ...]
    options: tuple[str, ...]
    follows_events: bool = False

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.distribution} {self.policy}"

    def command(self, port: int, metrics_port: int, urls: Sequence[str], *further: str) -> tuple[str, ...]:
        """The command line.

        Args:
            port: For clients, on 127.0.0.1.
            metrics_port: For its metrics, on 127.0.0.1.
            urls: Of the engines.
            further: Options.
        """
        return (
            *(str(PYTHON), "-m", *self.module, *self.options, "--policy", self.policy),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
            *("--worker-startup-check-interval", "1", *further, "--worker-urls", *urls),
        )

    @asynccontextmanager
    async def running(self, ports: Sequence[int]) -> AsyncIterator[tuple[int, int]]:
        """Before engines at ports of 127.0.0.1, killed at the end; yields its port and pid.

        Raises:
            TimeoutError: It does not start.
        """
        port = free_port()
        urls = [f"http://127.0.0.1:{each}" for each in ports]
        with processes.running(*self.command(port, free_port(), urls)) as pid:
            await processes.until(lambda: serves(port), self.name, START_TIMEOUT_S)
            yield port, pid

    @asynccontextmanager
    async def serving(
        self, engines: Sequence[Engine], run_dir: Path, tokenizer: Path
    ) -> AsyncIterator[Front]:
        """See `Gateway`."""
        del run_dir
        port = free_port()
        command = self.command(
            port, free_port(), [engine.url for engine in engines], *self.following(engines)
        )
        environment = ("env", f"VLLM_ROUTER_TOKENIZER={tokenizer.parent}") if self.follows_events else ()
        with processes.running(*environment, *command) as pid:
            url = f"http://127.0.0.1:{port}"
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
                await until_completes(session, url, self.name)
            yield Front(url, None, {"router": (pid,)})

    def following(self, engines: Sequence[Engine]) -> tuple[str, ...]:
        """Options that name the engines' KV events; none for those that do not take them."""
        if not self.follows_events:
            return ()
        sources = [("--kv-event-source", f"{engine.url}={engine.events}") for engine in engines]
        replays = [("--kv-event-replay-source", f"{engine.url}={engine.replay}") for engine in engines]
        return (
            *(word for pair in (*sources, *replays) for word in pair),
            *("--kv-event-block-size", str(PROFILES[PROFILE].block_size), "--kv-event-model", MODEL),
        )


_SMG: Final = (
    ("smg", "launch"),
    ("--log-level", "warn", "--backend", "vllm", "--disable-tokenizer-autoload"),
)
_VLLM: Final = (("vllm_router.launch_router",), ("--log-level", "warning"))
_SGLANG: Final = (("sglang_router.launch_router",), ("--log-level", "warn"))

COMPARED: Final = (
    Router("smg", "cache_aware", *_SMG),
    Router("vllm-router", "cache_aware", *_VLLM),
    Router("sglang-router", "cache_aware", *_SGLANG),
)
"""What each of them is known for."""

ALSO: Final = (
    Router("vllm-router", "kv_aware", *_VLLM, follows_events=True),
    Router("smg", "prefix_hash", *_SMG),
    Router("smg", "round_robin", *_SMG),
    Router("vllm-router", "round_robin", *_VLLM),
    Router("sglang-router", "round_robin", *_SGLANG),
)
"""Taken if they are asked for."""


def add_only(parser: argparse.ArgumentParser) -> None:
    """The option `--only`, for `chosen`."""
    names = ", ".join(router.name for router in (*COMPARED, *ALSO))
    parser.add_argument("--only", help=f"routers by comma, of {names}; by default each with its cache rule")


def chosen(parser: argparse.ArgumentParser, only: str | None) -> tuple[Router, ...]:
    """The routers of a run, installed; what there is and what is left out is printed.

    Args:
        parser: Ends the program where no router has such a name.
        only: Their names by comma; None for those of `COMPARED`.
    """
    known = {router.name: router for router in (*COMPARED, *ALSO)}
    wanted = [router.name for router in COMPARED] if only is None else only.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"no router is called {', '.join(unknown)}; there are {', '.join(known)}")
    installed = peer_environment.install()
    for name in peer_environment.ROUTERS:
        found = f"{name} {installed[name]}" if name in installed else f"left out: {name} cannot be had here"
        print(found, flush=True)
    return tuple(known[name] for name in wanted if known[name].distribution in installed)
