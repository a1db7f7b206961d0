"""A gateway's own log becomes a trace: from decisions through log lines to a replay."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from extproc.observing.request_log import RequestLog, block_key
from tests.conftest import BLOCK_BYTES, Rig, chat
from tests.request_lines import request_lines
from tokenway.cli.replay import replay
from tokenway.simulator.replay.log_lines import ended_request
from tokenway.simulator.replay.readers import Format, TraceError, read_trace

SYSTEM = "You answer questions about the weather, in one sentence and without any jokes. " * 20
TOKENS_PER_BYTE = 0.25


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the gateway logs of its requests, formatted as in production."""
    with request_lines() as stream:
        yield stream


SECRET = "the installation's secret"


def log_of(secret: str | None = None) -> RequestLog:
    """What logs requests, prompts' blocks as well if there is a secret."""
    log = RequestLog()
    log.configure(is_on=True, key=None if secret is None else block_key(secret))
    return log


def ask(rig: Rig, name: str, prompt: str, secret: str | None = None, **usage: Any) -> None:
    """Decide a request, let it end with `usage`, and log it."""
    rig.decide(name, chat(prompt))
    tokens = {"prompt_tokens": round(rig.record(name).prompt_bytes * TOKENS_PER_BYTE), "completion_tokens": 8}
    rig.end(name, **{**tokens, **usage})
    log_of(secret).ended(rig.endings[-1])


def saved(path: Path, lines: io.StringIO) -> Path:
    """The log as a file."""
    path.write_text(lines.getvalue(), encoding="utf-8")
    return path


def test_prompts_that_share_a_beginning_share_it_in_the_trace(
    rig: Rig, lines: io.StringIO, tmp_path: Path
) -> None:
    """Two questions under one system prompt have its blocks in common, another prompt has none of them."""
    ask(rig, "a", SYSTEM + "Will it rain in Lisbon tomorrow? " * 20, SECRET)
    ask(rig, "b", SYSTEM + "And how warm does it get in Oslo? " * 20, SECRET)
    ask(rig, "c", "Something else altogether. " * 90, SECRET)
    trace = read_trace(saved(tmp_path / "gateway.log", lines))
    assert trace.block_tokens == BLOCK_BYTES * TOKENS_PER_BYTE
    ids = [[first + at for first, count in request.runs for at in range(count)] for request in trace.requests]
    shared = len(SYSTEM) // BLOCK_BYTES
    assert shared - 1 <= sum(x == y for x, y in zip(ids[0], ids[1], strict=False)) <= shared + 1
    assert not set(ids[2]) & {*ids[0], *ids[1]}
    assert [request.output_tokens for request in trace.requests] == [8, 8, 8]


def test_the_order_is_that_of_arrival_not_of_the_ends(rig: Rig, lines: io.StringIO, tmp_path: Path) -> None:
    """A line is written at the end; a long request came before a short one that is logged first."""
    ask(rig, "short", "x" * 200, duration_s=0.5, completion_tokens=1)
    ask(rig, "long", "y" * 200, duration_s=10.5, completion_tokens=2)
    first, second = read_trace(saved(tmp_path / "gateway.log", lines)).requests
    assert (first.output_tokens, second.output_tokens) == (2, 1)
    assert second.arrival_s == pytest.approx(10.0, abs=5.0)
    assert first.runs == ()


def test_what_is_no_request_with_tokens_is_passed_over(rig: Rig, lines: io.StringIO, tmp_path: Path) -> None:
    """Other loggers, other programs, refusals and answers without usage are no part of the trace."""
    lines.write('{"logger": "tokenway.worker", "event": "started"}\nnot JSON at all\n')
    ask(rig, "unknown", "x" * 200, prompt_tokens=None, completion_tokens=None)
    ask(rig, "known", "x" * 200)
    assert len(read_trace(saved(tmp_path / "gateway.log", lines)).requests) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"time": "yesterday"},
        {"time": None},
        {"duration_ms": "long"},
        {"prompt_blocks": "abc"},
        {"prompt_blocks": 7},
        {"prompt_tokens": -1},
        {"prompt_tokens": "many"},
    ],
)
def test_a_request_line_of_another_form_is_an_error(
    rig: Rig, lines: io.StringIO, change: dict[str, Any]
) -> None:
    """A field that the gateway does not write like this is named, not guessed at."""
    ask(rig, "a", "x" * 200)
    with pytest.raises(ValueError, match="not a request's line"):
        ended_request(json.loads(lines.getvalue()) | change)


def test_a_log_without_token_counts_says_what_to_switch_on(
    rig: Rig, lines: io.StringIO, tmp_path: Path
) -> None:
    """Nothing can be replayed of requests whose size was not counted."""
    ask(rig, "a", "x" * 200, completion_tokens=None)
    with pytest.raises(TraceError, match="usage_injection"):
        read_trace(saved(tmp_path / "gateway.log", lines), Format.LOG)


def test_one_size_of_blocks_in_a_log(rig: Rig, lines: io.StringIO, tmp_path: Path) -> None:
    """Blocks of two sizes share nothing although they should: the log has to be cut where it changed."""
    ask(rig, "a", "x" * 2000, SECRET)
    ask(rig, "b", "x" * 2000, SECRET)
    first, second = lines.getvalue().splitlines()
    path = tmp_path / "gateway.log"
    path.write_text(first + "\n" + json.dumps(json.loads(second) | {"block_bytes": 512}) + "\n")
    with pytest.raises(ValueError, match="64, 512 bytes"):
        read_trace(path)


def test_the_command_replays_a_gateways_log(
    rig: Rig, lines: io.StringIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tokenway replay LOGFILE` prints the table; what prompts share is found cached."""
    for number in range(20):
        ask(rig, f"r{number}", SYSTEM + f"Question {number}? " * 10, SECRET, duration_s=20.0 - number)
    path, figures = saved(tmp_path / "gateway.log", lines), tmp_path / "figures.json"
    options = ["--engines", "2", "--policies", "round_robin", "--rates", "x1", "--jobs", "1"]
    assert replay([str(path), *options, "--json", str(figures)]) == 0
    assert "gateway: 20 requests" in capsys.readouterr().out
    (run,) = json.loads(figures.read_text())["runs"]
    assert run["hit_ratio"] > 0.5
