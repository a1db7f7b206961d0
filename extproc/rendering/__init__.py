"""A request as the text that the engine tokenizes, and that text's token boundaries."""
