"""What a cell's figures depend on, as one hash.

Rules:
    1. A stamp covers the command line, the trace file, the policies' parameters and the sources that the
       cell's kind depends on, without their comments and docstrings. Equal stamps: the stored figures are
       those that a run would give.
    2. Rivals and oracles are stamped without the event loop and what it hands to rules (`run.py`,
       `gateway.py`, `ledger.py`, `view.py`): they change for the product's rules and for several gateways,
       and a run of an hour would be thrown away each time.
       `--verify` runs a stored cell again and compares, which is the proof that such a change was harmless.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.policies.cells import Cell, CellKind
from tokenway.simulator.policies.registry import REGISTRY

ROOT: Final = Path(__file__).parents[2]

_SHARED: Final = (
    "tokenway/simulator/engine/*.py",
    "extproc/choosing/rivals/*.py",
    "tokenway/simulator/policies/*.py",
    "tokenway/simulator/replay/*.py",
    "extproc/predicting/tokens.py",
    "metadata_center/history/prefix_index.py",
)

_OUTPUT: Final = frozenset(
    f"tokenway/simulator/replay/{name}.py" for name in ("export", "lineup", "log_lines", "plots", "report")
)
"""Say how figures are asked for and shown, not what they are; entrants are stamped by their parameters."""

_ORACLE: Final = "tokenway/simulator/replay/oracle.py"

_OTHERS: Final = frozenset(
    {
        *(f"tokenway/simulator/policies/{name}.py" for name in ("ours", "product", "registry")),
        *(f"tokenway/simulator/replay/{name}.py" for name in ("run", "gateway", "ledger")),
    }
)
"""What rivals are stamped without, see Rule 2."""

_WHOLE: Final = (
    *_SHARED,
    "extproc/choosing/*.py",
    "extproc/predicting/*.py",
    "extproc/values/choices.py",
    "metadata_center/history/seen_prefixes.py",
    "metadata_center/load/ledger.py",
    "metadata_center/types.py",
)

SOURCES: Final[Mapping[CellKind, tuple[tuple[str, ...], frozenset[str]]]] = {
    CellKind.RIVALS: (_SHARED, _OUTPUT | _OTHERS | {_ORACLE}),
    CellKind.ORACLES: (_SHARED, _OUTPUT | _OTHERS),
    CellKind.OWN: (tuple(each for each in _WHOLE if "rivals" not in each), _OUTPUT | {_ORACLE}),
    CellKind.WHOLE: (_WHOLE, _OUTPUT | {_ORACLE}),
}
"""CellKind -> patterns of files it depends on, and files of those that it does not."""


def sources(kind: CellKind, root: Path = ROOT) -> list[Path]:
    """Files that the figures of a kind depend on, sorted."""
    patterns, without = SOURCES[kind]
    found = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path for path in found if path.relative_to(root).as_posix() not in without)


def stamp(cell: Cell, traces: Path, root: Path = ROOT) -> str:
    """The hash of all that a cell's figures depend on, 16 hexadecimal digits.

    Raises:
        OSError: A source or the trace cannot be read.
    """
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    add(*(word.encode() for word in cell.argv))
    for policy in cell.policies:
        name = policy.partition("@")[0].partition(":")[0]
        rule = REGISTRY.get(name)  # None for an oracle, which has no row
        if rule is not None:
            add(name.encode(), repr(sorted(rule.parameters().items())).encode())
    trace = cell.line[0]
    if not trace.startswith("gen:"):
        add((traces / trace).read_bytes())
    for path in sources(cell.kind, root):
        add(path.relative_to(root).as_posix().encode(), code_of(path.read_bytes()))
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=512)
def code_of(source: bytes) -> bytes:
    """A module's lines without comments, strings that stand alone (docstrings) and what is empty then.

    Raises:
        SyntaxError: It is no module.
    """
    lines = [bytearray(line) for line in source.splitlines()]
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        first, last = node.lineno - 1, node.value.end_lineno or node.lineno
        for number in range(first, last):
            start = node.col_offset if number == first else 0
            end = node.value.end_col_offset if number == last - 1 else None
            blank = len(lines[number][start:end])
            lines[number][start:end] = b" " * blank
    text = [line.decode() for line in lines]
    plain = io.StringIO("\n".join(line.decode() for line in source.splitlines()))
    for token in tokenize.generate_tokens(plain.readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            text[row - 1] = text[row - 1][:column]
    return "\n".join(line.rstrip() for line in text if line.strip()).encode()
