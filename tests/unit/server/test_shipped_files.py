"""YAML files that come with the package, as the command and a worker read them."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import yaml

from extproc.config import notation
from extproc.server.envoys.bootstrap import shipped, shipped_document, template

NAMES = ("envoy/bootstrap.yaml", "envoy/istio-proxy.yaml")


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML has no libyaml here")
def test_the_template_is_read_by_libyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker reads it on its loop, where PyYAML's own scanner takes ten times as long."""

    def refuse(_: Any) -> NoReturn:
        raise AssertionError("PyYAML's own scanner read a shipped file")

    monkeypatch.setattr(yaml.SafeLoader, "fetch_more_tokens", refuse)
    assert template()["static_resources"]["listeners"]
    for name in NAMES:
        assert shipped_document(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_says_the_same_without_libyaml(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML is installed without libyaml where no wheel of it fits."""
    read = shipped_document(name)
    monkeypatch.setattr(notation, "_Loader", yaml.SafeLoader)
    assert shipped_document(name) == read == yaml.safe_load(shipped(name).read_text(encoding="utf-8"))
