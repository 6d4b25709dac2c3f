"""The interpreter and the operating system: packages, logs, forks, signals and JSON."""
