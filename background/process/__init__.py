"""One process's threads: its timers, its heartbeat, its consumers, its start and its stop."""
