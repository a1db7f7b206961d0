"""Which configuration is in force, and which addresses its host names have: a state machine.

Rules:
    1. Pure. Events come in (`read`, `answered`, `failed`, `advance`), effects to carry out go out, in order.
    2. Every reading of the files has a number, its generation. A good one replaces every older one, in force
       or waiting; a refused one changes only what is reported. So the last good reading ends up in force, in
       whatever order look-ups end.
    3. A version waits for the first word on names that are new, `wait_s` at most. Then it is introduced with
       the addresses that are known. Answers change addresses, never versions.
    4. A failure is that of one name: it keeps its last addresses, or has no endpoint until it has an address.
       It is logged once when it begins and once when it ends.
    5. A name is asked again `interval_s` after its last answer, and when a reading names it that has no
       address. It is asked once at a time; an answer to any but its last question is void.
    6. New addresses of a version in force are gathered for `GATHER_S`: a thousand names that answer one by
       one are not a thousand configurations.
    7. Make before break: a version that is introduced is in force when Envoy has its clusters (`introduced`),
       or after `introduce_s`, whatever else was introduced in that time; the first one ever, at once. The one
       before stays in force until then, and altogether if Envoy refuses the new clusters (`spurned`).
    8. Bound: the names of three versions: in force, introduced, and waiting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from extproc.config.clusters import ClusterSpec
from extproc.config.schema import Config
from extproc.discovery.resolution import Literals, Resolution, host_names, resolved

GATHER_S = 0.1
"""Of 5 s between two look-ups of a name and 2 s that a change may take."""


@dataclass(frozen=True, slots=True)
class Version:
    """What a good reading of the files says.

    Attributes:
        config: With its models filled in.
        clusters: As written.
        files: Names of the files it came from, without their directories.
        literals: Those of the clusters that have no host names.
    """

    config: Config
    clusters: tuple[ClusterSpec, ...]
    files: tuple[str, ...]
    literals: Literals = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """Files that cannot be used. As an effect: say so.

    Attributes:
        path: The file that is wrong.
        problems: What is wrong with it, a line each.
        file: Its name without directory.
        files: Names of all files that would be needed.
    """

    path: str
    problems: tuple[str, ...]
    file: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """Make this the configuration in force.

    Attributes:
        generation: Of the reading it came from.
        version: The configuration.
        resolution: Its endpoints.
        is_new: The version was not in force before; else only addresses changed.
    """

    generation: int
    version: Version
    resolution: Resolution
    is_new: bool


@dataclass(frozen=True, slots=True)
class Introduce:
    """Have Envoy take what this brings beside what is in force, then say `introduced` or `spurned`.

    Attributes:
        generation: Of the reading it came from.
        version: The configuration.
        resolution: Its endpoints.
    """

    generation: int
    version: Version
    resolution: Resolution


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask for the addresses of `name`, and say `answered` or `failed` with this `number` once."""

    name: str
    number: int


@dataclass(frozen=True, slots=True)
class NameFailed:
    """A name has no address for now; `kept` are those it had, which stay."""

    name: str
    cause: str
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NameAnswers:
    """A name that failed has addresses again."""

    name: str
    addresses: tuple[str, ...]


Effect = Introduce | Apply | Refused | LookUp | NameFailed | NameAnswers


@dataclass(slots=True)
class _Name:
    """What is known of a host name.

    Attributes:
        addresses: Its last ones, sorted, so that equal answers compare equal.
        cause: Why its last look-up failed; None if it did not, or is the first.
        asked: Number of the question that is open, or None.
        asked_s: When it was asked.
        due_s: When it is asked next, if no question is open.
    """

    addresses: tuple[str, ...] = ()
    cause: str | None = None
    asked: int | None = None
    asked_s: float = 0.0
    due_s: float = 0.0

    @property
    def is_judged(self) -> bool:
        return bool(self.addresses) or self.cause is not None


@dataclass(frozen=True, slots=True)
class _Held:
    """A version in force, or one that waits until `until_s`: for words on `names`, or Envoy's."""

    generation: int
    version: Version
    names: tuple[str, ...]
    until_s: float


