"""Console output, interrupts, process ranks, child processes and the messages between processes."""
