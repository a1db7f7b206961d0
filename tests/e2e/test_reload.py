"""Configuration changed while requests run: in force within two seconds, and no client notices."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from extproc.server.listening.run_dir import counters_path
from tests.e2e.harness import (
    Load,
    Stack,
    answer_chat,
    chat,
    cluster,
    eventually,
    key_of,
    post,
    recording,
    running_stack,
    sample,
    simulators,
)
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

EFFECTIVE_S = 2.0
"""What the product promises between a saved file and its effect."""

CLUSTERS_SUCCESS = 'tokenway_config_last_reload_successful{file="clusters.json"}'
CONFIG_SUCCESS = 'tokenway_config_last_reload_successful{file="tokenway.yaml"}'
MODELS = {"sim": {"rules": [{"cluster": "sim"}]}}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def replicas() -> AsyncIterator[list[SimulatorServer]]:
    """Four replicas, half as fast as the modelled engine, so that streams outlive a reload."""
    async with simulators(4, time_scale=2.0) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def editable(replicas: list[SimulatorServer]) -> AsyncIterator[Stack]:
    """A gateway whose files the tests edit; each test first restores them."""
    async with running_stack([_pool(replicas)], {"models": MODELS}) as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="session")
async def stack(editable: Stack, replicas: list[SimulatorServer]) -> AsyncIterator[Stack]:
    """The gateway with all four replicas and default settings in force."""
    editable.write_config({"models": MODELS})
    editable.write_clusters(_pool(replicas))
    await _in_force(editable, replicas)
    yield editable
    await editable.settled()


def _pool(engines: list[SimulatorServer]) -> dict[str, Any]:
    return cluster("sim", map(key_of, engines))


async def _in_force(stack: Stack, engines: list[SimulatorServer]) -> None:
    """Wait, no longer than promised, until exactly these replicas are served."""
    await eventually(lambda: _serving(stack, engines), bool, EFFECTIVE_S)


async def _serving(stack: Stack, engines: list[SimulatorServer]) -> bool:
    """Both the gateway and Envoy know exactly these endpoints, and the last reload went well."""
    wanted = {key_of(engine) for engine in engines}
    envoy = await stack.envoy_clusters()
    envoy_keys = {
        line.split("::")[1]
        for line in envoy.splitlines()
        if line.startswith("sim::127") and "::health_flags::" in line and "draining" not in line
    }
    scrape = await stack.metrics()
    went_well = sample(scrape, CLUSTERS_SUCCESS) == sample(scrape, CONFIG_SUCCESS) == 1
    return went_well and (await stack.rows()).keys() == wanted == envoy_keys


def _served(engines: list[SimulatorServer]) -> list[int]:
    return [len(engine.served) for engine in engines]


async def test_endpoints_change_under_load(stack: Stack, replicas: list[SimulatorServer]) -> None:
    """Endpoints removed, added and swapped under load are in force within two seconds and fail no request."""
    async with Load(stack, "sim", clients=8, stream=True) as load:
        for chosen in (replicas[:2], replicas, replicas[2:], replicas[:2]):
            stack.write_clusters(_pool(chosen))
            await _in_force(stack, chosen)
            before = _served(replicas)
            await load.more(24)
            after = _served(replicas)
            grew = {key_of(e) for e, old, new in zip(replicas, before, after, strict=True) if new > old}
            assert grew == {key_of(engine) for engine in chosen}
    assert load.failures == []


async def test_streams_on_a_removed_endpoint_finish(stack: Stack, replicas: list[SimulatorServer]) -> None:
    """Streams that run on an endpoint when it is removed finish intact, and so do their charges."""
    tasks = [
        asyncio.create_task(post(stack, chat("sim", f"long {number}", 150, stream=True)))
        for number in range(8)
    ]

    async def running() -> int:
        return sum(engine.engine.num_running for engine in replicas)

    await eventually(running, lambda count: count == 8)
    stack.write_clusters(_pool(replicas[:1]))
    await _in_force(stack, replicas[:1])
    assert sum(engine.engine.num_running for engine in replicas[1:]) == 6
    replies = await asyncio.gather(*tasks)
    assert all(reply.body.endswith(b"data: [DONE]\n\n") for reply in replies)
    assert all(reply.body.count(b'"delta":{"content":') == 150 for reply in replies)


async def test_whole_cluster_comes_and_goes(stack: Stack, replicas: list[SimulatorServer]) -> None:
    """A new model with a new cluster is served within two seconds, and unknown again once removed."""
    models = {**MODELS, "late": {"rules": [{"cluster": "late", "model": "sim"}]}}
    stack.write_clusters(_pool(replicas[:3]), cluster("late", [key_of(replicas[3])]))
    stack.write_config({"models": models})

    async def status() -> int:
        return (await post(stack, chat("late", "hello"))).status

    await eventually(status, lambda code: code == 200, EFFECTIVE_S)
    stack.write_config({"models": MODELS})
    await eventually(status, lambda code: code == 404, EFFECTIVE_S)


@pytest.mark.parametrize(
    ("workers", "holding"), [(1, False), (1, True), (2, False)], ids=["at-once", "waiting", "two-workers"]
)
async def test_clusters_are_renamed_under_load(
    replicas: list[SimulatorServer], workers: int, holding: bool
) -> None:
    """A cluster gets another name and its rule with it, four times: no request fails, waiting or not."""

    def named(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        pool = {**cluster(name, map(key_of, replicas)), **({"max_num_seqs": 2} if holding else {})}
        return pool, {"models": {"sim": {"rules": [{"cluster": name}]}}, "holding": {"enabled": holding}}

    pool, config = named("first")
    async with running_stack([pool], config, workers=workers) as stack:

        async def clusters() -> set[str]:
            return {record["cluster"] for record in await stack.last(2 * workers)}

        async with Load(stack, "sim", clients=24, stream=False, max_tokens=4) as load:
            for turn in range(4):
                name = f"turn-{turn}"
                pool, config = named(name)
                stack.write_clusters(pool)
                stack.write_config(config)
                await eventually(clusters, {name}.__eq__, EFFECTIVE_S + 1)
                await load.more(48)
    assert load.failures == [], f"{len(load.failures)} beside {load.answers} answers: {load.failures[:3]}"


_SHORT_LINGER = """
import importlib.util, sys