class Following:
    """The machine; owned by one event loop.

    Args:
        interval_s: Between an answer about a name and the next question.
        wait_s: Longest that a version waits for names that were not asked for before.
        introduce_s: Longest that it then waits for Envoy.

    Attributes:
        generation: Number of readings so far.
        resolution: The endpoints in force.
    """

    def __init__(self, *, interval_s: float, wait_s: float, introduce_s: float) -> None:
        self._interval_s = interval_s
        self._wait_s = wait_s
        self._introduce_s = introduce_s
        self._names: dict[str, _Name] = {}
        self._questions = 0
        self._latest: Version | Refused | None = None
        self._waiting: _Held | None = None
        self._coming: _Held | None = None
        self._in_force: _Held | None = None
        self._changed_s: float | None = None  # when addresses in force first differed from what was applied
        self.generation = 0
        self.resolution = Resolution({})

    @property
    def in_force(self) -> Version | None:
        """The version in force; None until the first is."""
        return None if self._in_force is None else self._in_force.version

    def files(self) -> dict[str, bool]:
        """Each file that the last reading needed: is it good?"""
        latest = self._latest
        if latest is None:
            return {}
        refused = latest.file if isinstance(latest, Refused) else None
        return {file: file != refused for file in latest.files}

    def names(self) -> dict[str, bool]:
        """Each host name in use: did its last look-up give an address?"""
        return {name: bool(known.addresses) and known.cause is None for name, known in self._names.items()}

    def next_s(self) -> float | None:
        """When `advance` has something to do, or None: nothing will happen by itself."""
        times = [one.until_s for one in (self._waiting, self._coming) if one is not None]
        if self._changed_s is not None:
            times.append(self._changed_s + GATHER_S)
        for name in self._names.values():
            if name.asked is None:
                times.append(name.due_s)
            elif not name.is_judged:
                times.append(name.asked_s + self._wait_s)
        return min(times, default=None)

    def read(self, reading: Version | Refused, now_s: float) -> list[Effect]:
        """The files were read."""
        self.generation += 1
        self._latest = reading
        if isinstance(reading, Refused):
            return [reading]
        names = tuple(host_names(reading.clusters))
        self._waiting = _Held(self.generation, reading, names, now_s + self._wait_s)
        for name in names:
            self._names.setdefault(name, _Name(due_s=now_s))
        self._forget()
        missing = [name for name in names if not self._names[name].addresses or self._names[name].cause]
        return [*self._ask(missing, now_s), *self._release(now_s)]

    def ask_again(self, now_s: float) -> list[Effect]:
        """All names are to be looked up now."""
        return list(self._ask(self._names, now_s))

    def answered(self, name: str, number: int, addresses: Iterable[str], now_s: float) -> list[Effect]:
        """A look-up gave addresses; none at all is a failure."""
        found = tuple(sorted(set(addresses)))
        if not found:
            return self.failed(name, number, "no address", now_s)
        known = self._closed(name, number, now_s)
        if known is None:
            return []
        effects: list[Effect] = [] if known.cause is None else [NameAnswers(name, found)]
        if found != known.addresses and self._changed_s is None:
            self._changed_s = now_s
        known.addresses, known.cause = found, None
        return [*effects, *self._release(now_s)]

    def failed(self, name: str, number: int, cause: str, now_s: float) -> list[Effect]:
        """A look-up failed."""
        known = self._closed(name, number, now_s)
        if known is None:
            return []
        return [*self._fail(name, known, cause), *self._release(now_s)]

    def introduced(self, generation: int) -> list[Effect]:
        """Envoy has what this reading brings."""
        held = self._coming
        return [] if held is None or held.generation != generation else [self._enforced(held)]

    def spurned(self, generation: int, problems: Iterable[str]) -> list[Effect]:
        """Envoy refuses what this reading brings, for these reasons."""
        held = self._coming
        if held is None or held.generation != generation:
            return []
        self._coming = None
        self._forget()
        files = held.version.files
        refused = Refused(files[0], tuple(problems), files[0], files)
        if self._latest is held.version:
            self._latest = refused
        return [refused]

    def advance(self, now_s: float) -> list[Effect]:
        """Time has passed."""
        effects: list[Effect] = []
        if self._coming is not None and now_s >= self._coming.until_s:
            effects.append(self._enforced(self._coming))
        for name, known in self._names.items():
            if known.asked is not None and not known.is_judged and now_s >= known.asked_s + self._wait_s:
                effects += self._fail(name, known, f"no answer within {self._wait_s:g} s")
        effects += self._release(now_s)
        if self._changed_s is not None and now_s >= self._changed_s + GATHER_S:
            effects += self._update()
        due = [name for name, known in self._names.items() if known.asked is None and now_s >= known.due_s]
        return [*effects, *self._ask(due, now_s)]

    def _ask(self, names: Iterable[str], now_s: float) -> list[LookUp]:
        asked = []
        for name in names:
            known = self._names[name]
            if known.asked is None:
                self._questions += 1
                known.asked, known.asked_s = self._questions, now_s
                asked.append(LookUp(name, self._questions))
        return asked

    def _closed(self, name: str, number: int, now_s: float) -> _Name | None:
        """The name whose open question has this number, closed; None if there is none such."""
        known = self._names.get(name)
        if known is None or known.asked != number:
            return None
        known.asked, known.due_s = None, now_s + self._interval_s
        return known

    @staticmethod
    def _fail(name: str, known: _Name, cause: str) -> list[Effect]:
        is_news = known.cause is None
        known.cause = cause
        return [NameFailed(name, cause, known.addresses)] if is_news else []

    def _release(self, now_s: float) -> list[Effect]:
        """Introduce the waiting version if it need wait for names no more."""
        held = self._waiting
        if held is None:
            return []
        if now_s < held.until_s and not all(self._names[name].is_judged for name in held.names):
            return []
        self._waiting = None
        if self._in_force is None:
            return [self._enforced(held)]
        began_s = now_s if self._coming is None else self._coming.until_s - self._introduce_s
        self._coming = replace(held, until_s=began_s + self._introduce_s)
        self._forget()
        return [Introduce(held.generation, held.version, self._resolved(held))]

    def _enforced(self, held: _Held) -> Apply:
        """This version is in force."""
        self._coming, self._in_force, self._changed_s = None, held, None
        self._forget()
        self.resolution = self._resolved(held)
        return Apply(held.generation, held.version, self.resolution, is_new=True)

    def _update(self) -> list[Effect]:
        """New addresses of the version in force, if there are any."""
        self._changed_s = None
        held = self._in_force
        if held is None or (resolution := self._resolved(held)) == self.resolution:
            return []  # nothing is in force yet, or only a waiting version's names have changed
        self.resolution = resolution
        return [Apply(held.generation, held.version, resolution, is_new=False)]

    def _resolved(self, held: _Held) -> Resolution:
        addresses = {name: self._names[name].addresses for name in held.names}
        return resolved(held.version.clusters, addresses, held.version.literals)

    def _forget(self) -> None:
        """Drop names of versions that are gone; open questions about them are void."""
        held = [one for one in (self._in_force, self._coming, self._waiting) if one is not None]
        for name in self._names.keys() - {name for one in held for name in one.names}:
            del self._names[name]
