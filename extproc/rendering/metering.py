"""What a chat template may make and do, counted before it is done.

Rules:
    1. Every operation that makes text, or reads all of one, takes from the meter first; loops and macros take
       a step each time round. When the meter is empty, `TooMuch` ends the rendering, whatever it does.
    2. A meter gives each rendering a multiple of what the request has: see `Meter.begin`.
    3. Metered operations give what Jinja's own give; those that no chat template needs, and that cannot be
       counted beforehand, end the rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, Final

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

CHARS: Final = 256 * 1024
CHARS_PER_BYTE: Final = 32
MOST_CHARS: Final = 64 * 1024 * 1024
"""Characters made or read on the way, some twenty times over in the longest templates; 64 Mi take 30 ms."""

STEPS: Final = 8_192
STEPS_PER_BYTE: Final = 0.25
MOST_STEPS: Final = 65_536
"""Loop iterations, and calls of macros, methods and filters; 65,536 take some 60 ms at worst."""

OUTPUT_CHARS: Final = 128 * 1024
OUTPUT_PER_BYTE: Final = 8
"""Characters of the text: templates put some kilobytes around a conversation, and indent its tools."""

_ITEMS_PER_STEP: Final = 16  # of lists that are copied or searched without a template's doing

_PIECE_CHARS: Final = 64  # that a piece of text takes beside its characters
_ITEM_CHARS: Final = 8  # that an item of a list takes

_WIDTH_DIGITS: Final = 4  # widths in formats that no template means: 1000 and more

_PRINTF_WIDTH: Final = re.compile(rf"%[^a-zA-Z%]*(?:\*|[0-9]{{{_WIDTH_DIGITS},}})")
_FORMAT_WIDTH: Final = re.compile(rf"\{{[^{{}}]*(?:\{{|[0-9]{{{_WIDTH_DIGITS},}})")

_REFUSED: Final = ("pprint", "random", "striptags", "sum", "urlize", "wordwrap", "xmlattr", "slice", "batch")
"""Jinja's filters that no chat template needs, and of which little makes much."""


class TooMuch(Exception):  # noqa: N818 - it says what the template made
    """A template made more, or took more steps, than its request is worth."""


