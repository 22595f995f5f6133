"""What happened and who it concerns: people and keys, money that moved, use that was seen."""
