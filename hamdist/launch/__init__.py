"""Runs as jobs of a Ray cluster: package, job, driver, events, the doctor."""
