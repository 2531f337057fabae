"""The contenders of tools/bench/recipes.py: for each recipe the kit, and what people use instead of it."""
