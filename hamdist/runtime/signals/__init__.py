"""A signal: its stamp, channel, wire format and codec; the log of what was sent."""
