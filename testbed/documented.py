"""Commands of the documents that run in a pod: `kubectl … exec … -- tokenway …`.

python -m testbed.documented    prints them, one a line
    python -m testbed.documented PLACE ADMIN FOLDER

The second writes to FOLDER what the chart renders for a pod whose volumes are in PLACE, its admin port ADMIN.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Final

from testbed.helm import configuration, rendered
from testbed.processes import REPOSITORY, free_port

SOURCES: Final = (
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "charts" / "tokenway" / "templates" / "NOTES.txt",
)

_EXEC: Final = re.compile(r"^\s*kubectl .*\bexec .*? -- (tokenway [^|#\n]*)", re.MULTILINE)


def exec_commands() -> list[list[str]]:
    """Their words, each command once; what they are piped into is left out."""
    found = {line.strip() for path in SOURCES for line in _EXEC.findall(path.read_text(encoding="utf-8"))}
    return [shlex.split(line) for line in sorted(found)]


def write_configuration(place: Path, admin_port: int, folder: Path) -> None:
    """The files of the chart's ConfigMap for provider `none`, with paths and ports as they are here."""
    values = {
        "clusters": [{"name": "llama", "endpoints": [{"address": "127.0.0.1", "port": 8001}]}],
        "config": {
            "server": {"run_dir": f"{place}/run/sockets", "drain_s": 1, "admin": {"port": admin_port}},
            "endpoint_picker": {
                name: [f"127.0.0.1:{free_port()}"] for name in ("listen", "health_listen", "metrics_listen")
            },
        },
    }
    configuration(rendered(None, values), folder)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        write_configuration(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
        sys.exit()
    for words in exec_commands():
        print(shlex.join(words))
