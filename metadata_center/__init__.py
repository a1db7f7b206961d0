"""Load and cache state of the engines: the written contract, its pure core, its stores."""
