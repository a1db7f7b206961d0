"""When a changed setting takes effect, and what is said of those that a reload does not reach."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from extproc.config.schema import Config
from extproc.config.taking_effect import EFFECTS, Effect, changed, effect_of, out_of_reach, settings_of
from extproc.server.reloading.pending_settings import PendingSettings

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


def config(**sections: Any) -> Config:
    """The defaults but for these."""
    return Config.model_validate(sections)


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    """What is added to the schema has to say when it takes effect."""
    settings = settings_of(Config())
    for name in settings:
        assert effect_of(name), name
    for row in EFFECTS:
        assert any(name == row or name.startswith(f"{row}.") for name in settings), row
    with pytest.raises(KeyError):
        effect_of("serve.workers")


def test_the_manual_names_all_that_needs_more_than_a_reload() -> None:
    """In the words of the table; a section stands for its settings."""
    text = OPERATIONS.read_text(encoding="utf-8")
    (reload,) = [part for part in text.split("\n## ") if part.startswith("Reload")]
    for row, effect in EFFECTS.items():
        if effect & (Effect.RESTART | Effect.BOOTSTRAP):
            names = {f"`{row}`", f"`{row}:`", f"`{row.removeprefix('request.')}`"}
            assert any(name in reload for name in names), row


@pytest.mark.parametrize(
    ("before", "after", "needs"),
    [
        ({}, {}, {}),
        ({}, {"signals": {"timeout_s": 7}, "holding": {"max_s": 1}}, {}),
        ({}, {"load": {"lease_s": 7}}, {Effect.RESTART: ["load.lease_s"]}),
        (
            {"server": {"admin": {"port": 1}}},
            {"server": {"admin": {"port": 2}, "workers": 3}},
            {Effect.RESTART: ["server.admin.port", "server.workers"], Effect.BOOTSTRAP: ["server.workers"]},
        ),
        ({}, {"request": {"allow_fields": ["priority"]}}, {Effect.BOOTSTRAP: ["request.allow_fields"]}),
        ({}, {"cache": {"kv_events": {"enabled": False}}}, {}),
        (
            {},
            {"cache": {"kv_events": {"max_blocks": 5000}}},
            {Effect.RESTART: ["cache.kv_events.max_blocks"]},
        ),
        ({}, {"away": {"max_requests_per_endpoint": 5}}, {}),
        ({}, {"default_cluster": "c"}, {Effect.BOOTSTRAP: ["default_cluster"]}),
        ({"default_cluster": "c"}, {"default_cluster": "d"}, {}),
    ],
)
def test_what_needs_more_than_a_reload_is_found(
    before: dict[str, Any], after: dict[str, Any], needs: dict[Effect, list[str]]
) -> None:
    """By the setting, not by its section."""
    assert out_of_reach(config(**before), config(**after)) == needs


def test_a_section_that_comes_or_goes_is_a_change() -> None:
    """Sections may be null."""
    tls = {"cert_file": "/c", "key_file": "/k"}
    assert "edge.tls.cert_file" in changed(config(), config(edge={"tls": tls}))
    assert changed(config(edge={"tls": tls}), config(edge={"tls": tls})) == []


def test_each_change_is_logged_once_and_taken_back_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """Names and what to do, at each reload that changes them; never a value."""
    caplog.set_level(logging.WARNING, "tokenway.configuration")
    pending = PendingSettings(Config())
    for sections in ({}, {"load": {"lease_s": 7}}, {"load": {"lease_s": 8}}, {}, {"load": {"lease_s": 7}}):
        pending.follow(config(**sections))
    logged = [(record.__dict__["settings"], record.__dict__["do"]) for record in caplog.records]
    assert logged == [(["load.lease_s"], "restart Tokenway")] * 2
