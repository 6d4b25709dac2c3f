"""Tallies: the counts of runs and messages per five minutes and per hour, which the charts show."""
