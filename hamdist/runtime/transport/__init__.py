"""Signals between processes: shared memory, ZeroMQ, GPU memory, encryption."""
