"""What every process needs: console, interrupts, child processes and messages between them."""
