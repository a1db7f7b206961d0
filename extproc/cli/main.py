"""`python -m extproc.cli.main` starts the command under its former name, for unit files that have it."""

from __future__ import annotations

from tokenway.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
