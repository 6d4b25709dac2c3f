"""The search for messages by a filter, and their errors in groups."""
