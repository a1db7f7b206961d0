"""Which prompt blocks an endpoint holds, by what was routed there and what runs there now."""
