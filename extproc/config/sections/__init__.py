"""The sections of tokenway.yaml, one module per subject."""
