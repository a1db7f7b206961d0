"""`tokenway explain` and `tokenway top` where something else answers, or a gateway of another version."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tokenway.cli import admin_answer
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
    {"endpoints": [], "uptime_s": 1, "workers": 1, "in_flight": 0, "held": 0, "sources": {}, "store": "x"},
)
URL = "http://127.0.0.1:10080"


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_no_answer_of_ours_is_a_sentence(
    answer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and one line, which says how to see it all the same."""
    monkeypatch.setattr(explaining, "fetch", lambda _url: answer)
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


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The URL of what answers each GET in this way."""

    class Handler(BaseHTTPRequestHandler):
        do_GET = answer  # noqa: N815 - the library's name

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m"


@pytest.mark.parametrize(
    "said",
    [
        f"{ESCAPES}\r\n\r\n",
        f"HTTP/1.1 500 {ESCAPES}\r\ncontent-length: 0\r\n\r\n",
        f"HTTP/1.1 {ESCAPES}\r\n\r\n",
        f"HTTP/9.9{ESCAPES} 200 OK\r\n\r\n",
        f"HTTP/1.1 302 F\r\nlocation: {ESCAPES}://x/\r\n\r\n",
    ],
)
def test_no_escape_of_what_answers_reaches_the_terminal(
    said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in the words for what it is either."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(said.encode("latin-1"))
        request.close_connection = True

    with serving(answer) as url:
        assert topping.top(url, once=True, interval_s=1.0) == 1
        assert explaining.explain(["--last", "--admin", url]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 2
    assert all(line.isprintable() for line in shown.err.splitlines())


def test_no_escape_in_a_table_reaches_the_terminal() -> None:
    """Not in the line above it either."""
    counts = dict.fromkeys(("workers", "in_flight", "held"), ESCAPES)
    shown = topping.render_endpoints(
        {"uptime_s": 1.0, "endpoints": [], "sources": {}, "store": None, **counts}
    )
    assert all(line.isprintable() for line in shown.splitlines())


def asked_of(url: str) -> tuple[int, int]:
    """What `explain` and `top` end with."""
    return explaining.explain(["--last", "--admin", url]), topping.top(url, once=True, interval_s=1.0)


def test_an_answer_without_end_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither one that drips, of which each byte comes in time, nor one that is too large."""
    is_over = threading.Event()

    def drip(asked: BaseHTTPRequestHandler) -> None:
        asked.send_response(200)
        asked.end_headers()
        with suppress(OSError):  # who asked has given up
            while not is_over.wait(0.01):
                asked.wfile.write(b" ")

    with serving(drip) as url:
        for bound, value in (("TIMEOUT_S", 0.5), ("MAX_BYTES", 20)):
            with monkeypatch.context() as patched:
                patched.setattr(admin_answer, bound, value)
                assert asked_of(url) == (1, 1)
        is_over.set()
    said = capsys.readouterr().err.splitlines()
    assert ["no end of the answer" in line for line in said] == [True] * 4


def test_loopback_is_asked_of_no_proxy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the environment names one, it is another machine; `curl --noproxy` would be needed else."""

    def answer(asked: BaseHTTPRequestHandler) -> None:
        asked.send_response(200)
        asked.end_headers()
        asked.wfile.write(b'{"records": []}')

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(answer) as url:
        assert explaining.explain(["--last", "--admin", url]) == 0
        assert explaining.explain(["--last", "--admin", "http://admin.invalid"]) == 1
    assert "refused" in capsys.readouterr().err


def test_a_404_of_another_program_is_no_word_of_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    """Envoy's listener answers so; where no id was asked for none can be forgotten."""
    with serving(lambda asked: asked.send_error(404)) as url:
        assert asked_of(url) == (1, 1)
    assert "answers with status 404; is it a gateway's?" in capsys.readouterr().err


def test_why_there_is_no_answer_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the system, without those of a library."""
    url = "http://127.0.0.1:1"
    assert asked_of(url) == (1, 1)
    assert capsys.readouterr().err == f"admin port {url} does not answer: Connection refused\n" * 2
