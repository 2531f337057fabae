"""Recipes: each module has a `Config` and `task(config)`, and a `run(config)` if it does more than train."""
