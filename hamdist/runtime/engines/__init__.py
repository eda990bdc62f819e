"""The in-process engine, and one worker process of an engine of many."""
