"""What the benchmarks compute: quantiles, readings of /proc, their traffic, and what set-ups leave out."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import selectors
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import floor, peers, processes, traffic, versions
from benchmarks.processes import cpu_s, cpu_ticks, resident_kib, rss_mib
from benchmarks.setups import SetupKind, envoy_config
from benchmarks.traffic import (
    LAST_EVENTS,
    TOKEN,
    OverRounds,
    Target,
    over_rounds,
    quantile,
    request,
    requests,
)

VALUES = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=50)
FRACTION = st.floats(0, 1)


@given(VALUES, FRACTION, FRACTION)
def test_a_quantile_is_one_of_the_values_and_grows_with_q(values: list[float], p: float, q: float) -> None:
    """Nothing is interpolated, and a higher quantile is never a lower value."""
    low, high = quantile(values, min(p, q)), quantile(values, max(p, q))
    assert {low, high} <= set(values)
    assert low <= high
    assert (quantile(values, 0), quantile(values, 1)) == (min(values), max(values))


@pytest.mark.parametrize(("q", "expected"), [(0.5, 51.0), (0.9, 91.0), (0.99, 100.0)])
def test_a_quantile_has_its_share_of_the_values_below_it(q: float, expected: float) -> None:
    """Of the numbers 1 to 100 in any order, the median has 50 below it, the 99th percentile 99."""
    assert quantile([float(n) for n in range(100, 0, -1)], q) == expected


def test_no_values_have_no_quantile() -> None:
    """A phase without requests is an error, not a zero."""
    with pytest.raises(IndexError):
        quantile([], 0.5)


@pytest.mark.parametrize("name", ["python", "a b", ") S 1 (", "((x))"])
def test_cpu_is_user_and_system_time_whatever_the_process_is_called(name: str) -> None:
    """A name with blanks and parentheses does not shift the fields."""
    fields = " ".join(str(number) for number in range(4, 53))  # each field is its own number
    assert cpu_ticks(f"1234 ({name}) S {fields}\n") == 14 + 15


def test_resident_memory_is_that_of_the_status_file() -> None:
    """VmRSS is read, not a line like it; a process without memory is an error."""
    assert resident_kib("VmHWM:\t  9 kB\nVmRSS:\t    2048 kB\nRssAnon:\t 7 kB\n") == 2048
    with pytest.raises(ValueError, match="VmRSS"):
        resident_kib("Name:\tkthreadd\nState:\tS (sleeping)\n")


def test_a_living_process_has_used_something() -> None:
    """The files have the expected form on this kernel: our own figures agree with the resource usage."""
    usage = os.times()
    assert cpu_s(os.getpid()) == pytest.approx(usage.user + usage.system, abs=0.5)
    assert 1 < rss_mib(os.getpid()) < 100_000


@given(st.integers(1, 5000), st.none() | st.integers(1, 10_000))
def test_a_request_says_how_long_it_is_and_what_it_wants(
    prompt_bytes: int, stream_tokens: int | None
) -> None:
    """The prompt has the bytes asked for, the body the announced length, and only streams bound tokens."""
    head, _, body = request(prompt_bytes, "salt", stream_tokens=stream_tokens).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head.split(b"\r\n")
    asked = json.loads(body)
    assert len(asked["messages"][0]["content"]) == prompt_bytes
    assert (asked.get("stream"), asked.get("max_tokens")) == (stream_tokens and True, stream_tokens)


def test_requests_share_no_prefix() -> None:
    """Prompts differ from the start, so that none is a cache hit of another."""
    prompts = [
        json.loads(message.partition(b"\r\n\r\n")[2])["messages"][0]["content"]
        for message in requests(64, 4096)
    ]
    assert len({prompt[:8] for prompt in prompts}) == 64


@pytest.mark.parametrize("chunk", [TOKEN, LAST_EVENTS])
def test_streamed_events_are_what_engines_send(chunk: bytes) -> None:
    """Each event is JSON but for the closing [DONE]; only the last carries usage."""
    lines = [line for line in chunk.splitlines() if line.startswith(b"data: ")]
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line != b"data: [DONE]"]
    assert [("usage" in event) for event in events] == [chunk is LAST_EVENTS]


def test_the_floor_has_the_transport_settings_of_tokenway() -> None:
    """It takes over Tokenway's environment for gRPC before gRPC reads it; else the two are not comparable."""
    tree = ast.parse(Path(floor.__file__).read_text(encoding="utf-8"))
    imported = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert imported.index("tokenway.cli") < imported.index("grpc")


def config(kind: SetupKind) -> dict[str, Any]:
    """The configuration of a set-up, decoded."""
    document: dict[str, Any] = yaml.safe_load(envoy_config(kind, 10000, 9901, "/run/x.sock", [8001, 8002]))
    return document


@pytest.mark.parametrize(
    ("kind", "clusters"),
    [
        ("alone", {"bench", "tokenway-none", "tokenway-nobody"}),
        ("floor", {"tokenway-extproc", "tokenway-als", "bench", "tokenway-none", "tokenway-nobody"}),
        ("tokenway", {"tokenway-extproc", "tokenway-als", "tokenway-xds", "tokenway-nobody"}),
    ],
)
def test_set_ups_differ_in_their_clusters(kind: SetupKind, clusters: set[str]) -> None:
    """Only Tokenway brings clusters of its own; the others have the same engines in static ones."""
    document = config(kind)
    named = {cluster["name"]: cluster for cluster in document["static_resources"]["clusters"]}
    assert set(named) == clusters
    assert ("dynamic_resources" in document) == (kind == "tokenway")
    if "bench" in named:
        (locality,) = named["bench"]["load_assignment"]["endpoints"]
        addresses = [each["endpoint"]["address"]["socket_address"] for each in locality["lb_endpoints"]]
        assert [address["port_value"] for address in addresses] == [8001, 8002]


