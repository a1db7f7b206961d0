"""The Gateway API's endpoint-picker protocol: whole requests and whole answers pass through us."""
