"""Commands `hamdist study ...`."""
