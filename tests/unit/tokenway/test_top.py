"""`tokenway top`: the table and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.admin_answers import answering
from tokenway.cli.top import render_endpoints, top

ROW = {
    "key": "10.0.0.1:8000",
    "cluster": "chat",
    "source": "files",
    "weight": 3,
    "labels": {"zone": "b", "subset": "v1"},
    "state": "healthy",
    "reason": None,
    "requests": 3,
    "prefill_tokens": 4096,
    "context_tokens": 9000,
    "cached_blocks": 25,
    "capacity_blocks": 100,
    "served_total": 100,
    "failures_total": 2,
    "ttft_ewma_s": 0.1234,
}


def answer(*rows: dict[str, Any], uptime_s: float = 10.0) -> dict[str, Any]:
    """The admin port's `/endpoints` answer."""
    return {
        "endpoints": list(rows),
        "sources": {},
        "store": None,
        "in_flight": 3,
        "held": 1,
        "workers": 2,
        "uptime_s": uptime_s,
    }


@pytest.fixture
def admin_url() -> Iterator[str]:
    """A server that answers `/endpoints` only."""
    with answering({"/endpoints": (200, json.dumps(answer(ROW)).encode())}) as url:
        yield url


def test_table_shows_load_cache_share_and_latency() -> None:
    """Each endpoint is one row under the header, cache as a share of capacity, latency in ms."""
    summary, blank, header, row = render_endpoints(answer(ROW)).splitlines()
    assert summary == "tokenway   up 10 s   workers 2   in flight 3   held 1   endpoints 1"
    assert blank == ""
    assert header.split()[:3] == ["endpoint", "cluster", "source"]
    assert (
        " ".join(row.split())
        == "10.0.0.1:8000 chat files healthy 3 4096 9000 25% 123 - 100 2 3 subset=v1 zone=b"
    )


def test_sources_show_how_old_their_word_is() -> None:
    """One line for each control plane, under the summary."""
    sources = {
        "istio": {"connected": True, "age_s": 0.0},
        "kubernetes": {"connected": False, "age_s": 34.6},
    }
    _, *lines, blank, _, _ = render_endpoints({**answer(ROW), "sources": sources}).splitlines()
    assert lines == ["source istio   in sync", "source kubernetes   last in sync 35 s ago"]
    assert blank == ""


@pytest.mark.parametrize(
    ("store", "line"),
    [
        ({"state": "joining"}, None),
        ({"state": "joined"}, None),
        ({"state": "not_joined", "reason": "WRONGPASS", "for_s": 3.2}, "not joined for 3 s: WRONGPASS"),
        ({"state": "lost", "reason": "no\nanswer", "for_s": 61.0}, "lost 61 s ago: no\\x0aanswer"),
        ({"state": "not_writable", "reason": "a", "for_s": 0.0, "workers": 2}, "takes nothing for 0 s: a"),
        (
            {"state": "emptied", "reason": "a", "for_s": 1, "workers": 1},
            "emptied 1 s ago at 1 of 2 workers: a",
        ),
        ({"state": "of_later", "reason": "a", "for_s": 1}, "of_later for 1 s: a"),
    ],
)
def test_the_store_has_a_line_only_where_something_is_wrong(store: dict[str, Any], line: str | None) -> None:
    """With since when, and at how many workers if not at all."""
    whole = {"reason": None, "for_s": 0.0, **store}
    _, *lines, blank, _, _ = render_endpoints({**answer(ROW), "store": whole}).splitlines()
    assert lines == ([] if line is None else [f"store   {line}"])
    assert blank == ""


def test_rows_are_sorted_and_columns_aligned() -> None:
    """Rows are ordered by cluster then endpoint and every number column ends at the same place."""
    second = {**ROW, "key": "10.0.0.10:8000", "requests": 12_345, "cluster": "a", "reason": "probe failed"}
    *_, header, first_row, second_row = render_endpoints(answer(ROW, second)).splitlines()
    assert first_row.startswith("10.0.0.10:8000  a")
    assert first_row.endswith("probe failed")
    end = header.index("requests") + len("requests")
    assert (first_row[:end].split()[-1], second_row[:end].split()[-1]) == ("12345", "3")


def test_rate_is_the_difference_between_two_readings() -> None:
    """Requests per second come from served totals and uptime; a new endpoint or no time passed shows none."""
    after = {**ROW, "served_total": 130}
    new = {**ROW, "key": "z:1"}
    rows = render_endpoints(answer(after, new, uptime_s=14.0), answer(ROW)).splitlines()[3:]
    assert [row.split()[9] for row in rows] == ["7.5", "-"]
    assert render_endpoints(answer(after), answer(ROW)).splitlines()[3].split()[9] == "-"


def test_totals_that_began_anew_have_no_rate() -> None:
    """An endpoint was away, or one of several workers died with what it had counted: nothing is negative."""
    before, after = answer(ROW), answer({**ROW, "served_total": 40}, uptime_s=12.0)
    assert render_endpoints(after, before).splitlines()[3].split()[9:11] == ["-", "40"]


def test_missing_measurements_show_a_dash() -> None:
    """An endpoint without capacity or first token yet shows dashes, not zeros."""
    row = render_endpoints(answer({**ROW, "capacity_blocks": 0, "ttft_ewma_s": None})).splitlines()[3]
    assert row.split()[7:9] == ["-", "-"]


def test_once_prints_one_table(admin_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--once` prints the table without terminal codes and exits 0; a trailing slash is no matter."""
    assert top(admin_url + "/", once=True, interval_s=60.0) == 0
    assert capsys.readouterr().out == render_endpoints(answer(ROW))


def test_json_passes_the_answer_on(admin_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` prints the gateway's answer as one line."""
    assert top(admin_url, once=True, interval_s=60.0, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == answer(ROW)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "file:///etc/hosts", "not a url"])
def test_an_unusable_admin_port_is_a_message_and_exit_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused connection or an unsupported URL ends with one line on stderr and exit code 1."""
    assert top(url, once=True, interval_s=60.0) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"admin port {url} does not answer")


def test_control_characters_never_reach_the_terminal() -> None:
    """What an engine or an operator's file says is text, C1 controls and new lines included."""
    table = render_endpoints(answer({**ROW, "reason": "probe: \x9b2J\u202e\nend", "cluster": "a\x1b[1m"}))
    assert "probe: \\x9b2J\\x202e\\x0aend" in table
    assert "a\\x1b[1m" in table
    assert len(table.splitlines()) == 4
