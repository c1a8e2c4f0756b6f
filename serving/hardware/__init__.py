"""What is in this machine: processors and energy meters."""
