"""Bodies that are not read where they come: large ones and compressed ones."""
