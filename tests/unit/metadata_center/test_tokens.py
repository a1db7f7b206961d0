"""Bearer tokens, by how they are kept."""

from __future__ import annotations

import pytest

from extproc.config.sections.sharing import MetadataCenter
from extproc.errors import ConfigError
from extproc.server.exchanging.sharing import transport_of
from metadata_center.tokens import MALFORMED, bearer


@pytest.mark.parametrize("kept", ["t.o-k_e/n=", "t.o-k_e/n=\n", " t.o-k_e/n=\r\n\n", "\ufefft.o-k_e/n=\n"])
def test_a_token_is_read_as_people_keep_it(kept: str) -> None:
    """With the ends of lines and the mark that editors add."""
    assert bearer(kept) == bearer(kept.encode()) == "t.o-k_e/n="


@pytest.mark.parametrize(
    "kept", ["", "\n", "s3cret\nother", "s3 cret", "s3cret\0", "s3cr\u00e9t", b"s3cret\xff", b"\xff\xfe"]
)
def test_what_no_header_can_have_is_no_token(kept: str | bytes) -> None:
    """The words say what is accepted and quote nothing."""
    with pytest.raises(ValueError, match="no token") as raised:
        bearer(kept)
    assert str(raised.value) == MALFORMED


def test_a_variable_with_no_token_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each exchange with the metadata center was an error in the log, and gateways never met."""
    monkeypatch.setenv("OF_CENTER", "s3cret\nother")
    section = MetadataCenter(url="http://127.0.0.1:9", password_env="OF_CENTER")
    with pytest.raises(
        ConfigError, match=r"metadata_center.password_env: the variable has no token"
    ) as raised:
        transport_of(section, "tokenway.yaml")
    assert "s3cret" not in str(raised.value)
    monkeypatch.setenv("OF_CENTER", "s3cret\n")
    transport_of(section, "tokenway.yaml")
