"""What makes a compiled wheel beside Python's packages: a C compiler and the headers of Python."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from pathlib import Path


def missing() -> str | None:
    """What this machine lacks, and what can be done about it; None if nothing."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        lacking = f"there is no C compiler here ({compiler})"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking = "the headers of this Python are not here (python3-dev)"
    else:
        return None
    return (
        f"{lacking}, so the request path cannot be compiled. Of an image, BUILDER has to have one, as"
        " python:3.13-trixie does, or --build-arg COMPILE= makes it pure Python. A wheel is pure Python"
        " without TOKENWAY_COMPILE."
    )
