"""Memory for large messages."""

from __future__ import annotations

import mmap
from typing import Final

from extproc.transport.http2.messages import allocated

_HUGE_BYTES: Final = 4 * 1024 * 1024


def memory_for(num_bytes: int) -> memoryview:
    """Memory that nobody clears before it is written.

    From `_HUGE_BYTES` on numpy asks the kernel for pages of 2 MiB: to find and clear a single one took 5 ms.
    """
    if num_bytes < _HUGE_BYTES:
        return allocated(num_bytes)
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
