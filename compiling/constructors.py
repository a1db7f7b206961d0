"""Writes out what mypyc does not see: the constructors of dataclasses, and `raise ... from None`.

Rules:
    1. Every line keeps its number, so that a traceback of compiled code names lines of the repository.
    2. What else a dataclass has (comparison, `replace`, its representation) is made by `dataclass` as ever.
       `frozen` and `slots` go: the type checker has proved the first, and a native class is as slots are.
    3. `from None` becomes what it does, for mypyc passes over it: a refusal does not show what it came from.
    4. A generic class marked as a `value` stays as it is, and is interpreted; mypyc makes no dataclass of it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Final

_FUTURE: Final = "from __future__ import annotations"


class CannotExpandError(Exception):
    """A dataclass is written in a way that is not understood here."""


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    annotation: str
    default: str | None
    factory: str | None

    @property
    def is_required(self) -> bool:
        return self.default is None and self.factory is None

    @property
    def parameter(self) -> str:
        if self.factory is not None:
            return f"{self.name}: {self.annotation} | None = None"
        return f"{self.name}: {self.annotation}" + ("" if self.default is None else f" = {self.default}")

    @property
    def assignment(self) -> str:
        if self.factory is None:
            return f"self.{self.name} = {self.name}"
        return f"self.{self.name} = {self.factory}() if {self.name} is None else {self.name}"


def expanded(source: str) -> str:
    """A module with the constructors of its dataclasses written out.

    Raises:
        CannotExpandError: A dataclass has no place for its constructor.
    """
    tree = ast.parse(source)
    lines = source.split("\n")
    for raised in ast.walk(tree):
        if isinstance(raised, ast.Raise) and isinstance(raised.cause, ast.Constant):
            _raise_alone(raised, lines)
    of_bases: dict[str, list[_Field]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            _expand(node, lines, of_bases)
    if of_bases and "from dataclasses import dataclass" not in source:
        lines[lines.index(_FUTURE)] += "; from dataclasses import dataclass"
    return "\n".join(lines)


def _expand(node: ast.ClassDef, lines: list[str], of_bases: dict[str, list[_Field]]) -> None:
    decorator, options = _dataclass_options(node)
    is_generic = any(ast.unparse(base).startswith("Generic[") for base in node.bases)
    if decorator is None or (is_generic and isinstance(decorator, ast.Name)):
        return
    fields = [field for base in node.bases for field in of_bases.get(ast.unparse(base), ())]
    own = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    fields += map(_field, own)
    of_bases[node.name] = fields
    is_keyword_only = options.get("kw_only", False)
    options.pop("slots", None)
    if options.pop("frozen", False) and options.get("eq", True):
        options["unsafe_hash"] = True
    options["init"] = False
    first, last = decorator.lineno - 1, decorator.end_lineno or decorator.lineno
    lines[first:last] = [""] * (last - first)
    if not is_generic:
        lines[first] = f"@dataclass({', '.join(f'{name}={said}' for name, said in options.items())})"
    elif options.get("eq", True) or any(each.value for each in own if _field(each).factory):
        raise CannotExpandError(f"{node.name}: a generic dataclass that is compared has to be a value")
    if is_keyword_only:
        fields = sorted(fields, key=lambda field: not field.is_required)
    _insert(node, lines, _constructor(node, fields, is_keyword_only))


def _raise_alone(node: ast.Raise, lines: list[str]) -> None:
    assert node.exc is not None
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    steps = f"_raised = {ast.unparse(node.exc)}; _raised.__suppress_context__ = True; raise _raised"
    lines[first:last] = [" " * node.col_offset + steps] + [""] * (last - first - 1)


def _dataclass_options(node: ast.ClassDef) -> tuple[ast.expr | None, dict[str, bool]]:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Name) and decorator.id in ("value", "dataclass"):
            return decorator, {}
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "dataclass":
            return decorator, {
                said.arg: ast.literal_eval(said.value) for said in decorator.keywords if said.arg is not None
            }
    return None, {}


def _field(node: ast.AnnAssign) -> _Field:
    name, annotation = ast.unparse(node.target), ast.unparse(node.annotation)
    if "ClassVar" in annotation or "InitVar" in annotation:
        raise CannotExpandError(f"{name}: {annotation}")
    if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "field":
        said = {each.arg: ast.unparse(each.value) for each in node.value.keywords}
        if "default_factory" not in said:
            raise CannotExpandError(f"{name}: a field without a factory")
        return _Field(name, annotation, None, said["default_factory"])
    return _Field(name, annotation, None if node.value is None else ast.unparse(node.value), None)


def _constructor(node: ast.ClassDef, fields: list[_Field], is_keyword_only: bool) -> str:
    parameters = ["self", *(["*"] if is_keyword_only else []), *(field.parameter for field in fields)]
    steps = [field.assignment for field in fields]
    if any(isinstance(each, ast.FunctionDef) and each.name == "__post_init__" for each in node.body):
        steps.append("self.__post_init__()")
    return f"    def __init__({', '.join(parameters)}) -> None: {'; '.join(steps or ['pass'])}"


def _insert(node: ast.ClassDef, lines: list[str], constructor: str) -> None:
    """On the empty line before the first method, or the one after the class: rule 1."""
    method = next((each for each in node.body if isinstance(each, ast.FunctionDef)), None)
    if method is None:
        at = node.end_lineno or node.lineno
        if at == len(lines):
            lines.append("")
    else:
        at = min([method.lineno, *(each.lineno for each in method.decorator_list)]) - 2
    if lines[at].strip():
        raise CannotExpandError(f"{node.name}: no empty line for its constructor")
    lines[at] = constructor
