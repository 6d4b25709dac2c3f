"""The threads of one process: its timers, its heartbeat, its consumers, its start and its stop."""
