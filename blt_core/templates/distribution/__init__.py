"""Files that every new distribution has; ``$name`` stands for what differs."""
