"""A real vLLM on one CPU core, as a process that a test may kill and start again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp

from testbed.processes import Subprocess, free_port, get, get_json
from testbed.vllm.environment.install import MODEL, VLLM
from testbed.vllm.environment.make_model import ADAPTERS, MAX_TOKENS

SERVED_MODEL: Final = "tiny"
BLOCK_TOKENS: Final = 32
"""The smallest block of vLLM's CPU attention."""

KV_BYTES: Final = 32 << 20
KV_TOKENS: Final = 16_384
"""What fits into `KV_BYTES` at 2,048 bytes per token: small enough for a test to overflow."""

START_TIMEOUT_S: Final = 240.0
"""Two at once took 29 s on two idle cores, and 106 s on cores that ten others wanted as well."""

STOP_TIMEOUT_S: Final = 15.0
"""An idle engine ended within 2 s of SIGTERM."""

POLL_S: Final = 0.25
"""Between looks at a starting engine: finer ones would take the core it needs."""

Transport = Literal["tcp", "ipc"]


class Vllm:
    """One replica with prefix caching, KV events and LoRA adapters, on one core.

    The engine binds its event sockets and publishes their addresses under `/kv_event_sources`. `tcp` takes
    free ports of loopback, so they change with every start; `ipc` keeps its addresses.

    Args:
        folder: For its log and sockets; short, for a Unix socket's path takes 107 bytes.
        core: The CPU core its compute threads are bound to.
        transport: Of its event sockets.
    """

    def __init__(self, folder: Path, core: int, transport: Transport) -> None:
        self.port = free_port()
        self.transport = transport
        self.log = folder / f"{transport}.log"
        self._core = core
        ipc = f"ipc://{folder}"
        events, replay = (f"{ipc}/events", f"{ipc}/replay") if transport == "ipc" else ("tcp://*:0",) * 2
        self._kv_events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": events,
            "replay_endpoint": replay,
            "topic": "kv-events",
        }
        self._process: Subprocess | None = None

    @property
    def key(self) -> str:
        """`ip:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """For direct requests."""
        return f"http://{self.key}"

    async def launch(self) -> None:
        """Start the process."""
        self._process = await Subprocess.start(
            [
                *(str(VLLM / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", str(MODEL), "--served-model-name", SERVED_MODEL),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--dtype", "bfloat16", "--max-model-len", str(MAX_TOKENS), "--enforce-eager"),
                *("--block-size", str(BLOCK_TOKENS), "--kv-cache-memory-bytes", str(KV_BYTES)),
                *("--enable-prompt-tokens-details", "--enable-per-request-metrics"),
                *("--enable-lora", "--max-loras", str(len(ADAPTERS)), "--max-lora-rank", "8"),
                *("--kv-events-config", json.dumps(self._kv_events)),
            ],
            self.log,
            {
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
                "VLLM_HOST_IP": "127.0.0.1",
                "VLLM_CPU_OMP_THREADS_BIND": str(self._core),
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            },
        )

    async def ready(self) -> None:
        """Wait until it is healthy, and load the adapters.

        Raises:
            AssertionError: It ended, or took too long; shows the end of its log.
        """
        process = self._process
        assert process is not None
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not await self._is_healthy():
            tail = self.log.read_text(errors="replace")[-2000:]
            assert process.is_running, f"vLLM ended:\n{tail}"
            assert time.monotonic() < deadline_s, f"vLLM is not healthy after {START_TIMEOUT_S} s:\n{tail}"
            await asyncio.sleep(POLL_S)
        for name in ADAPTERS:
            await self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(MODEL / "adapters" / name))

    async def start(self) -> None:
        """Start, and wait until it serves the model and the adapters."""
        await self.launch()
        await self.ready()

    async def kill(self) -> None:
        """SIGKILL, to all its processes."""
        if self._process is not None:
            await self._process.kill()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL to whatever is left."""
        process = self._process
        if process is None:
            return
        if process.is_running:
            process.signal(signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.ended()
        await process.kill()

    async def post(self, path: str, **body: Any) -> bytes:
        """The answer to a direct request that must succeed."""
        timeout = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(self.url + path, json=body) as reply,
        ):
            answer = await reply.read()
            assert reply.status == 200, f"{path}: {reply.status} {answer[-500:]!r}"
            return answer

    async def event_source(self) -> dict[str, Any]:
        """Where it publishes its KV events, as it says itself."""
        source: dict[str, Any] = (await get_json(f"{self.url}/kv_event_sources"))["0"]
        return source

    async def _is_healthy(self) -> bool:
        try:
            await get(f"{self.url}/health")
        except (aiohttp.ClientError, TimeoutError, AssertionError):
            return False
        return True


@asynccontextmanager
async def running_replicas(folder: Path) -> AsyncIterator[list[Vllm]]:
    """Two replicas, one per transport, on the first and the last core; nothing of them is left afterwards."""
    cores = sorted(os.sched_getaffinity(0))
    replicas = [Vllm(folder, cores[0], "tcp"), Vllm(folder, cores[-1], "ipc")]
    try:
        await asyncio.gather(*(replica.start() for replica in replicas))
        yield replicas
    finally:
        await asyncio.gather(*(replica.stop() for replica in replicas))
