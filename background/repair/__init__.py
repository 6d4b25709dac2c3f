"""Rows that contradict each other, and how they are mended."""
