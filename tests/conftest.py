"""Options and marks of the whole suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sublet.base.store import database

sys.path.insert(0, str(Path(__file__).parent))
"""For `templates`, which several folders use."""

# No test cuts the power, and waiting for the disk is most of what a commit takes. What a test
# kills are processes of their own, which keep the setting.
database.SYNCHRONOUS = "off"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long tests as well (make soak)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("soak") and not config.getoption("--soak"):
            item.add_marker(pytest.mark.skip(reason="takes long: make soak"))
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root: run make test as root for it"))
