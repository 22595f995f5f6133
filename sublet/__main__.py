"""`python -m sublet` is the command `sublet`."""

from sublet.cli.main import run

if __name__ == "__main__":
    run()
