"""The parts that all cases share: databases, turns, figures, checks."""
