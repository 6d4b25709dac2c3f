"""Alarms: incidents of the fleet, their alerts by mail and webhook, and pings to a dead-man's switch."""
