"""Who holds what, when: the book (allocation), the things themselves (fleet), the metal (engines)."""
