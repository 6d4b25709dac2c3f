"""The interpreter and the operating system: packages, logging, forks, signals."""
