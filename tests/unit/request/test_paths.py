"""Request paths: the one reading that counts, and the loosest one that refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.request.paths import ADMIN_PATHS, as_engines_read, is_admin, loosest, without_slash


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/v1/models?x=%2F", "/v1/models"),
        ("/v1/%6dodels", "/v1/models"),
        ("/v1%2Fmodels", "/v1/models"),
        ("/v1/%256dodels", "/v1/%6dodels"),
        ("/V1/models", "/V1/models"),
        ("/v1/a%3Fb", "/v1/a?b"),
        ("", ""),
        ("/", ""),
    ],
)
def test_engines_decode_once(path: str, read: str) -> None:
    """Query string and one trailing slash aside; letter case, dots and double slashes are the path's own."""
    assert as_engines_read(path) == read


@pytest.mark.parametrize(
    ("path", "without"),
    [
        ("/a/", "/a"),
        ("/a/?b=/", "/a?b=/"),
        ("/a%2Fb/?", "/a%2Fb?"),
        ("/a", None),
        ("/a?b/", None),
        ("/a%2F", None),
    ],
)
def test_a_slash_at_the_end_goes_alone(path: str, without: str | None) -> None:
    """All else is as it was."""
    assert without_slash(path) == without


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/SLEEP/",
        "//sleep",
        "/a/../sleep",
        "/../sleep",
        "/./sleep",
        "/%2573leep",
        "/%2E%2E/sleep",
        "/sleep;a=b",
        "/;a/sleep",
        "\\sleep",
        "/%5csleep",
        "/sle%00ep",
        "/sleep%20",
        "/sleep%3Fx",
        "/sleep%23x",
        "/sleep?x",
    ],
)
def test_the_loosest_reading_sees_through_spellings(path: str) -> None:
    """Each could be `/sleep` to some engine."""
    assert loosest(path) == "/sleep"


@given(st.text(max_size=40))
def test_the_loosest_reading_is_its_own(path: str) -> None:
    """Any text has one or is given up, and reading it again changes nothing."""
    read = loosest(path)
    assert read is None or loosest(read) == read


def test_endless_encoding_is_given_up() -> None:
    """A path that is decoded again and again cannot be known."""
    assert loosest("/%" + "25" * 10 + "73leep") is None


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_every_admin_path_is_one(path: str) -> None:
    """The table is in the form that is compared with, and stands for what is below it."""
    assert loosest(path) == path
    assert is_admin(path)
    assert is_admin(f"{path}/below")
    assert not is_admin(path, {path})
    assert not is_admin(f"{path}/below", {path})


@pytest.mark.parametrize("path", ["", "/sleepy", "/v1/models", "/health", "/v1/audio/speech", "/x/sleep"])
def test_others_are_none(path: str) -> None:
    """A name that only begins alike is another path."""
    assert not is_admin(path)
