"""Templates: one module each, with a `Config` and `task(config)`; what takes more than training has `run(config)`."""
