"""Where the outside gets in."""
