"""The peers: other queues at the same work, with their documented settings and one row as the effect of a message."""
