"""Somebody empties `server.run_dir` under a gateway that runs, as a cleaner of /tmp does."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from testbed.processes import get_json
from tests.e2e.harness import Stack, chat, cluster, eventually, post, recording, running_stack

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.parametrize(
    ("workers", "transport"), [(1, "native"), (1, "grpcio"), (2, "native"), (2, "grpcio")]
)
async def test_a_run_dir_that_is_gone_is_made_anew(workers: int, transport: str) -> None:
    """Envoy, one that starts anew as well, finds the gateway again, and workers find each other."""
    async with recording() as recorder:
        folder = Path(f"/tmp/tokenway-run-{os.getpid()}")
        config = {
            "models": {"m": {"rules": [{"cluster": "c"}]}},
            "server": {"run_dir": str(folder), "transport": transport},
        }
        try:
            async with running_stack([cluster("c", [recorder.key])], config, workers=workers) as stack:
                assert await _is_decided(stack)
                files = _listed(folder)
                shutil.rmtree(folder)
                wanted = [name for name in files if not name.startswith("load")]
                await eventually(lambda: _looked(folder), lambda there: set(wanted) <= set(there))
                assert _mode(folder) & 0o077 == 0
                await eventually(lambda: _is_decided(stack), bool)
                await stack.envoy.kill()
                await stack.start_envoy()
                await eventually(lambda: _is_decided(stack), bool)
                _empty(folder)
                await eventually(lambda: _looked(folder), lambda there: set(wanted) <= set(there))
                if workers > 1:
                    await _replace_a_worker(stack)
                await eventually(lambda: _is_decided(stack), bool)
                scraped = await stack.metrics()
                assert set(_samples(scraped, "tokenway_sockets_in_place")) == {1}
                assert max(_samples(scraped, "tokenway_socket_renewals_total")) >= 2
                stack.gateway.signal(signal.SIGTERM)
                assert await stack.gateway.ended() == 0
                assert _listed(folder) == ["lock"]
        finally:
            shutil.rmtree(folder, ignore_errors=True)


async def _is_decided(stack: Stack) -> bool:
    """One request is answered, and by our decision."""
    before = {record["request_id"] for record in await stack.last(4)}
    assert (await post(stack, chat("m", "hello"))).status == 200
    return bool({record["request_id"] for record in await stack.last(4)} - before)


def _listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _samples(scrape: str, name: str) -> list[float]:
    """Of all workers."""
    lines = [line for line in scrape.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return [float(line.rpartition(" ")[2]) for line in lines]


async def _looked(folder: Path) -> list[str]:
    return _listed(folder)


def _mode(folder: Path) -> int:
    return folder.stat().st_mode


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


async def _replace_a_worker(stack: Stack) -> None:
    """One dies; its successor finds the counters that the other one has."""
    old = stack.gateway.children()
    os.kill(old[0], signal.SIGKILL)

    async def workers() -> list[int]:
        return stack.gateway.children()

    await eventually(workers, lambda pids: len(pids) == len(old) and old[0] not in pids, 20)
    await eventually(lambda: _number_ready(stack), lambda number: number == len(old), 20)


async def _number_ready(stack: Stack) -> int:
    ready: int = (await get_json(f"{stack.admin_url}/readyz")).get("workers_ready", 1)
    return ready
