"""`python -m tools.muse_tiny train | export | check`: README.md says with what."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

NEEDS = {
    "train": ("torch", "tokenizers"),
    "export": ("torch", "gguf", "numpy"),
    "check": ("gguf", "xllamacpp"),
}
COMPARE_NEEDS = ("torch", "tokenizers")
STEPS = 3000


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those that cannot be imported here: a package may be there and not fit the machine."""
    found = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            found.append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.muse_tiny")
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("train", "export"):
        steps.add_parser(name).add_argument("--folder", type=Path, required=True)
    steps.choices["train"].add_argument("--steps", type=int, default=STEPS)
    steps.choices["train"].add_argument("--seed", type=int, default=0)
    check = steps.add_parser("check")
    check.add_argument("file", type=Path)
    check.add_argument("--folder", type=Path)
    given = parser.parse_args()
    needs = NEEDS[given.step]
    if given.step == "check" and given.folder is not None:
        needs += COMPARE_NEEDS
    if absent := missing(needs):
        sys.stderr.write(
            f"muse-tiny: {given.step} needs {', '.join(absent)}, which Sublet does not install: "
            f"pip install {' '.join(absent)} in an environment of its own (tools/muse_tiny/README.md)\n"
        )
        return 2
    module = importlib.import_module(f"tools.muse_tiny.{given.step}")
    if given.step == "train":
        module.run(given.folder, given.steps, given.seed)
    elif given.step == "export":
        print(module.run(given.folder))
    else:
        module.run(given.file, given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