def test_envoy_alone_calls_no_worker() -> None:
    """Neither its filters nor its logs name a cluster of Tokenway; the floor's are all that Tokenway has."""
    assert "tokenway-extproc" not in json.dumps(config("alone"))
    assert "tokenway-als" not in json.dumps(config("alone"))
    assert (
        config("floor")["static_resources"]["listeners"]
        == config("tokenway")["static_resources"]["listeners"]
    )


class _AtOnce:
    """A client whose requests are answered at once."""

    @classmethod
    async def connect(cls, _port: int) -> _AtOnce:
        return cls()

    async def ask(self, _message: bytes) -> int:
        return 200

    def close(self) -> None:
        pass


async def test_the_open_loop_counts_the_time_by_which_it_was_late_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that was kept from a core for half a second says so of each request that was due in it."""
    now_s, naps, usual = 100.0, 0, asyncio.sleep

    async def nap(pause_s: float) -> None:
        nonlocal now_s, naps
        naps += 1
        now_s += pause_s + (0.5 if naps == 20 else 0.0)
        await usual(0)

    monkeypatch.setattr(traffic, "Client", _AtOnce)
    monkeypatch.setattr("benchmarks.traffic.time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(asyncio, "sleep", nap)
    latencies_ms = await traffic.open_loop(Target("x", 1), [b"x"], 100.0, 2.0)
    monkeypatch.undo()

    late_ms = [each_ms for each_ms in latencies_ms if each_ms > 100.0]
    assert max(late_ms) == pytest.approx(500.0, abs=20.0)
    assert 20 < len(late_ms) < 60  # of some 40 that were due in the first 400 ms of it


def test_the_precise_loop_does_not_wait_by_epoll() -> None:
    """Whose waits are whole milliseconds."""
    loop = traffic.precise_loop()
    try:
        assert type(vars(loop)["_selector"]) is selectors.SelectSelector
    finally:
        loop.close()


def test_going_first_is_of_the_real_time_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which children inherit."""
    asked: list[tuple[int, int, int]] = []

    def ask(pid: int, policy: int, param: os.sched_param) -> None:
        asked.append((pid, policy, param.sched_priority))

    monkeypatch.setattr(os, "sched_setscheduler", ask)
    processes.go_first()
    assert asked == [(0, os.SCHED_RR, 10)]


GOOD, BAD = [*[1.0] * 99, 3.0], [*[1.0] * 90, *[20.0] * 10]
"""Latencies of a round as it should be, and of one in which the machine paused."""


def test_one_bad_round_does_not_make_the_99th_percentile() -> None:
    """As it does where all rounds are taken together; it is the most of them."""
    assert over_rounds([GOOD, BAD, GOOD], 0.99) == OverRounds(3.0, 3.0, 20.0)
    assert quantile(GOOD + BAD + GOOD, 0.99) == 20.0


def test_what_is_added_is_added_in_the_same_round() -> None:
    """A round that is bad for both adds nothing; rounds are never taken of one and not of the other."""
    assert over_rounds([GOOD, BAD], 0.99, [GOOD, BAD]) == OverRounds(0.0, 0.0, 0.0)
    assert over_rounds([[5.0], [6.0], [9.0]], 0.5, [[1.0], [3.0], [2.0]]) == OverRounds(4.0, 3.0, 7.0)
    with pytest.raises(ValueError, match="shorter"):
        over_rounds([GOOD, BAD], 0.99, [GOOD])


def test_versions_say_what_each_adds_to_envoy_alone() -> None:
    """By set-up and load; nothing is added to Envoy alone."""
    found = versions.quantiles({"alone: ms, 1/s": [[1.0], [2.0]], "new: ms, 1/s": [[4.0], [4.0]]}, "alone")
    assert set(found["alone: ms, 1/s"]) == {"p50", "p99"}
    assert found["new: ms, 1/s"]["p50"] == {"median": 4.0, "least": 4.0, "most": 4.0}
    assert found["new: ms, 1/s"]["added p99"] == {"median": 2.5, "least": 2.0, "most": 3.0}


def test_peers_show_medians_of_rounds_and_not_the_quantile_of_all() -> None:
    """Of three rounds one was bad: it is in the brackets alone."""
    phase = peers.Phase("4 KB", [b""])

    def measured(*latencies_ms: list[float]) -> list[peers.Measured]:
        return [
            peers.Measured({"4 KB": 10.0}, {"4 KB": {"Python": 10.0}}, {"4 KB": 100.0}, each, 1.0)
            for each in latencies_ms
        ]

    rounds = {
        peers.OURS: measured(GOOD, BAD, GOOD),
        peers.DIRECT: measured([0.5], [0.75], [0.5]),
    }
    table = peers.table(rounds, [phase])
    assert "| 0.50 (0.25..0.50), 2.50 (2.50..19.25) |" in table
