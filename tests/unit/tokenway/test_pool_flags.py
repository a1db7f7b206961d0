"""Flags that say which pods there are: what they mean as settings, what does not go together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from extproc.config.loading import load_all
from extproc.errors import ConfigError
from extproc.server.envoys.bootstrap import shipped
from tokenway.cli.main import main
from tokenway.cli.picker_flags import add_picker_flags, picker_settings
from tokenway.cli.pool_flags import add_pool_flags, pool_settings


def parsed(*words: str) -> argparse.Namespace:
    """The words as options."""
    parser = argparse.ArgumentParser()
    add_picker_flags(parser)
    add_pool_flags(parser)
    return parser.parse_args(words)


def settings(*words: str) -> dict[str, Any]:
    """What Kubernetes is asked for, by these flags."""
    found = pool_settings(parsed(*words))
    return found["discovery"]["kubernetes"] if found else {}


def test_a_pool() -> None:
    """By name alone, or with all that may be said."""
    assert settings() == {}
    assert settings("--pool-name", "llama") == {"pool": {"name": "llama"}}
    words = ("--pool-name", "llama", "--pool-namespace", "m", "--pool-group", "inference.networking.x-k8s.io")
    assert settings(*words) == {
        "pool": {"name": "llama", "namespace": "m", "group": "inference.networking.x-k8s.io"}
    }


def test_a_selector(tmp_path: Path) -> None:
    """Labels and ports, as llm-d writes them."""
    words = ("--endpoint-selector", "app=vllm, tier=a", "--endpoint-target-ports", "8000,8001")
    assert settings(*words, "--kubeconfig", str(tmp_path / "k")) == {
        "selectors": [
            {"name": "endpoints", "match_labels": {"app": "vllm", "tier": "a"}, "target_ports": [8000, 8001]}
        ],
        "kubeconfig": str(tmp_path / "k"),
    }


@pytest.mark.parametrize(
    "words",
    [
        ("--pool-name", "a", "--endpoint-selector", "a=b", "--endpoint-target-ports", "1"),
        ("--endpoint-selector", "a=b"),
        ("--endpoint-target-ports", "1"),
        ("--pool-group", "inference.networking.k8s.io"),
        ("--pool-namespace", "a"),
        ("--kubeconfig", "a"),
    ],
)
def test_what_does_not_go_together(words: tuple[str, ...]) -> None:
    """Says what is accepted."""
    with pytest.raises(ConfigError, match="accepted: "):
        pool_settings(parsed(*words))


@pytest.mark.parametrize(
    "words",
    [
        ("--endpoint-selector", "app"),
        ("--endpoint-selector", "app==b"),
        ("--endpoint-selector", ""),
        ("--endpoint-target-ports", "8000,x"),
        ("--endpoint-target-ports", "0"),
        ("--pool-group", "x"),
    ],
)
def test_what_is_none(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Is refused by the command line."""
    with pytest.raises(SystemExit):
        parsed(*words)
    assert "error" in capsys.readouterr().err


def test_without_a_file_they_are_all() -> None:
    """An endpoint picker as deployments of llm-d expect it, for every model of the pool."""
    options = parsed("--pool-name", "llama", "--pool-namespace", "models")
    together = {**picker_settings(options, is_wanted=True), **pool_settings(options)}
    config, clusters = load_all(shipped("etc/picker.yaml"), together)
    assert clusters == ()
    assert config.endpoint_picker is not None
    assert config.endpoint_picker.listen[0].endswith(":9002")
    assert config.endpoint_picker.health_listen[0].endswith(":9003")
    assert config.endpoint_picker.self_signed
    assert config.discovery.kubernetes is not None
    assert config.default_cluster == "llama"
    assert [(name, [rule.cluster for rule in model.rules]) for name, model in config.models.items()] == [
        ("*", ["llama"])
    ]


def test_bad_names_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """What the flags say is checked as a file is."""
    assert main(["serve", "--pool-name", "A B"]) == 1
    assert "discovery.kubernetes.pool.name" in capsys.readouterr().err


def test_neither_file_nor_pods(capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to serve: words that cannot be used, which is 2."""
    assert main(["serve"]) == 2
    assert "--pool-name" in capsys.readouterr().err


def test_outside_of_a_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is missing."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["serve", "--pool-name", "llama"]) == 1
    assert "KUBERNETES_SERVICE_HOST is not set" in capsys.readouterr().err
