"""Files of `engine_tls`: what refuses a configuration, and what makes it another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from extproc.config.engine_files import EngineFiles
from extproc.config.schema import Config
from extproc.observing.metrics.collector import Metrics
from extproc.server.reloading.configuration import Configuration
from testbed.certificates import issued
from testbed.processes import eventually

TLS = {"ca_file": "ca.pem", "cert_file": "own.pem", "key_file": "own.key"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates that `own`, `other` of one CA and `stranger`, a CA, are made of."""
    folder = tmp_path_factory.mktemp("made")
    issued(folder, "ca")
    issued(folder, "own", "ca")
    issued(folder, "other", "ca")
    issued(folder, "stranger")
    return folder


@pytest.fixture
def pki(made: Path, tmp_path: Path) -> Path:
    """The files that the configuration names."""
    for name in TLS.values():
        (tmp_path / name).write_bytes((made / name).read_bytes())
    return tmp_path


def config_of(pki: Path, **files: str) -> Config:
    """One cluster with TLS by these files."""
    named = {key: str(pki / name) for key, name in {**TLS, **files}.items()}
    return Config.model_validate({"engine_tls": {"a": {**named, "server_name": "e"}}})


def put(pki: Path, name: str, content: bytes) -> None:
    """Put a file in place in one step."""
    (pki / "new").write_bytes(content)
    (pki / "new").replace(pki / name)


def test_settings_are_others_when_their_files_are(pki: Path, made: Path) -> None:
    """By the certificate that is shown and the CA that is believed; nothing of a key is told."""
    files = EngineFiles()
    config = config_of(pki)
    assert files.read(config) == []
    first = files.filled(config)
    assert first != config
    assert files.read(config) == []
    assert files.filled(config) == first
    for name in ("own.pem", "own.key"):
        put(pki, name, (made / name.replace("own", "other")).read_bytes())
    assert files.read(config) == []
    second = files.filled(config)
    put(pki, "ca.pem", (made / "stranger.pem").read_bytes())
    assert files.read(config) == []
    assert len({one.engine_tls["a"].contents for one in (config, first, second, files.filled(config))}) == 4
    assert "contents" not in second.model_dump_json()
    put(pki, "own.key", (made / "other.key").read_bytes() + b"\n")
    before = files.filled(config)
    assert files.read(config) == []
    assert files.filled(config) == before


@pytest.mark.parametrize(
    ("damage", "key"),
    [
        (lambda pki: put(pki, "ca.pem", b""), "ca_file"),
        (lambda pki: put(pki, "own.pem", b"-----BEGIN CERTIFICATE-----\n"), "cert_file"),
        (lambda pki: put(pki, "own.key", (pki / "own.pem").read_bytes()), "cert_file"),
        (lambda pki: (pki / "ca.pem").unlink(), "ca_file"),
        (lambda pki: (pki / "own.key").unlink(), "key_file"),
    ],
)
def test_a_file_that_was_good_and_is_not_refuses(pki: Path, damage: Callable[[Path], None], key: str) -> None:
    """For as long as it is named, and until it is good again."""
    files, config = EngineFiles(), config_of(pki)
    assert files.read(config) == []
    before = {path: path.read_bytes() for path in pki.iterdir()}
    damage(pki)
    for _ in range(2):
        [(location, text)] = files.read(config)
        assert location == ("engine_tls", "a", key)
        assert text.startswith(str(pki))
    for path, content in before.items():
        path.write_bytes(content)
    assert files.read(config) == []
    assert files.read(Config()) == []
    damage(pki)
    is_read = any(not path.exists() for path in before)
    assert bool(files.read(config)) is not is_read


def test_a_file_that_never_was_here_may_be_envoys_alone(pki: Path) -> None:
    """It is waited for: when it comes the settings are others."""
    (pki / "ca.pem").rename(pki / "later.pem")
    files, config = EngineFiles(), config_of(pki)
    assert files.read(config) == []
    assert files.filled(config).engine_tls["a"].contents == ""
    assert pki / "ca.pem" in files.looks
    (pki / "later.pem").rename(pki / "ca.pem")
    assert files.read(config) == []
    assert files.filled(config).engine_tls["a"].contents != ""


async def test_a_rotation_is_a_reload(pki: Path, made: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pair that is half there is refused, with line and key; the whole one is applied."""
    applied: list[str] = []
    path = pki / "tokenway.yaml"
    path.write_text(yaml.safe_dump(config_of(pki).model_dump(mode="json", include={"engine_tls"})))
    (pki / "clusters.json").write_text('{"clusters": []}')
    configuration = Configuration(
        path,
        Metrics(CollectorRegistry(), "test"),
        lambda config, _: applied.append(config.engine_tls["a"].contents),
    )
    await configuration.start()
    try:
        with caplog.at_level(logging.ERROR):
            put(pki, "own.pem", (made / "other.pem").read_bytes())

            async def files() -> bool:
                return configuration.files()["tokenway.yaml"]

            await eventually(files, lambda is_good: not is_good)
        (record,) = caplog.records
        assert "engine_tls.a.cert_file" in record.__dict__["problem"]
        assert record.__dict__["problem"].startswith("line ")
        assert configuration.files().keys() == {"tokenway.yaml", "clusters.json"}
        put(pki, "own.key", (made / "other.key").read_bytes())
        await eventually(files, bool)
        await asyncio.sleep(0)
        assert len(set(applied)) == 2
    finally:
        await configuration.stop()
