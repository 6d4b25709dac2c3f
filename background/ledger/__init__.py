"""Decides which instance runs a tick: claims, leases and locks, and the schedules and pauses in force."""
