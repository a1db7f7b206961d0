"""What comes from engines beside answers: health, cached blocks, what they say of themselves."""