class Meter:
    """What the rendering under way may still do.

    Attributes:
        output: Characters of the rendered text.
        walks: The template puts lists into lists, which may hold the same one twice: what is made text of is
            walked through before.
    """

    __slots__ = ("_chars", "_steps", "output", "walks")

    def __init__(self) -> None:
        self.walks = False
        self._chars = self._steps = self.output = MOST_CHARS  # compiling folds constants

    def begin(self, num_bytes: int, most_output: int) -> None:
        """Fill it for one rendering.

        Args:
            num_bytes: Of the request, as far as it reaches the template.
            most_output: Characters that are of use to the caller.
        """
        self._chars = min(MOST_CHARS, CHARS + CHARS_PER_BYTE * num_bytes)
        self._steps = min(MOST_STEPS, STEPS + int(STEPS_PER_BYTE * num_bytes))
        self.output = min(most_output, OUTPUT_CHARS + OUTPUT_PER_BYTE * num_bytes)

    def step(self, number: int = 1) -> None:
        """Take steps; raises TooMuch."""
        self._steps -= number
        if self._steps < 0:
            raise TooMuch

    def take(self, chars: int) -> None:
        """Take characters that are about to be made or read; raises TooMuch."""
        self._chars -= chars
        if self._chars < 0:
            raise TooMuch

    def took(self, made: Any) -> Any:
        """The same value; taken for what it is."""
        if type(made) is str:
            self.take(len(made))
        elif isinstance(made, list | tuple | dict):
            self.step(1 + len(made) // _ITEMS_PER_STEP)
        return made

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, a step each."""
        for item in items:
            self.step()
            yield item


def sandbox(meter: Meter, base: type[jinja2.sandbox.SandboxedEnvironment]) -> type[Any]:
    """The sandbox with metered calls, joins and outputs."""

    class Metered(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def concat(pieces: Iterable[str]) -> str:
            """What macros and blocks put together."""
            held = list(pieces)
            meter.take(sum(map(len, held)))
            return "".join(held)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, PYI063
            """As inherited; what text methods will make is known before."""
            meter.step()
            method = getattr(__obj, "__wrapped__", __obj)  # the sandbox has formats of its own
            owner = getattr(method, "__self__", None)
            if type(owner) is str:
                _before_method(meter, owner, method.__name__, args, kwargs)
            elif isinstance(owner, list | tuple | dict):
                meter.step(len(owner) // _ITEMS_PER_STEP)
            return meter.took(super().call(__context, __obj, *args, **kwargs))

    return Metered


def _before_method(meter: Meter, owner: str, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    meter.take(len(owner))
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        width = next((said for said in (*args, *kwargs.values()) if isinstance(said, int)), 8)
        meter.take(max(0, width) * (owner.count("\t") if name == "expandtabs" else 1))
    elif name == "replace":
        _before_replace(meter, owner, *args[:2])
    elif name == "join":
        _before_join(meter, owner, args[0] if args else ())
    elif name in ("format", "format_map"):
        _before_format(meter, _FORMAT_WIDTH, "{", owner, (*args, *kwargs.values()))
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args and type(args[0]) is str and args[0] else None
        pieces = owner.count(separator) if separator else len(owner) // 2
        meter.step(pieces // _ITEMS_PER_STEP)
    elif name in ("translate", "maketrans", "encode"):
        raise TooMuch


def _before_replace(meter: Meter, text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    old, new = str(old), str(new)
    meter.take(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _before_join(meter: Meter, separator: str, items: Any) -> None:
    if isinstance(items, str | list | tuple | dict):
        texts = sum(len(item) for item in items if isinstance(item, str))
        meter.take(texts + len(separator) * len(items))
        meter.step(len(items) // _ITEMS_PER_STEP)
    else:
        raise TooMuch


def _before_format(
    meter: Meter, widths: re.Pattern[str], mark: str, text: str, values: Iterable[Any]
) -> None:
    if widths.search(text):
        raise TooMuch
    longest = 0
    for said in values:
        for one in said if isinstance(said, tuple) else said.values() if isinstance(said, dict) else (said,):
            if not isinstance(one, str | int | float | None):
                raise TooMuch
            longest = max(longest, len(one) if isinstance(one, str) else 32)
    meter.take(len(text) + text.count(mark) * longest)


def filters(meter: Meter, given: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Jinja's filters, metered, and those that `Metering` puts in place of operators."""
    metered = {name: _metered(meter, function) for name, function in given.items()}
    for name in _REFUSED:
        metered[name] = _refusing
    return metered | _texts(meter, given) | {"tojson": _to_json(meter)} | _operators(meter)


def _texts(meter: Meter, given: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Filters that make text of a size that their arguments give, which is asked for before."""
    plain_join, plain_indent = given["join"], given["indent"]

    @wraps(plain_join)
    def join(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        meter.step()
        items = list(meter.counted(value))
        if attribute is None:
            _before_join(meter, str(d), items)
            return plain_join(context, items, d)
        made: list[Any] = list(meter.counted(given["map"](context, items, attribute=attribute)))
        _before_join(meter, str(d), made)
        return plain_join(context, made, d)

    def replace(s: Any, old: str, new: str, count: int | None = None) -> str:
        meter.step()
        text = str(s)
        _before_replace(meter, text, old, new)
        return text.replace(str(old), str(new), -1 if count is None else count)

    def center(value: Any, width: int = 80) -> str:
        meter.step()
        meter.take(max(int(width), len(str(value))))
        return str(value).center(width)

    def indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        meter.step()
        text = str(s)
        each = len(width) if isinstance(width, str) else max(0, int(width))
        meter.take(len(text) + each * (1 + len(text.splitlines())))
        return plain_indent(text, width, first, blank)

    def printf(value: Any, *args: Any, **kwargs: Any) -> str:
        meter.step()
        _before_format(meter, _PRINTF_WIDTH, "%", str(value), (*args, kwargs))
        return str(value) % (kwargs or args)

    return {"join": join, "replace": replace, "center": center, "indent": indent, "format": printf}


def _to_json(meter: Meter) -> Callable[..., str]:
    """`tojson` as chat templates mean it: unlike Jinja's own filter, nothing is escaped for HTML."""

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        meter.step()
        if meter.walks:
            _walk(meter, value)
        if indent is None:
            return str(
                meter.took(
                    json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
                )
            )
        if isinstance(indent, int):
            meter.take(max(0, indent))
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        pieces = []
        for piece in encoder.iterencode(value):
            meter.take(len(piece) + _PIECE_CHARS)
            pieces.append(piece)
        return "".join(pieces)

    return tojson


def _operators(meter: Meter) -> dict[str, Callable[..., Any]]:
    @jinja2.pass_context
    def step(_: Any, value: Any) -> Any:
        meter.step()
        return value

    def add(value: Any, *others: Any) -> Any:
        for other in others:
            meter.take(_size(value) + _size(other))
            value = value + other
        return value

    def concat(value: Any, *others: Any) -> str:
        texts = [one if type(one) is str else _text(meter, one) for one in (value, *others)]
        meter.take(sum(map(len, texts)))
        return "".join(texts)

    def multiply(left: Any, right: Any) -> Any:
        for one, times in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple) and isinstance(times, int):
                meter.take(_size(one) * max(0, times))
        return left * right

    def modulo(left: Any, right: Any) -> Any:
        if isinstance(left, str):
            _before_format(meter, _PRINTF_WIDTH, "%", left, (right,))
        return left % right

    def power(left: Any, right: Any) -> Any:
        if not isinstance(left, int | float) or not isinstance(right, int | float) or abs(right) > 64:
            raise TooMuch
        return left**right

    def slice_of(value: Any, start: Any, stop: Any, stride: Any) -> Any:
        if isinstance(value, str):
            meter.take(len(value) // 8)  # at most so much is copied, some 16 characters at a time
        return meter.took(value[start:stop:stride])

    def is_in(value: Any, container: Any) -> bool:
        if isinstance(container, str):
            meter.take(len(container))
        elif isinstance(container, list | tuple):
            meter.step(1 + len(container) // _ITEMS_PER_STEP)
        return bool(value in container)

    return {
        "tokenway_step": step,
        "tokenway_add": add,
        "tokenway_concat": concat,
        "tokenway_multiply": multiply,
        "tokenway_modulo": modulo,
        "tokenway_power": power,
        "tokenway_slice": slice_of,
        "tokenway_in": is_in,
    }


def finalize(meter: Meter) -> Callable[[Any], str]:
    """What makes text of each thing that is put out."""

    def made(value: Any) -> str:
        if type(value) is str:
            meter.take(len(value))
            return value
        text = _text(meter, value)
        meter.take(len(text))
        return text

    return made


def _size(value: Any) -> int:
    """Characters of a text, or what a list takes as so many."""
    if isinstance(value, str):
        return len(value)
    return _ITEM_CHARS * len(value) if isinstance(value, list | tuple) else 0


def _text(meter: Meter, value: Any) -> str:
    """`str(value)`; of lists and objects only after a walk over all that is in them."""
    if isinstance(value, list | tuple | dict):
        _walk(meter, value)
    return str(value)


def _walk(meter: Meter, value: Any) -> None:
    """Take what is in a value, however often it is in there."""
    todo: list[Any] = [value]
    while todo:
        one = todo.pop()
        meter.step()
        if isinstance(one, str):
            meter.take(len(one))
        elif isinstance(one, dict):
            todo += one.keys()
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one


def _metered(meter: Meter, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter.step()
        for said in args:
            if type(said) is str:
                meter.take(len(said))
            elif isinstance(said, list | tuple | dict):
                meter.step(len(said) // _ITEMS_PER_STEP)
                if meter.walks:
                    _walk(meter, said)
        made = function(*args, **kwargs)
        if isinstance(made, Iterator):
            return meter.counted(made)
        return meter.took(made)

    return metered


def _refusing(*_: Any, **__: Any) -> Any:
    raise TooMuch


class Metering(jinja2.visitor.NodeTransformer):
    """Puts metered operations in place of a template's own.

    Args:
        meter: Informed whether it has to walk.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def visit_Assign(self, node: Any) -> Any:  # noqa: N802
        """Looked at for lists made of what there was before."""
        for made in node.node.find_all((jinja2.nodes.List, jinja2.nodes.Tuple, jinja2.nodes.Dict)):
            self._meter.walks |= any(True for _ in made.find_all(jinja2.nodes.Name))
        if isinstance(node.node, jinja2.nodes.List | jinja2.nodes.Tuple | jinja2.nodes.Dict):
            self._meter.walks |= any(True for _ in node.node.find_all(jinja2.nodes.Name))
        return self.generic_visit(node)

    def _filter(self, node: jinja2.nodes.Expr, name: str, *args: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
        made = jinja2.nodes.Filter(node, f"tokenway_{name}", list(args), [], None, None)
        made.set_lineno(node.lineno)
        return made

    def _stepping(self, node: Any) -> Any:
        self.generic_visit(node)
        step = jinja2.nodes.ExprStmt(self._filter(jinja2.nodes.Const(None, lineno=node.lineno), "step"))
        step.set_lineno(node.lineno)
        node.body.insert(0, step)
        return node

    visit_For = visit_Macro = visit_CallBlock = _stepping  # noqa: N815

    def visit_Add(self, node: Any) -> Any:  # noqa: N802
        """A chain of additions at once."""
        operands: list[Any] = []
        left = node
        while isinstance(left, jinja2.nodes.Add):
            operands.append(left.right)
            left = left.left
        first, *others = (self.visit(one) for one in (left, *reversed(operands)))
        return self._filter(first, "add", *others)

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        """`~`."""
        self.generic_visit(node)
        return self._filter(node.nodes[0], "concat", *node.nodes[1:])

    def visit_Mul(self, node: Any) -> Any:  # noqa: N802
        """`*`."""
        self.generic_visit(node)
        return self._filter(node.left, "multiply", node.right)

    def visit_Mod(self, node: Any) -> Any:  # noqa: N802
        """`%`."""
        self.generic_visit(node)
        return self._filter(node.left, "modulo", node.right)

    def visit_Pow(self, node: Any) -> Any:  # noqa: N802
        """`**`."""
        self.generic_visit(node)
        return self._filter(node.left, "power", node.right)

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        """Slices; items are looked up as ever."""
        self.generic_visit(node)
        if not isinstance(node.arg, jinja2.nodes.Slice):
            return node
        none = jinja2.nodes.Const(None, lineno=node.lineno)
        return self._filter(
            node.node, "slice", *(part or none for part in (node.arg.start, node.arg.stop, node.arg.step))
        )

    def visit_Compare(self, node: Any) -> Any:  # noqa: N802
        """`in` and `not in`."""
        self.generic_visit(node)
        if len(node.ops) != 1 or node.ops[0].op not in ("in", "notin"):
            return node
        found = self._filter(node.expr, "in", node.ops[0].expr)
        return found if node.ops[0].op == "in" else jinja2.nodes.Not(found, lineno=node.lineno)
