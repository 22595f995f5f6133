"""What it came to: bills, and the owner's books."""
