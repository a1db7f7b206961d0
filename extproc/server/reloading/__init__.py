"""How a configuration is read, comes into force, and changes what runs."""
