"""`tokenway check FILE`: is this configuration usable, and what does it amount to."""

from __future__ import annotations

import sys
from pathlib import Path

from extproc.config.loading import effective, load_all
from extproc.errors import ConfigError
from extproc.observing.printable import printable
from extproc.server.bootstrap import template, withheld


def check(path: Path, *, print_effective: bool = False) -> int:
    """Check a tokenway.yaml with its clusters file, or a clusters.json alone.

    Args:
        path: The file; `.json` means a clusters.json.
        print_effective: Write the configuration with every default to standard output instead of
            the summary.

    Returns:
        Exit status: 0 if usable; 1 if not, with the problems on standard error, one per line.
    """
    try:
        config, clusters = load_all(path)
    except ConfigError as error:
        for problem in error.problems:
            print(printable(f"{error.path}: {problem}"), file=sys.stderr)
        return 1
    if print_effective:
        print(effective(config), end="")
        return 0
    withheld_headers = withheld(template(), config.rule_headers())
    if withheld_headers:
        print(
            f"{path}: warning: rules match {', '.join(withheld_headers)}: Envoy forwards this only if its "
            "bootstrap was rendered (tokenway bootstrap) since those rules were written",
            file=sys.stderr,
        )
    print(f"{path}: ok")
    print(f"  models:    {len(config.models)} ({', '.join(config.models) or 'none'})")
    print(f"  clusters:  {len(clusters)} ({', '.join(cluster.name for cluster in clusters) or 'none'})")
    print(f"  endpoints: {sum(len(cluster.endpoints) for cluster in clusters)}")
    return 0
