"""What the documents say of the tree: packages, modules and links that must be there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from extproc.config.loading import json_schema
from extproc.observing.metrics.table import FAMILIES
from tests.test_architecture import MAY_IMPORT, MODULES, ROOT, name_of

ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

FOR_USERS = [path for path in DOCUMENTS if path.parent != ROOT / "docs" / "adr" and path != ARCHITECTURE]
"""Documents that name settings; elsewhere a name with a dot may be a module."""

HOMES = ("", "extproc", "extproc/discovery", "metadata_center", "tokenway", "tokenway/simulator")
"""Folders that a path in a document may be relative to."""

_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?:[\w-]+/)+(?:(?!__init__)[\w.-]+\.py)?")
_DOTTED = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)(?:[:,\s].*)?")
_METRIC = re.compile(r"tokenway_[a-z_]+")
_TARGET = re.compile(r"\bmake ((?:demo|test|check|lock|bench|fuzz)[a-z-]*)")
_OWNER = re.compile(r"(\w+(?:\.\w+)+)\.([A-Z]\w+)")
_MODULE = re.compile(r"(?:\w+/)*(?:\w+\.py|\w+/)")


def rows() -> dict[str, list[str]]:
    """Each package with a row in docs/architecture.md, by the name it is imported by, and its cells."""
    found: dict[str, list[str]] = {}
    for line in ARCHITECTURE.read_text(encoding="utf-8").splitlines():
        cells = line.strip("|").split(" | ")
        first = _CODE.fullmatch(cells[0].strip())
        if line.startswith("| ") and len(cells) == 4 and first is not None:
            name = first[1].removesuffix("/").removesuffix(".py").replace("/", ".")
            found[name] = [cell.strip() for cell in cells]
    return found


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    """Each relative link is to a file that is there, and to a heading that it has."""
    broken = []
    for link, anchor in _LINK.findall(path.read_text(encoding="utf-8")):
        there = path.parent / link if link else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(f"{link}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_paths_in_documents_are_there(path: Path) -> None:
    """So are the folders and modules that are named with their folder."""
    named = {
        word
        for code in _CODE.findall(path.read_text(encoding="utf-8"))
        for word in code.replace(":", " ").split()
        if _PATH.fullmatch(word) and word.partition("/")[0] in _tops()
    }
    assert {word for word in named if not any((ROOT / home / word).exists() for home in HOMES)} == set()


def _tops() -> set[str]:
    """First folders of the paths that are ours to keep true."""
    return {folder.name for home in HOMES for folder in (ROOT / home).iterdir() if folder.is_dir()}


def test_the_modules_in_a_row_are_in_its_package() -> None:
    """A module named without its folder is in the package of its row."""
    missing = [
        f"{package}: {name}"
        for package, cells in rows().items()
        for name in _CODE.findall(cells[1])
        if _MODULE.fullmatch(name) and not (ROOT / package.replace(".", "/") / name).exists()
    ]
    assert missing == []


def test_every_package_has_its_row() -> None:
    """Each package right below ours is in a table, and each module there."""
    roots = {"extproc", "metadata_center", "tokenway", "tokenway.simulator"}
    below = set()
    for module in MODULES:
        parts = module.split(".")
        below.add(".".join(parts[: 3 if module.startswith("tokenway.simulator.") else 2]))
    inside_a_row = {f"metadata_center.{path.stem}" for path in (ROOT / "metadata_center").glob("*.py")}
    starts_the_command = {"tokenway.__main__", "tokenway.simulator.__main__"}
    assert below - roots - inside_a_row - starts_the_command - rows().keys() == set()


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_the_tables_say_what_a_package_may_import(package: str) -> None:
    """The last column is `MAY_IMPORT`."""
    assert frozenset(_CODE.findall(rows()[package][3])) == MAY_IMPORT[package]


def test_every_decision_is_listed() -> None:
    """docs/adr/README.md has each decision record by its own title."""
    folder = ROOT / "docs" / "adr"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    for path in sorted(folder.glob("0*.md")):
        number, _, title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(". ")
        assert f"| {number} | [{title}]({path.name}) |" in listed, path.name


def is_setting(node: dict[str, Any], schema: dict[str, Any], names: list[str]) -> bool:
    """True if a dotted name, in parts, leads somewhere in the schema of tokenway.yaml from here."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if not names:
        return True
    if any(is_setting(one, schema, names) for one in node.get("anyOf", ())):
        return True
    inner = node.get("properties", {}).get(names[0], node.get("additionalProperties"))
    return isinstance(inner, dict) and is_setting(inner, schema, names[1:])


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_settings_in_documents_exist(path: Path) -> None:
    """A dotted name that begins with a section of tokenway.yaml is a setting."""
    schema = json_schema()
    named = {
        found[1]
        for code in _CODE.findall(path.read_text(encoding="utf-8"))
        if (found := _DOTTED.fullmatch(code)) and found[1].partition(".")[0] in schema["properties"]
    }
    assert {name for name in named if not is_setting(schema, schema, name.split("."))} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_metrics_in_documents_exist(path: Path) -> None:
    """A metric that is named is a family of the gateway's; the metadata center's begin with its name."""
    families = {family.name for family in FAMILIES}
    named = {
        name
        for code in _CODE.findall(path.read_text(encoding="utf-8"))
        for name in _METRIC.findall(code)
        if not name.startswith("tokenway_metadata_")
    }
    assert {name for name in named if not any(family.startswith(name) for family in families)} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_of_make_exist(path: Path) -> None:
    """`make X` has a rule for X."""
    words = set((ROOT / "Makefile").read_text(encoding="utf-8").replace(":", " ").split())
    assert set(_TARGET.findall(path.read_text(encoding="utf-8"))) <= words


def test_owners_exist() -> None:
    """Each owner of state in docs/architecture.md is a class of ours."""
    owners = [_OWNER.fullmatch(code) for code in _CODE.findall(ARCHITECTURE.read_text(encoding="utf-8"))]
    found = [(owner[1], owner[2]) for owner in owners if owner is not None]
    assert found
    for module, name in found:
        whole = module if module.startswith("metadata_center.") else f"extproc.{module}"
        assert hasattr(importlib.import_module(whole), name), f"{whole}.{name}"
