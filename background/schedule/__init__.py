"""The schedules, which say when a tick is due: periods and cron expressions, and both as text."""
