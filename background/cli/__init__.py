"""The commands `flask workers` and `flask messages`."""
