"""Who runs a tick: claims, leases, locks, and what an operator sets."""
