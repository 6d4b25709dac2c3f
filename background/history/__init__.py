"""Reads the rows for people: executions, instances, messages, and why a tick did not run."""
