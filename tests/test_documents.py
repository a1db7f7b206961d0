"""What the documents say of the tree: packages, modules and links that must be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_architecture import MAY_IMPORT, MODULES, ROOT, name_of

ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

HOMES = ("", "extproc", "metadata_center", "tokenway", "tokenway/simulator")
"""Folders that a path in a document may be relative to."""

_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?:[\w-]+/)+(?:(?!__init__)[\w.-]+\.py)?")
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
