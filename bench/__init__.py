"""What is measured, each with its peer beside it in the same interleaved run."""