class Finder:
    def find_spec(self, name, path, target=None):
        if name != "extproc.server.envoys.publishing":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def shortened(module):
            execute(module)
            module.LINGER_S = 0.5

        spec.loader.exec_module = shortened
        return spec


sys.meta_path.insert(0, Finder())
"""


async def test_answers_outlast_the_cluster_that_they_run_on(
    replicas: list[SimulatorServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Envoy cuts none when the cluster leaves it, which is a minute early here."""
    (tmp_path / "sitecustomize.py").write_text(_SHORT_LINGER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    signals = {"first_byte_timeout_s": 3.0}  # as long as that a cluster stays
    config = {"models": {"sim": {"rules": [{"cluster": "first"}]}}, "signals": signals}
    async with running_stack([cluster("first", map(key_of, replicas))], config) as stack:
        asked = [
            asyncio.create_task(post(stack, chat("sim", f"long {number}", 600, stream=number % 2 == 0)))
            for number in range(8)
        ]

        async def running() -> int:
            return sum(engine.engine.num_running for engine in replicas)

        await eventually(running, lambda count: count == 8)
        stack.write_clusters(cluster("second", map(key_of, replicas)))
        stack.write_config({**config, "models": {"sim": {"rules": [{"cluster": "second"}]}}})
        await eventually(partial(stack.envoy_health, "first"), lambda found: not found)
        assert not any(task.done() for task in asked)
        assert (await post(stack, chat("sim", "meanwhile"))).status == 200
        replies = await asyncio.gather(*asked)
        assert [reply.status for reply in replies] == [200] * 8
        assert all(reply.body.count(b'"delta":{"content":') == 600 for reply in replies[::2])
        assert all(reply.json["usage"]["completion_tokens"] == 600 for reply in replies[1::2])
        await stack.settled()


async def test_a_slow_first_byte_is_followed_by_another_endpoint_of_a_cluster_that_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster stays as long as `signals.first_byte_timeout_s`, if that is longer than it stays anyway."""
    (tmp_path / "sitecustomize.py").write_text(_SHORT_LINGER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    async with recording() as one, recording() as other:

        async def answer_the_second(request: web.Request) -> web.StreamResponse:
            if len(one.received) + len(other.received) == 1:
                await asyncio.sleep(30)
            return await answer_chat(request)

        one.behaviour = other.behaviour = answer_the_second
        keys, signals = [one.key, other.key], {"first_byte_timeout_s": 6.0}
        config = {"models": {"sim": {"rules": [{"cluster": "first"}]}}, "signals": signals}
        async with running_stack([cluster("first", keys)], config) as stack:
            asked = asyncio.create_task(post(stack, chat("sim", "hello", stream=True)))

            async def arrived() -> int:
                return len(one.received) + len(other.received)

            await eventually(arrived, lambda count: count == 1)
            stack.write_clusters(cluster("second", keys))
            stack.write_config({**config, "models": {"sim": {"rules": [{"cluster": "second"}]}}})
            assert (await asked).status == 200
            assert await arrived() == 2


async def _stop_between_decisions(pid: int, run_dir: Path) -> None:
    """Stop a worker that does not hold the lock of the counters: others would wait for it in the kernel."""
    status = Path(f"/proc/{pid}/status")

    async def state() -> str:
        return await asyncio.to_thread(status.read_text)

    with counters_path(run_dir).open("rb") as counters:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await eventually(state, lambda text: "T (stopped)" in text)
            try:
                fcntl.flock(counters, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # that one, or the other worker
                os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(0.001)
            else:
                return


@pytest.mark.parametrize("survives", ["with Envoy", "without"])
async def test_a_worker_restarts_while_a_cluster_is_renamed(
    replicas: list[SimulatorServer], survives: str
) -> None:
    """It reads the files before the other worker does, which gives Envoy the cluster: no request fails."""

    def named(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return cluster(name, map(key_of, replicas)), {"models": {"sim": {"rules": [{"cluster": name}]}}}

    pool, config = named("first")
    async with running_stack([pool], config, workers=2) as stack:

        async def subscribed() -> list[int]:
            lines = (await stack.envoy_clusters()).splitlines()
            rows = [line for line in lines if line.startswith("tokenway-xds::") and "::rq_active::1" in line]
            return [int(row.partition("/gw")[2][0]) for row in rows]

        (has_envoy,) = await eventually(subscribed, lambda found: len(found) == 1)
        stays = has_envoy if survives == "with Envoy" else 1 - has_envoy
        pids = sorted(stack.gateway.children())
        socket = stack.run_dir / f"bus{1 - stays}.sock"

        async def is_back() -> bool:
            return socket.exists() and socket.stat().st_ctime_ns != before

        async def clusters() -> set[str]:
            return {record["cluster"] for record in await stack.last(4)}

        async with Load(stack, "sim", clients=8, stream=False, max_tokens=4) as load:
            await load.more(16)
            before = socket.stat().st_ctime_ns
            await _stop_between_decisions(pids[stays], stack.run_dir)
            pool, config = named("second")
            stack.write_clusters(pool)
            stack.write_config(config)
            os.kill(pids[1 - stays], signal.SIGKILL)
            await eventually(is_back, bool)
            await asyncio.sleep(0.5)  # it would decide by now
            os.kill(pids[stays], signal.SIGCONT)
            await load.more(16)
            await eventually(clusters, {"second"}.__eq__)
            await load.more(16)
    assert load.failures == [], f"{len(load.failures)} beside {load.answers} answers: {load.failures[:3]}"


async def test_a_cluster_that_envoy_refuses_takes_no_requests(
    stack: Stack, replicas: list[SimulatorServer]
) -> None:
    """Its rule does not come into force, and the log has Envoy's words; then it is repaired."""
    tls = {"refused": {"ca_file": "/nowhere/ca.pem", "server_name": "engines"}}
    models = {"sim": {"rules": [{"cluster": "refused"}]}}
    known = len(stack.gateway_log())
    stack.write_clusters(cluster("refused", map(key_of, replicas)))
    stack.write_config({"models": models, "engine_tls": tls})

    async def success() -> float | None:
        return sample(await stack.metrics(), CONFIG_SUCCESS)

    await eventually(success, lambda value: value == 0)  # its TLS is encoded by a process that starts first
    assert (await post(stack, chat("sim", "still here"))).status == 200
    assert (await stack.last(1))[0]["cluster"] == "sim"
    (problem,) = [
        entry["problem"] for entry in stack.gateway_log()[known:] if entry["event"] == "configuration refused"
    ]
    assert "Envoy refuses the cluster `refused`" in problem
    assert "/nowhere/ca.pem" in problem
    stack.write_config({"models": models})
    await eventually(success, lambda value: value == 1, EFFECTIVE_S)
    assert (await post(stack, chat("sim", "repaired"))).status == 200
    assert (await stack.last(1))[0]["cluster"] == "refused"


async def test_a_change_that_envoy_refuses_late_is_shown_for_as_long_as_it_goes_on_by_what_it_had(
    stack: Stack,
) -> None:
    """An Envoy that hangs is waited for 3 s; what it then refuses of a cluster that it has is as before."""
    models = {"sim": {"rules": [{"cluster": "sim"}]}}
    tls = {"sim": {"ca_file": "/nowhere/ca.pem", "server_name": "e"}}

    async def kept() -> float | None:
        return sample(await stack.metrics(), "tokenway_ads_kept_clusters")

    async def unacknowledged() -> list[Any]:
        event = "an Envoy has not acknowledged clusters that requests go to now"
        return [one["clusters"] for one in stack.gateway_log()[known:] if one["event"] == event]

    assert await kept() == 0
    known = len(stack.gateway_log())
    assert stack._envoy is not None
    stack._envoy.signal(signal.SIGSTOP)
    try:
        stack.write_config({"models": models, "engine_tls": tls})
        assert await eventually(unacknowledged, bool) == [["sim"]]
    finally:
        stack._envoy.signal(signal.SIGCONT)
    await eventually(kept, lambda value: value == 2)  # the cluster and the alias of its model
    refused = [one for one in stack.gateway_log()[known:] if one["event"] == "envoy refused resources"]
    assert {name for one in refused for name in one["kept"]} == {"model:sim", "sim"}
    stack.write_config({"models": models})
    await eventually(kept, lambda value: value == 0)
    assert (await post(stack, chat("sim", "repaired"))).status == 200


BROKEN_CLUSTERS = {
    "port": (lambda text, port: text.replace(f'"port": {port}', '"port": 99999', 1), "port"),
    "key": (lambda text, port: text.replace('"address"', '"adress"', 1), "adress"),
    "syntax": (lambda text, port: text.replace('"port": ', '"port" ', 1), None),
}


@pytest.mark.parametrize(("damage", "key"), BROKEN_CLUSTERS.values(), ids=BROKEN_CLUSTERS.keys())
async def test_broken_clusters_file(
    stack: Stack, replicas: list[SimulatorServer], damage: Callable[[str, int], str], key: str | None
) -> None:
    """A broken edit changes nothing, is named by line and key, and shows in the metrics until repaired."""
    text = json.dumps({"clusters": [_pool(replicas)]}, indent=1)
    broken = damage(text, replicas[0].port)
    line = next(
        number
        for number, (old, new) in enumerate(zip(text.splitlines(), broken.splitlines(), strict=True), 1)
        if old != new
    )
    known = len(stack.gateway_log())
    stack.write_clusters_text(broken)

    async def success() -> float | None:
        return sample(await stack.metrics(), CLUSTERS_SUCCESS)

    await eventually(success, lambda value: value == 0, EFFECTIVE_S)
    assert (await post(stack, chat("sim", "still here"))).status == 200
    assert (await stack.rows()).keys() == {key_of(engine) for engine in replicas}
    problems = [
        entry["problem"] for entry in stack.gateway_log()[known:] if entry["event"] == "configuration refused"
    ]
    assert any(f"line {line}:" in problem for problem in problems), problems
    assert key is None or any(key in problem for problem in problems)
    stack.write_clusters_text(text)
    await eventually(success, lambda value: value == 1, EFFECTIVE_S)


async def test_settings_change_under_load(stack: Stack, replicas: list[SimulatorServer]) -> None:
    """A new algorithm and new weights decide within two seconds, and no request fails."""
    async with Load(stack, "sim", clients=4, stream=False) as load:
        await load.more(4)
        balancing = {"algorithm": "prefix_cache", "prefill_load_weight": 7}
        stack.write_config({"models": {"sim": {**MODELS["sim"], "load_balancing": balancing}}})

        async def settings() -> tuple[str, float]:
            used = (await stack.last(1))[0]["settings"]
            return used["algorithm"], used["prefill_load_weight"]

        await eventually(settings, lambda used: used == ("prefix_cache", 7), EFFECTIVE_S)
        await load.more(4)
    assert load.failures == []


@pytest.mark.parametrize("workers", [1, 2])
async def test_hangup_reloads(replicas: list[SimulatorServer], workers: int) -> None:
    """SIGHUP ends no worker: every worker reads the files, and goes on with what runs."""
    async with running_stack([_pool(replicas)], {"models": MODELS}, workers=workers) as stack:
        pids = stack.gateway.children()
        for _ in range(2):
            stack.gateway.signal(signal.SIGHUP)

        async def reloads() -> list[float]:
            lines = (await stack.metrics()).splitlines()
            series = "tokenway_reloads_total{"
            chosen = [line for line in lines if line.startswith(series) and 'file="clusters.json"' in line]
            return [float(line.split()[-1]) for line in chosen if 'result="success"' in line]

        await eventually(reloads, lambda counts: len(counts) == workers and min(counts) >= 2)
        assert stack.gateway.is_running
        assert stack.gateway.children() == pids
        assert (await post(stack, chat("sim", "still here"))).status == 200


@pytest.mark.parametrize("workers", [1, 2])
async def test_signals_that_mean_nothing_end_nobody(replicas: list[SimulatorServer], workers: int) -> None:
    """Neither the gateway nor a worker of it: the log says so, and requests are answered as before."""
    async with running_stack([_pool(replicas)], {"models": MODELS}, workers=workers) as stack:
        pids = stack.gateway.children()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH):
            stack.gateway.signal(number)
            for pid in pids if workers > 1 else ():
                os.kill(pid, number)

        async def words() -> int:
            return sum(entry["event"] == "signal ignored" for entry in stack.gateway_log())

        await eventually(words, lambda count: count == 2 * (1 + (len(pids) if workers > 1 else 0)))
        assert stack.gateway.is_running
        assert stack.gateway.children() == pids
        assert (await post(stack, chat("sim", "still here"))).status == 200


