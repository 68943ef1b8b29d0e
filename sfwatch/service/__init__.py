"""What the service says, read and judged."""
