"""Templates: one module each, with a `Config` and `task(config)`."""
