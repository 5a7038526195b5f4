"""What a process needs, whatever it does: child processes and the messages between them."""
