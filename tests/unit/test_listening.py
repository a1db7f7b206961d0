"""Addresses to listen at, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata_center.service.listening import parse_address, parse_port


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:10000", ("0.0.0.0", 10_000)),
        ("localhost:0", ("localhost", 0)),
        ("gateway-1.example:65535", ("gateway-1.example", 65_535)),
        ("[::]:80", ("::", 80)),
        ("[::ffff:1.2.3.4]:1", ("::ffff:1.2.3.4", 1)),
    ],
)
def test_an_address_is_host_and_port(text: str, expected: tuple[str, int]) -> None:
    """Names, IPv4 and IPv6 in brackets, which the host no longer has."""
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("0.0.0.0", "has no port"),
        ("8080", "has no port"),
        ("", "has no port"),
        ("1.2.3.4:", "has no port"),
        ("[::1]", "has no port"),
        ("[::1]:", "has no port"),
        (":8080", "has no address"),
        ("[]:8080", "has no address"),
        ("::1", "without brackets"),
        ("::1:8080", "without brackets"),
        ("1.2.3.4:80:90", "without brackets"),
        ("http://1.2.3.4:80", "without brackets"),
        ("[1.2.3.4]:80", "no IPv6 address in its brackets"),
        ("[::1%lo]:80", "no IPv6 address in its brackets"),
        ("[::1:80", "without brackets"),
        ("a b:80", "is no address"),
        ("user@host:80", "is no address"),
        ("1.2.3.4:70000", "`70000` is no port; accepted: 0 to 65535"),
        ("1.2.3.4:-1", "`-1` is no port"),
        ("1.2.3.4:+80", "`+80` is no port"),
        ("1.2.3.4: 80", "` 80` is no port"),
        ("1.2.3.4:http", "`http` is no port"),
        ("1.2.3.4:٣", "is no port"),
        ("1.2.3.4:" + "9" * 5_000, "is no port"),
    ],
)
def test_anything_else_is_refused_with_what_is_wrong(text: str, what: str) -> None:
    """The sentence names the fault and what is accepted."""
    with pytest.raises(ValueError, match="accepted: ") as caught:
        parse_address(text)
    assert what in str(caught.value)


def test_port_zero_is_a_port_only_where_one_may_be_picked() -> None:
    """The lowest port is the caller's to say."""
    assert parse_address("h:0") == ("h", 0)
    with pytest.raises(ValueError, match="accepted: 1 to 65535"):
        parse_address("h:0", lowest_port=1)
    with pytest.raises(ValueError, match="accepted: 1 to 65535"):
        parse_port("0")


@given(st.ip_addresses(), st.integers(0, 65_535))
def test_every_ip_address_is_read_back(ip: object, port: int) -> None:
    """With brackets around IPv6, as in URLs."""
    host = f"[{ip}]" if ":" in str(ip) else str(ip)
    assert parse_address(f"{host}:{port}") == (str(ip), port)


@given(st.text(alphabet="0123456789.:[]%-a@/ ", max_size=20))
def test_no_text_ends_in_another_error(text: str) -> None:
    """Whatever is written, it is an address or a ValueError with a sentence."""
    said = ""
    try:
        host, port = parse_address(text)
    except ValueError as error:
        said, host, port = str(error), "none", 0
    assert not said or "accepted: " in said
    assert host
    assert 0 <= port <= 65_535
