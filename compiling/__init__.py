"""Compiles the modules of the request path to machine code: docs/adr/0041-compiled-modules.md."""
