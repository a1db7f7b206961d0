"""Routing policies compared by replay: a declared list of command lines, executed, and what comes of them."""
