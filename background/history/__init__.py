"""For people to read: executions, instances, messages, and why a tick did not run."""
