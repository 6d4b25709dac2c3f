"""Background workers that run once per tick, however many processes, machines and releases run them."""
