"""The recipe of muse-tiny: read, train, export, check. README.md says how."""
