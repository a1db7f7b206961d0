"""`tokenway explain` and `tokenway top` where something else answers, or a gateway of another version."""

from __future__ import annotations

from typing import Any

import pytest

from tokenway.cli import explain as explaining
from tokenway.cli import top as topping

ANSWERS: tuple[Any, ...] = (
    [],
    None,
    "x",
    {},
    {"records": None},
    {"records": [{}]},
    {"endpoints": [{}], "uptime_s": 1, "workers": 1, "in_flight": 0, "held": 0, "sources": {}},
    {"endpoints": [], "uptime_s": "long", "workers": 1, "in_flight": 0, "held": 0, "sources": {}},
)
URL = "http://127.0.0.1:10080"


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_no_answer_of_ours_is_a_sentence(
    answer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and one line, which says how to see it all the same."""
    monkeypatch.setattr(explaining, "_get", lambda _url: answer)
    monkeypatch.setattr(topping, "_endpoints", lambda _url: answer)
    asked = (
        explaining.explain(["--last", "--admin", URL]),
        explaining.explain(["r", "--admin", URL]),
        topping.top(URL, once=True, interval_s=1.0),
    )
    captured = capsys.readouterr()
    assert asked == (1, 1, 1)
    assert captured.out == ""
    assert [line.partition(";")[0] for line in captured.err.splitlines()] == [
        f"admin port {URL} does not answer as this version of Tokenway does"
    ] * 3
