"""Redis URLs."""

import pytest

from metadata_center.sharing.redis_url import RedisUrl, UrlError, parse_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", RedisUrl("redis", (("h", 6379),))),
        ("redis://h:1/2", RedisUrl("redis", (("h", 1),), database=2)),
        ("redis://[::1]:7", RedisUrl("redis", (("::1", 7),))),
        ("redis://[::1]", RedisUrl("redis", (("::1", 6379),))),
        ("redis://u%40:p%2F@h", RedisUrl("redis", (("h", 6379),), username="u@", password="p/")),
        ("redis://:p@h/", RedisUrl("redis", (("h", 6379),), password="p")),
        (
            "redis+sentinel://a:1,b/main/3?sentinel_username=u&sentinel_password=p",
            RedisUrl(
                "sentinel", (("a", 1), ("b", 26379)), "main", 3, sentinel_username="u", sentinel_password="p"
            ),
        ),
        ("redis+cluster://a:1,[::2]:3", RedisUrl("cluster", (("a", 1), ("::2", 3)))),
        (
            "redis+cluster://u:p@[::1],[::2]:3",
            RedisUrl("cluster", (("::1", 6379), ("::2", 3)), username="u", password="p"),
        ),
    ],
)
def test_what_a_url_says(url: str, expected: RedisUrl) -> None:
    """Kind, servers, database and credentials."""
    assert parse_url(url) == expected


def test_tls_by_query() -> None:
    """Verifies the server's name against the system's authorities unless configured otherwise."""
    assert parse_url("redis://h").tls is None
    plain = parse_url("rediss+cluster://h").tls
    assert plain is not None
    assert (plain["ssl_ca_certs"], plain["ssl_check_hostname"]) == (None, True)
    own = parse_url("rediss://h?ca_certs=/a&certfile=/b&keyfile=/c&check_hostname=false").tls
    assert own is not None
    assert own == {
        **plain,
        "ssl_ca_certs": "/a",
        "ssl_certfile": "/b",
        "ssl_keyfile": "/c",
        "ssl_check_hostname": False,
    }


def test_credentials_beside_the_url_win() -> None:
    """As from the environment; they show in no representation."""
    url = parse_url("redis://u:hidden1@h", username="other", password="hidden2")
    assert (url.username, url.password) == ("other", "hidden2")
    assert "hidden" not in repr(url)
    assert "hidden" not in repr(parse_url("redis+sentinel://:hidden@h/m?sentinel_password=hidden"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://h",
        "redis+x://h",
        "redis://",
        "redis://secret@h:x",
        "redis://:secret@h:0",
        "redis://:secret@h:65536",
        "redis://:secret@a,b",
        "redis://:secret@h/x",
        "redis://:secret@h/1/2",
        "redis+cluster://:secret@h/1",
        "redis+sentinel://:secret@h",
        "redis://:secret@[::1",
        "redis://:secret@[::1]x",
        "redis://:secret@h?timeout=1",
        "redis://:secret@h?ca_certs=/a",
        "rediss://:secret@h?ca_certs=/a&ca_certs=/b",
        "rediss://:secret@h?check_hostname=maybe",
        "rediss://:secret@h?x",
        "rediss://:secret@h?keyfile=/a",
    ],
)
def test_other_forms_are_refused_without_quoting_them(url: str) -> None:
    """The error says what is accepted and shows nothing of the URL."""
    with pytest.raises(UrlError) as error:
        parse_url(url)
    assert "secret" not in str(error.value)
