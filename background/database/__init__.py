"""The tables, the connections to them, and the differences between the two databases."""
