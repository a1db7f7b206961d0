"""`python -m extproc.observing.metrics` prints the documentation page."""

import sys

from extproc.observing.metrics.table import document

sys.stdout.write(document())
