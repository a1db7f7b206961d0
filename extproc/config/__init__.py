"""tokenway.yaml: schema, parser, reload."""
