"""A value that will be known later, and its listener: without an event loop, a task or a queue.

Rules:
    1. It ends once: given, failed, or cancelled by its reader. What is done to it then has no
       effect, so that an answer which comes late is no fault.
    2. There is one listener; a second one is a fault, for it would wait for ever. It is called at once if the
       end came before, else while the value is given. What it was given is kept no longer here: an error
       knows the frames that it was raised in, and these this.
    3. Cancelling reaches the code that works at it, at once; the listener is not called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

_NOTHING: Final[Any] = object()
"""In place of a value that was never given."""


class Pending(Generic[T]):
    """Something that is worked at.

    Args:
        cancelled: Called when it is cancelled; the work then has no effect on anybody.
    """

    __slots__ = ("_cancelled", "_error", "_failed", "_given", "_is_listened_to", "_value", "is_over")

    def __init__(self, cancelled: Callable[[], object] | None = None) -> None:
        self._cancelled = cancelled
        self._given: Callable[[T], object] | None = None
        self._failed: Callable[[Exception], object] | None = None
        self._value: Any = _NOTHING
        self._error: Exception | None = None
        self._is_listened_to = False
        self.is_over = False
        """Given, failed or cancelled."""

    def then(self, given: Callable[[T], object], failed: Callable[[Exception], object]) -> None:
        """Have one of the two called when it ends.

        Raises:
            RuntimeError: Somebody else listens, or did.
        """
        if self._is_listened_to:
            raise RuntimeError("a pending value has one listener")
        self._is_listened_to = True
        if not self.is_over:
            self._given, self._failed = given, failed
        elif self._error is not None:
            error, self._error = self._error, None
            failed(error)
        elif self._value is not _NOTHING:
            value, self._value = self._value, _NOTHING
            given(value)

    def give(self, value: T) -> None:
        """This is it."""
        if self.is_over:
            return
        given = self._given
        self._end()
        if given is None:
            self._value = value
        else:
            given(value)

    def fail(self, error: Exception) -> None:
        """It will not be: a refusal, or a fault."""
        if self.is_over:
            return
        failed = self._failed
        self._end()
        if failed is None:
            self._error = error
        else:
            failed(error)

    def cancel(self) -> None:
        """It is not wanted any more."""
        if self.is_over:
            return
        cancelled = self._cancelled
        self._end()
        if cancelled is not None:
            cancelled()

    def _end(self) -> None:
        """Let go of both sides, which know this one: no cycle is left."""
        self.is_over = True
        self._cancelled = self._given = self._failed = None

    def follow(self, other: Pending[T]) -> None:
        """Be what `other` will be; to cancel this one is to cancel that."""
        if self.is_over:
            other.cancel()
            return
        self._cancelled = other.cancel
        other.then(self.give, self.fail)