async def test_second_gateway_does_not_take_the_first_ones_sockets(stack: Stack) -> None:
    """Started by mistake on the same run directory it leaves, saying why, and the first one serves on."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tokenway.cli.main",
        "serve",
        str(stack.run_dir / "tokenway.yaml"),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert b"another gateway runs there" in said
    assert (await post(stack, chat("sim", "still here"))).status == 200


async def test_broken_settings(stack: Stack) -> None:
    """A misspelt key in tokenway.yaml changes nothing and is named with its line."""
    known = len(stack.gateway_log())
    stack.write_config({"models": {"sim": {**MODELS["sim"], "load_balancing": {"algoritm": "random"}}}})

    async def success() -> float | None:
        return sample(await stack.metrics(), CONFIG_SUCCESS)

    await eventually(success, lambda value: value == 0, EFFECTIVE_S)
    text = (stack.run_dir / "tokenway.yaml").read_text().splitlines()
    line = next(number for number, content in enumerate(text, 1) if "algoritm" in content)
    problems = [e["problem"] for e in stack.gateway_log()[known:] if e["event"] == "configuration refused"]
    assert any(f"line {line}:" in problem and "algoritm" in problem for problem in problems), problems
    assert (await post(stack, chat("sim", "still here"))).status == 200
    stack.write_config({"models": MODELS})
    await eventually(success, lambda value: value == 1, EFFECTIVE_S)
