"""When a tick is: periods, cron expressions, and how they are written as text."""
