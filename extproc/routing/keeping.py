"""Columns of a decision as its record keeps them.

Rules:
    1. The same numbers to the last bit, in arrays: 4 or 8 bytes each where a list takes up to 40, and nothing
       for a collection of garbage to look at, which would look at each number of each list.
    2. Few rows stay lists, whose elements are quicker to read; so do columns that many decisions share.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Final, TypeVar, cast

from extproc.values.choices import Choice, Snapshot
from extproc.values.decisions import CacheSource

_IntT = TypeVar("_IntT", bound="int | None")

WORTH_AN_ARRAY: Final = 16
"""From so many rows on an array of theirs is kept, not a tuple."""


def ints(column: Sequence[_IntT]) -> Sequence[_IntT]:
    """The integers of a list; a tuple where one of them is None or has more than 64 bits."""
    if type(column) is not list:
        return column
    for kind in "iq":
        with suppress(struct.error):
            return cast("Sequence[_IntT]", array(kind, _packing(len(column), kind).pack(*column)))
    return tuple(column)


def floats(column: Sequence[float]) -> Sequence[float]:
    """The numbers of a list, all of them floats."""
    return array("d", _packing(len(column), "d").pack(*column)) if type(column) is list else column


@lru_cache(maxsize=64)
def _packing(count: int, kind: str) -> struct.Struct:
    """Makes an array's bytes in a third of the time that the array takes for each number of a list."""
    return struct.Struct(f"{count}{kind}")


def kept(
    snapshot: Snapshot, choice: Choice, views: Sequence[CacheSource]
) -> tuple[Snapshot, Choice, Sequence[CacheSource]]:
    """What was looked at, what was chosen, and the view that spoke for each row, over many rows."""
    if choice.scores is not None:
        choice = Choice(choice.order, floats(choice.scores), choice.candidates)
    if not isinstance(views, tuple):
        first = views[0]
        is_one = views.count(first) == len(views)
        views = one_view(first, len(views)) if is_one else tuple(views)
    return _kept(snapshot), choice, views


@lru_cache(maxsize=64)
def one_view(view: CacheSource, rows: int) -> tuple[CacheSource, ...]:
    """The same view for each row, kept once for all decisions."""
    return (view,) * rows


def _kept(seen: Snapshot) -> Snapshot:
    if type(seen.requests) is array and type(seen.matched_blocks) is array:
        others = seen.cached_tokens, seen.steps_s, seen.kv_used, seen.ahead_s, seen.sunk_ratios, seen.owed
        if list not in map(type, others):
            return seen
    return Snapshot(
        keys=seen.keys,
        requests=ints(seen.requests),
        prefill_tokens=ints(seen.prefill_tokens),
        context_tokens=ints(seen.context_tokens),
        matched_blocks=ints(seen.matched_blocks),
        num_blocks=seen.num_blocks,
        weights=seen.weights,
        prefilling=ints(seen.prefilling),
        cached_tokens=ints(seen.cached_tokens),
        steps_s=floats(seen.steps_s),
        kv_tokens=ints(seen.kv_tokens),
        prompt_tokens=seen.prompt_tokens,
        output_tokens=seen.output_tokens,
        learned=seen.learned,
        held_s=seen.held_s,
        ahead_s=floats(seen.ahead_s),
        max_num_seqs=ints(seen.max_num_seqs),
        kv_used=ints(seen.kv_used),
        under_way_s=floats(seen.under_way_s),
        sunk_ratios=floats(seen.sunk_ratios),
        owed=floats(seen.owed),
    )
