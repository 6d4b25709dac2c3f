"""Repairs of rows that contradict each other, or lie in the clock's future."""
