"""This process: threads, memory, switches of torch, interrupts, temporary folders."""
