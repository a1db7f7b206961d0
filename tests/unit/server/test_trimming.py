"""When memory is given back to the system."""

from __future__ import annotations

from extproc.server.process.trimming import Trimmer, resident_bytes

MIB = 1024 * 1024


class Memory:
    """A process's, by the second; a trim leaves 100 MiB."""

    def __init__(self) -> None:
        self.mib = 100
        self.trims = 0

    def resident(self) -> int:
        """In bytes."""
        return self.mib * MIB

    def give_back(self) -> None:
        """All above 100 MiB was free."""
        self.trims += 1
        self.mib = 100

    def trims_while(self, trimmer: Trimmer, mib: list[int], start_s: float) -> int:
        """How often memory is given back while it is so large, second by second."""
        before = self.trims
        for second, self.mib in enumerate(mib):
            trimmer.tick(start_s + second)
        return self.trims - before


def test_memory_that_grew_is_given_back_once_it_grows_no_more() -> None:
    """Neither while it grows, nor where it did not, nor again at once."""
    memory = Memory()
    trimmer = Trimmer(memory.resident, memory.give_back)
    assert memory.trims_while(trimmer, [100] * 20, 0.0) == 0
    assert memory.trims_while(trimmer, [105, 110, 115, 120], 20.0) == 0
    assert memory.trims_while(trimmer, [120], 24.0) == 1
    assert memory.trims_while(trimmer, [101, 102, 103, 103], 25.0) == 0, "little"
    assert memory.trims_while(trimmer, [115, 115, 115], 29.0) == 0, "too soon"
    assert memory.trims_while(trimmer, [115, 115], 34.0) == 1


def test_where_the_system_does_not_say_nothing_is_done() -> None:
    """And here it says something."""
    memory = Memory()
    trimmer = Trimmer(lambda: 0, memory.give_back)
    assert memory.trims_while(trimmer, [100] * 30, 0.0) == 0
    assert resident_bytes() > MIB
