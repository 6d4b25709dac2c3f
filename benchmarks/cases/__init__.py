"""The cases, one module each. Each has `run`, which measures on one engine and yields its figures."""
