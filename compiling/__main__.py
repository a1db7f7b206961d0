"""Says what this machine lacks to make a compiled wheel: `python -m compiling`; 1 if anything."""

from __future__ import annotations

import sys

from compiling.needs import missing

sys.exit(missing())
