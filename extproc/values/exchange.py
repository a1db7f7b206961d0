"""One HTTP request as Envoy reports it, and what its request line alone decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from extproc.errors import RouterError
from extproc.values.control import Ignored
from extproc.values.placements import Plan
from extproc.values.standing import Standing
from extproc.values.subsets import Subset
from metadata_center.types import value

Body = bytes | memoryview
"""Of a request; a large one is a view of its message, which is not copied to be understood."""

NO_OWNER = "passed"
"""In place of a worker's name, for requests that are routed past us: they are charged nowhere."""


@value
class RequestHeaders:
    """The request line and headers.

    Attributes:
        method: Upper case.
        path: As sent, query string included.
        headers: Lower-case names; pseudo-headers included. Secrets never arrive: Envoy withholds them.
        end_of_stream: True if no body follows.
        within: The endpoints to choose from, where a proxy says so; None leaves all.
        model: Asked for in place of the body's, where a proxy says so.
        standing: Whose it is, where a proxy says so.
        shows_answer: Chunks of its answer will be seen here, or reported.
        ignored: Control headers that say nothing.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    end_of_stream: bool
    within: Subset | None = None
    model: str | None = None
    standing: Standing | None = None
    shows_answer: bool = True
    ignored: tuple[Ignored, ...] = ()


class LineVerdict:
    """What the request line alone decides. One of the four below."""

    __slots__ = ()


class NeedBody(LineVerdict):
    """An inference request: its body decides. There are two."""

    __slots__ = ()


NEED_BODY = NeedBody()

NEED_BODY_AND_HEAD = NeedBody()
"""Likewise, and the head of the answer is of interest as well."""


@dataclass(frozen=True, slots=True)
class PassTo(LineVerdict):
    """Not an inference request: it goes there unseen, and is charged nowhere.

    Attributes:
        plan: Where.
        new_path: In place of the client's; None sends the client's own.
    """

    plan: Plan
    new_path: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerAtOnce(LineVerdict):
    """Tokenway answers by itself."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class RefuseAtOnce(LineVerdict):
    """No."""

    error: RouterError


class Sight(Enum):
    """What one chunk of an answer shows of its first token."""

    NOT_YET = auto()
    PASSES = auto()
    """It is in the first bytes of the answer."""
    PASSES_LATE = auto()
    """Other bytes of the answer came before it."""
    NEVER = auto()
