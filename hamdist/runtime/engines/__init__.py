"""The in-process engine, and one worker process of a distributed engine."""
