"""Who may have capacity: the owner and the market."""
