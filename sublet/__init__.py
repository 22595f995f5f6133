"""Sublet: an AI cloud out of the accelerator capacity you are not using."""

__version__ = "0.1.0"
