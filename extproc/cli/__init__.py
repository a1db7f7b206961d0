"""The former room of the `tokenway` command, which is `tokenway.cli` now."""
