"""What the comparison with other routers computes: its lock, command lines, tables, counted time."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import orjson
import pytest

from benchmarks import peer_environment, peer_quality, peer_routers, peers, processes
from benchmarks.real_engines import Engine, Real, Used
from benchmarks.streaming import Figures
from benchmarks.traffic import MODEL, closed_loop, request
from benchmarks.traffic import Engine as PlainEngine

BUSY = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\ntime.sleep(60)"


def test_the_lock_has_every_router_with_its_hashes_and_what_it_needs() -> None:
    """Each entry can be given to pip alone: one version, and hashes for it."""
    found = peer_environment.entries(peer_environment.LOCK.read_text())
    assert set(peer_environment.ROUTERS) < set(found)
    for name, lines in found.items():
        assert lines.startswith(f"{name}==")
        assert lines.count("--hash=sha256:") >= 1


@pytest.mark.parametrize("router", [*peer_routers.COMPARED, *peer_routers.ALSO], ids=lambda each: each.name)
def test_a_router_is_run_with_its_policy_and_all_engines(router: peer_routers.Router) -> None:
    """Its engines come last, for their option takes all that follows."""
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    command = router.command(80, 81, urls)
    assert command[-3:] == ("--worker-urls", *urls)
    assert command[command.index("--policy") + 1] == router.policy
    assert router.distribution in peer_environment.ROUTERS


def test_names_of_routers_are_distinct_and_unknown_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is installed."""
    names = [router.name for router in (*peer_routers.COMPARED, *peer_routers.ALSO)]
    assert len(set(names)) == len(names)
    with pytest.raises(SystemExit):
        peer_routers.chosen(argparse.ArgumentParser(), "smg no_such_policy")
    assert "smg no_such_policy" in capsys.readouterr().err


def test_a_router_that_cannot_be_had_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are measured all the same."""
    monkeypatch.setattr(peer_environment, "install", lambda: {"smg": "1.0", "sglang-router": "2.0"})
    found = peer_routers.chosen(argparse.ArgumentParser(), None)
    assert [router.distribution for router in found] == ["smg", "sglang-router"]
    assert "left out: vllm-router" in capsys.readouterr().out


def test_time_on_a_processor_is_that_of_children_as_well() -> None:
    """A process that only waits for a busy child is not free of charge."""
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}])"
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline_s = time.monotonic() + 30
        tree = processes.tree(parent.pid)
        while time.monotonic() < deadline_s and (len(tree) < 2 or processes.on_cpu_s([tree[1]]) < 0.2):
            time.sleep(0.05)
            tree = processes.tree(parent.pid)
        assert len(tree) == 2
        assert processes.on_cpu_s([parent.pid]) > processes.on_cpu_s([tree[1]])
        assert processes.tree_rss_mib([parent.pid]) > processes.rss_mib(parent.pid)
    finally:
        for pid in reversed(processes.tree(parent.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.wait()


def measured(cpu_us: float, latency_ms: float) -> peers.Measured:
    """A round in which all phases cost the same."""
    names = [phase.name for phase in peers.phases()]
    parts = {"Envoy": cpu_us / 4, "Python": 3 * cpu_us / 4}
    return peers.Measured(
        dict.fromkeys(names, cpu_us),
        dict.fromkeys(names, parts),
        dict.fromkeys(names, 1000.0),
        [latency_ms] * 10,
        100.0,
    )


def test_the_table_has_medians_and_the_median_of_ratios_of_rounds() -> None:
    """The ratio is not that of the medians: rounds of which one was disturbed are compared one by one."""
    rounds = {
        peers.OURS: [measured(100, 3), measured(900, 3), measured(200, 3)],
        "other": [measured(50, 2), measured(300, 2), measured(200, 2)],
        peers.DIRECT: [peers.Measured({}, {}, {}, [1.0] * 10, 0.0)] * 3,
    }
    lines = peers.table(rounds, peers.phases()).splitlines()
    other = lines[3]
    assert other.startswith("| other | 200 (2.00) |")
    assert other.endswith("| 1,000 | 1.00 (1.00..1.00), 1.00 (1.00..1.00) | 100 |")
    assert len({line.count("|") for line in lines}) == 1
    assert lines[4].startswith("| of ours, Envoy | 50 | ")
    assert len(lines) == 6


def real(ttft_s: float | None) -> Real:
    """A run with one figure for all times."""
    figures = Figures(
        requests=10,
        errors=0,
        refused=0,
        ttft_mean_s=ttft_s,
        ttft_p50_s=ttft_s,
        ttft_p90_s=ttft_s,
        ttft_p99_s=ttft_s,
        tpot_mean_s=ttft_s,
        cached_ratio=0.5,
        late_max_s=0.0,
    )
    used = Used({"engines": 0.1, "router": 0.02, "client": 0.1}, 0.5, 0.0)
    return Real(figures, [2, 3], 0.0, 0, used, 1.0, [])


def test_ratios_are_to_our_rule_in_the_same_batch() -> None:
    """Geometric means over seeds, best of the others first; one that did not start has no part in them."""
    gone = TimeoutError("gone")
    batches: dict[int, dict[str, Real | TimeoutError]] = {
        1: {peer_quality.OURS: real(1.0), "slow": real(4.0), "quick": real(0.5), "gone": gone},
        2: {peer_quality.OURS: real(2.0), "slow": real(2.0), "quick": real(1.0), "gone": gone},
    }
    lines = peer_quality.summary(batches).splitlines()
    assert lines[2:] == [
        "| quick | 0.50 (0.50, 0.50) | 0.50 | 0.50 |",
        "| slow | 2.00 (4.00, 1.00) | 2.00 | 2.00 |",
    ]
    columns = peer_quality.HEAD.splitlines()[0].count("|")
    for run in (real(1.0), real(None), TimeoutError("gone")):
        assert peer_quality.row(1.0, 1, "slow", run, real(1.0)).count("|") == columns


def test_events_go_to_those_who_follow_them_alone() -> None:
    """An option per engine; the engines stay last."""
    engine = Engine(5000, "tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 1)
    for router in (*peer_routers.COMPARED, *peer_routers.ALSO):
        further = router.following([engine])
        assert ("http://127.0.0.1:5000=tcp://127.0.0.1:1" in further) is router.follows_events


async def test_the_plain_engine_tells_routers_its_model_and_makes_token_ids() -> None:
    """Routers find a model by `/v1/models`; one asks for token ids before it chooses."""
    server = await asyncio.get_running_loop().create_server(PlainEngine, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        for line, field in (
            (b"GET /v1/models", "data"),
            (b"POST /v1/chat/completions/render", "token_ids"),
            (b"POST /tokenize", "tokens"),
            (b"POST /v1/chat/completions", "choices"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = request(400, "x").partition(b"\r\n\r\n")[2]
            writer.write(line + b" HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            answer = orjson.loads(await reader.readexactly(length))
            assert field in answer
            if field == "data":
                assert [model["id"] for model in answer["data"]] == [MODEL]
            writer.close()
        target = peers.Contender("engine", port, {})
        assert await closed_loop(target, [request(10, "x", stream_tokens=60)], 2, 0.05)
    finally:
        server.close()
