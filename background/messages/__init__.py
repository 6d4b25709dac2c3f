"""Messages: their payloads, the queue that delivers each one, and the dead letters."""
