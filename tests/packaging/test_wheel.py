"""What the wheel and the source distribution hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = (
    *("extproc", "metadata_center", "tokenway", "envoy", "etc", "requirements"),
    *("tests", "benchmarks", "testbed", "compiling"),
)

PACKAGES = ("extproc", "metadata_center", "tokenway")

SHIPPED = {
    "bootstrap.yaml": "envoy/bootstrap.yaml",
    "istio-proxy.yaml": "envoy/istio-proxy.yaml",
    "clusters.json": "etc/clusters.json",
    "tokenway.yaml": "etc/tokenway.yaml",
    "picker.yaml": "etc/picker.yaml",
    "tokenway.schema.json": "etc/tokenway.schema.json",
    "metadata-center.openapi.json": "etc/metadata-center.openapi.json",
    "envoy-requirements.txt": "requirements/envoy.txt",
}

OTHER_DATA = {
    "metadata_center/sharing/lua/snapshot.lua",
    "metadata_center/sharing/lua/update.lua",
    "tokenway/simulator/replay/samples/chat.jsonl.gz",
}


def build(what: str, source: Path, into: Path) -> Path:
    """Build with the backend of pyproject.toml, as pip would; nothing is fetched."""
    into.mkdir()
    code = f"from setuptools import build_meta as b; b.build_{what}({str(into)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that packages are made from, without what earlier builds left."""
    place = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, place)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignored)
    return place


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel."""
    return zipfile.ZipFile(build("wheel", source, tmp_path_factory.mktemp("built") / "wheel"))


def contents(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """Files by name, but those about the distribution."""
    return {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_takes_no_name_that_is_not_ours(wheel: zipfile.ZipFile) -> None:
    """Two names the layout fixes, our own, and the distribution's; the tests and benchmarks are not in it."""
    assert {name.partition("/")[0] for name in wheel.namelist()} == {*PACKAGES, "tokenway-0.1.0.dist-info"}


def test_the_wheel_holds_the_sources_and_the_data_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Every module of the three packages, the marker of types, and the listed data."""
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    markers = {f"{package}/py.typed" for package in PACKAGES}
    shipped = {f"extproc/shipped/{name}" for name in SHIPPED}
    assert set(contents(wheel)) == modules | markers | shipped | OTHER_DATA


def test_what_is_shipped_is_what_the_repository_shows(wheel: zipfile.ZipFile) -> None:
    """Links here, the same files there."""
    for name, original in SHIPPED.items():
        assert wheel.read(f"extproc/shipped/{name}") == (ROOT / original).read_bytes(), name
        assert (ROOT / "extproc" / "shipped" / name).resolve() == ROOT / original


def test_the_source_distribution_makes_the_same_wheel(
    source: Path, wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    """A build from it is the same as ours."""
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert contents(zipfile.ZipFile(build("wheel", unpacked, tmp_path / "again"))) == contents(wheel)


def test_the_metadata_names_licence_and_command(wheel: zipfile.ZipFile) -> None:
    """The licence as an expression with its text, and one script."""
    info = "tokenway-0.1.0.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert (metadata["Name"], metadata["License-Expression"]) == ("tokenway", "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.11"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert wheel.read(f"{info}/entry_points.txt").decode().split() == [
        *("[console_scripts]", "tokenway", "=", "tokenway.cli.main:main")
    ]
