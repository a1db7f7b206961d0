"""Blocks that engines say they no longer have."""

from __future__ import annotations

from typing import Final

from msgspec import structs

from metadata_center.cache_map.holders import Replica
from metadata_center.cache_map.runs import FOLD
from metadata_center.cache_map.tree import Tree
from metadata_center.cache_map.values import Counts
from metadata_center.kv_events.events import ANYWHERE, GPU, BlockRemoved

_SLOWER: Final = "CPU"
"""Any value of `medium` that is not in `GPU`."""


def remove(tree: Tree, counts: Counts, replica: Replica, event: BlockRemoved) -> None:
    """Take one copy of each named block from `replica`; if it is not said from which memory, from each."""
    if event.medium == ANYWHERE:
        remove(tree, counts, replica, structs.replace(event, medium=_SLOWER))
        event = structs.replace(event, medium=None)
    if replica.has_group and event.group is not None and event.group != replica.group:
        counts.ignored += len(event.hashes)
        return
    holder = replica.gpu if event.medium in GPU else replica.gpu + 1
    copies, bit = replica.copies[holder & 1], 1 << holder
    names, runs = replica.space.names, tree.runs
    for wire in event.hashes:
        name = wire & FOLD
        run_id = names.get(name)
        run = None if run_id is None else runs[run_id]
        if run is None:
            counts.unmatched += 1
            continue
        if run.full == bit and run.wires[-1] == wire:  # the end of a chain no other holds: the usual
            position = len(run.wires) - 1
            held = (1 << position + 1) - 1
        else:
            held = run.held(holder)
            position = run.position(wire, held.bit_length() - 1) if held else -1
            if position < 0 or not held >> position & 1:
                counts.unmatched += 1
                continue
        counts.removed += 1
        if copies and name in copies:
            copies[name] -= 1
            if not copies[name]:
                del copies[name]
            continue
        replica.blocks -= 1
        last = len(run.wires) - 1
        if (
            position == last > 0
            and run.full == bit
            and run.child is None
            and run.partial is None
            and run.aliases is None
            and run.doubts is None
        ):
            del names[name]
            run.wires.pop()
            run.ends.pop()
            run.digests.pop()
            run.digest = 0
            tree.stored -= 1
        else:
            run.set_held(bit, held, held ^ 1 << position)
            if position == last:
                tree.trim(run)
