"""What consumers get."""
