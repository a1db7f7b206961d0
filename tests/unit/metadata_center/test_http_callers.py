"""Which callers of an operators' surface are web pages."""

from __future__ import annotations

import pytest

from metadata_center.service.http_callers import refusal


def is_heard(
    host: str | list[str] | None = "127.0.0.1:1",
    *,
    origin: str | None = None,
    site: str | None = None,
    reached: str = "127.0.0.1",
    only_loopback: bool = True,
    names: tuple[str, ...] = (),
) -> bool:
    """True if nothing speaks against the request."""
    hosts = [host] if isinstance(host, str) else host or []
    origins = [] if origin is None else [origin]
    why = refusal(hosts, origins, site, reached=reached, only_loopback=only_loopback, names=names)
    assert why is None or why
    return why is None


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "127.0.0.1:10080",
            "127.1.2.3:1",
            "localhost",
            "LocalHost:10080",
            "[::1]:10080",
            "[::1]",
        ),
        *("[::ffff:127.0.0.1]:1", None),
    ],
)
@pytest.mark.parametrize("reached", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_names_of_loopback_are_heard_on_loopback(host: str | None, reached: str) -> None:
    """By any port: it may be forwarded; HTTP/1.0 names no host."""
    assert is_heard(host, reached=reached)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:10080", "localhost.evil", "localhost.evil:10080", "evil.localhost"),
        *("127.0.0.1.evil", "127.0.0.1.nip.io:1", "10.0.0.1", "0.0.0.0:10080", "[::]:1", "[2001:db8::1]:1"),
        *("", ":10080", "localhost@evil", "localhost:x", "127.0.0.1:1:2", "[::1", "２7.0.0.1"),
        *("2130706433", "0x7f.1", "::1", ["127.0.0.1", "127.0.0.1"]),
    ],
)
def test_other_names_are_not_heard_on_loopback(host: str | list[str]) -> None:
    """A page's name may lead there, and so may a name that begins like one of ours."""
    assert not is_heard(host)


def test_name_that_the_operator_listens_by_is_heard() -> None:
    """It is in his hosts file, and means loopback."""
    assert is_heard("center:8080", names=("center",))
    assert not is_heard("center:8080")


@pytest.mark.parametrize("host", ["10.0.0.7:10080", "tokenway.prod.svc:10080", "[2001:db8::7]:1", None])
def test_any_host_is_heard_from_the_network(host: str | None) -> None:
    """Prometheus scrapes by pod address or by service name."""
    assert is_heard(host, reached="10.0.0.7", only_loopback=False)


def test_port_for_all_addresses_hears_no_pages_name_on_loopback() -> None:
    """A proxy beside it may pass on the address it was reached by; a name there may be a page's."""
    assert is_heard("10.0.0.7:10080", reached="127.0.0.1", only_loopback=False)
    assert not is_heard("evil.example:10080", reached="127.0.0.1", only_loopback=False)
    assert not is_heard("0.0.0.0:10080", reached="127.0.0.1", only_loopback=False)


@pytest.mark.parametrize("reached", ["127.0.0.1", "10.0.0.7"])
@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "file://",
        "http://127.0.0.1:2",
        "http://127.0.0.1:1.evil",
        "http://[",
    ],
)
def test_other_origins_are_not_heard(origin: str, reached: str) -> None:
    """Wherever the page came from: another port is another origin too."""
    assert not is_heard(origin=origin, reached=reached)


def test_page_that_names_itself_like_this_host_is_not_heard() -> None:
    """Its name was made to lead here: origin and host are the same, and still the page's."""
    rebound = "evil.example:10080"
    assert not is_heard(rebound, origin=f"http://{rebound}", reached="10.0.0.7", only_loopback=False)
    assert is_heard("127.0.0.1:1", origin="http://127.0.0.1:1")


@pytest.mark.parametrize(("site", "expected"), [("none", True), ("same-origin", True), ("same-site", False)])
def test_what_a_browser_says_of_the_sender_counts(site: str, expected: bool) -> None:
    """An address typed by the operator belongs to no page."""
    assert is_heard(site=site) == expected
    assert not is_heard(site="cross-site")
