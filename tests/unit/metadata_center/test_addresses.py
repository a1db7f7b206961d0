"""Hosts and ports, as people and engines write them."""

from __future__ import annotations

from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata_center.addresses import (
    Address,
    in_brackets,
    ip_or_none,
    is_loopback,
    is_unspecified,
    parse_port,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:10000", ("0.0.0.0", 10_000)),
        ("localhost:0", ("localhost", 0)),
        ("gateway-1.example:65535", ("gateway-1.example", 65_535)),
        ("[::]:80", ("::", 80)),
        ("[FD00:0::5]:1", ("fd00::5", 1)),
    ],
)
def test_an_address_is_host_and_port(text: str, expected: tuple[str, int]) -> None:
    """Names, IPv4 and IPv6 in brackets, which the host no longer has."""
    assert Address.parse(text) == expected


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
        Address.parse(text)
    assert what in str(caught.value)


def test_port_zero_is_a_port_only_where_one_may_be_picked() -> None:
    """The lowest port is the caller's to say."""
    assert Address.parse("h:0") == ("h", 0)
    with pytest.raises(ValueError, match="accepted: 1 to 65535"):
        Address.parse("h:0", lowest_port=1)
    with pytest.raises(ValueError, match="accepted: 1 to 65535"):
        parse_port("0")


@given(st.ip_addresses(), st.integers(0, 65_535))
def test_every_ip_address_is_read_back(ip: object, port: int) -> None:
    """With brackets around IPv6, as in URLs."""
    host = f"[{ip}]" if ":" in str(ip) else str(ip)
    address = Address.parse(f"{host}:{port}")
    assert address == (ip_or_none(str(ip)), port)
    assert address == Address.of(str(ip), port)


_NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,40}", fullmatch=True)


@given(st.ip_addresses().map(str) | _NAMES, st.integers(0, 65_535))
def test_what_is_printed_is_read_back(host: str, port: int) -> None:
    """Printing and reading are each other's reverse, for every address there is."""
    address = Address.of(host, port)
    assert Address.parse(str(address)) == address
    assert str(Address.parse(str(address))) == str(address)


@given(st.ip_addresses(v=6))
def test_an_ip_address_has_one_spelling(ip: IPv6Address) -> None:
    """However it is written, so that equal addresses are equal."""
    assert Address.of(ip.exploded, 1) == Address.of(ip.compressed.upper(), 1)
    assert Address.parse(f"[{ip.exploded}]:1") == Address.of(ip.compressed, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("h", ("h", 7)), ("h:8", ("h", 8)), ("[::1]", ("::1", 7)), ("[::1]:8", ("::1", 8)), ("*:8", ("*", 8))],
)
def test_a_port_may_be_left_out_where_there_is_a_default(text: str, expected: tuple[str, int]) -> None:
    """And only there; a colon announces one."""
    assert Address.parse(text, default_port=7) == expected
    for bad in ("h:", "[::1]:", "::1", ""):
        with pytest.raises(ValueError, match="accepted: "):
            Address.parse(bad, default_port=7)


def test_hosts_are_distinguished() -> None:
    """Loopback in every spelling, all of a machine's own, addresses with a zone, names."""
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("localhost", "10.0.0.1", "::", "")))
    assert [host for host in ("0.0.0.0", "::", "0:0::0", "::1", "any") if is_unspecified(host)] == [
        "0.0.0.0",
        "::",
        "0:0::0",
    ]
    assert ip_or_none("fe80::1%eth0") is None
    assert ip_or_none("name") is None
    assert (in_brackets("::1"), in_brackets("1.2.3.4"), in_brackets("h")) == ("[::1]", "1.2.3.4", "h")


@given(st.text(alphabet="0123456789.:[]%-a@/ ", max_size=20))
def test_no_text_ends_in_another_error(text: str) -> None:
    """Whatever is written, it is an address or a ValueError with a sentence."""
    said = ""
    try:
        host, port = Address.parse(text)
    except ValueError as error:
        said, host, port = str(error), "none", 0
    assert not said or "accepted: " in said
    assert host
    assert 0 <= port <= 65_535
