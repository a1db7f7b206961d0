"""What is done to sources before mypyc compiles them."""

from __future__ import annotations

import ast
import dataclasses
import runpy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest

from compiling.constructors import CannotExpandError, expanded
from compiling.extensions import listed
from extproc.build_kind import BuildKind, build_kind
from extproc.routing import router
from extproc.server.bodies import reading_process
from extproc.server.exchanging import bus, entry_relay

ROOT = Path(__file__).parents[3]

SOURCE = '''
from __future__ import annotations
from dataclasses import dataclass, field
from metadata_center.types import value


@value
class Point:
    """One."""

    x: int
    y: int = 2


@dataclass(frozen=True, slots=True)
class Named(Point):
    """With a list of its own, and what follows from its making."""

    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Once made."""
        self.names.append(str(self.x))


@dataclass(slots=True, eq=False, kw_only=True)
class Keyed:
    """By keywords, in an order that a constructor could not have otherwise."""

    first: int = 1
    second: int


@dataclass(frozen=True, slots=True)
class Frozen:
    """Is a key."""

    x: int
'''


def executed(source: str, folder: Path) -> Any:
    """What the module has."""
    path = folder / "made.py"
    path.write_text(source)
    return SimpleNamespace(**runpy.run_path(str(path)))


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """With constructors written out."""
    return executed(expanded(SOURCE), tmp_path)


def test_constructors_take_what_the_generated_ones_took(made: Any) -> None:
    """Defaults, factories, fields of the class above, keywords."""
    assert repr(made.Point(1)) == "Point(x=1, y=2)"
    assert made.Named(3, 4).names == ["3"]
    assert made.Named(3, 4).names is not made.Named(3, 4).names
    assert (made.Keyed(second=5).first, made.Keyed(second=5).second) == (1, 5)
    with pytest.raises(TypeError):
        made.Keyed(1, 2)


def test_values_compare_hash_and_are_replaced_as_before(made: Any) -> None:
    """By what `dataclass` makes as ever."""
    assert made.Point(1) == made.Point(1, 2) != made.Point(2)
    assert dataclasses.replace(made.Point(1), y=9) == made.Point(1, 9)
    assert made.Keyed(second=1) != made.Keyed(second=1)
    assert hash(made.Frozen(1)) == hash(made.Frozen(1)) != hash(made.Frozen(2))


def test_lines_keep_their_numbers(made: Any) -> None:
    """Of every module that is compiled: a traceback names lines of the repository."""
    assert made.Named.__init__.__code__.co_firstlineno < made.Named.__post_init__.__code__.co_firstlineno
    for path in listed():
        source = (ROOT / path).read_text()
        places = [
            {node.name: node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}
            for text in (source, expanded(source))
        ]
        assert places[0] == places[1], path


@pytest.mark.parametrize(
    "source",
    [
        "class A(Generic[T]):\n    x: T\n",
        "class A:\n    x: ClassVar[int] = 1\n",
        "class A:\n    x: int = field(compare=False, default=1)\n",
        "class A:\n    x: int\n    def f(self) -> None: ...\n",
    ],
)
def test_what_is_not_understood_fails_the_build(source: str) -> None:
    """Rather than be compiled into something else."""
    with pytest.raises(CannotExpandError):
        expanded(f"from __future__ import annotations\n\n\n@dataclass(slots=True)\n{source}")


def classes(module: str) -> list[ast.ClassDef]:
    """Of a module of the repository."""
    tree = ast.parse((ROOT / module).read_text())
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def test_whatever_inherits_from_compiled_classes_is_compiled() -> None:
    """An interpreted class cannot."""
    compiled = {
        (module.removesuffix(".py").replace("/", "."), each.name)
        for module in listed()
        for each in classes(module)
        if not any(ast.unparse(base) in ("Protocol", "NamedTuple") for base in each.bases)
    }
    for package in ("extproc", "metadata_center", "tokenway"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if name in listed():
                continue
            imported = {
                alias.asname or alias.name: (node.module, alias.name)
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            for each in classes(name):
                bases = {imported.get(ast.unparse(base).partition("[")[0]) for base in each.bases}
                assert not bases & compiled, f"{name}: {each.name}"


@pytest.mark.parametrize("module", [bus, entry_relay, reading_process])
def test_what_is_read_from_the_wire_is_interpreted(module: ModuleType) -> None:
    """Msgspec reads types of fields, which compiled classes do not tell."""
    modules = {path.removesuffix(".py").replace("/", ".") for path in listed()}
    structs = [
        each for each in vars(module).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)
    ]
    assert structs
    for struct in structs:
        for kind in _reached(msgspec.inspect.type_info(struct)):
            assert kind.__module__ not in modules, kind


def _reached(info: msgspec.inspect.Type) -> set[type]:
    """Data classes that are made of what was read."""
    found: set[type] = set()
    for name in info.__struct_fields__:
        said = getattr(info, name)
        for each in said if isinstance(said, tuple) else (said,):
            inner = each.type if isinstance(each, msgspec.inspect.Field) else each
            if isinstance(inner, msgspec.inspect.Type):
                found |= _reached(inner)
    return found | ({info.cls} if isinstance(info, msgspec.inspect.DataclassType) else set())


def test_a_build_says_what_it_is() -> None:
    """By the file that is imported."""
    is_source = (router.__file__ or "").endswith(".py")
    assert build_kind() is (BuildKind.PURE if is_source else BuildKind.COMPILED)
