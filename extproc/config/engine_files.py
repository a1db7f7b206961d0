"""The files of `engine_tls`: what they have, and whether a configuration that names them can be used.

Rules:
    1. A file that is here and is not what it should be refuses the configuration: Envoy would refuse it too,
       or every probe would fail. So does one that could be read before and cannot now.
    2. A file that never was here may be Envoy's alone: the configuration is used, and the log says that
       probes fail (`server.engine_tls`).
    3. What a private key has is compared with its certificate and else kept nowhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from extproc.config.certificates import FileProblem, find_problems
from extproc.config.document import Location
from extproc.config.reload import Look, look
from extproc.config.schema import Config
from extproc.config.sections.engines import EngineTls

_Sight = tuple[EngineTls, tuple[Look, ...]]

FILE_KEYS = ("ca_file", "cert_file", "key_file")


def problems_of(tls: EngineTls) -> list[FileProblem]:
    """What is wrong with the files of one cluster, as they are now."""
    return find_problems([("ca_file", tls.ca_file)], tls.cert_file, tls.key_file)


class EngineFiles:
    """What the files were when they were read last.

    Args:
        look: What a path leads to, by the look before.

    Attributes:
        looks: What the paths led to that the last configuration read here names.
    """

    def __init__(self, look: Callable[[Path, Look | None], Look] = look) -> None:
        self._look = look
        self._readable: frozenset[str] = frozenset()
        self._judged: dict[_Sight, list[FileProblem]] = {}
        self.looks: Mapping[Path, Look] = {}

    def read(self, config: Config) -> list[tuple[Location, str]]:
        """Look at the files that a configuration names, and read those that are others than before.

        Returns:
            Why it cannot be used, by settings; empty if it can.
        """
        looks: dict[Path, Look] = {}
        judged: dict[_Sight, list[FileProblem]] = {}
        found: list[tuple[Location, str]] = []
        readable: set[str] = set()
        for cluster, tls in config.engine_tls.items():
            for path in _paths(tls):
                if path not in looks:
                    looks[path] = self._look(path, self.looks.get(path))
            sight = tls, tuple(looks[path] for path in _paths(tls))
            judged[sight] = self._judged[sight] if sight in self._judged else problems_of(tls)
            readable |= {str(path) for path in _paths(tls) if looks[path].problem is None}
            for problem in judged[sight]:
                was_there = str(Path(getattr(tls, problem.key))) in self._readable
                if was_there or not problem.is_unreadable:
                    found.append((("engine_tls", cluster, problem.key), problem.text))
        named = {str(path) for path in looks}
        self._readable = frozenset(readable | self._readable & named)
        self.looks, self._judged = looks, judged
        return found

    def filled(self, config: Config) -> Config:
        """A configuration that was read, with what its files had."""
        if not config.engine_tls:
            return config
        tls = {name: one.with_contents(self._contents(one)) for name, one in config.engine_tls.items()}
        return config.model_copy(update={"engine_tls": tls})

    def _contents(self, tls: EngineTls) -> str:
        """Of CA and certificate; keys have no digest that leaves this process."""
        seen = [self.looks[Path(file)] for file in (tls.ca_file, tls.cert_file) if file is not None]
        if any(look.problem is not None for look in seen):
            return ""
        return hashlib.blake2b(b"".join(look.digest for look in seen), digest_size=8).hexdigest()


def _paths(tls: EngineTls) -> list[Path]:
    return [Path(file) for key in FILE_KEYS if (file := getattr(tls, key)) is not None]
