"""What waits: messages, their queue, and the dead letters."""
