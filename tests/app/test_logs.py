"""The log: lines of one form whoever writes them, and a bound on what is kept."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from sublet.app.wiring import LOG_BYTES, LOGS_KEPT, rotate_log

SAYS = """
import logging, sys
from pathlib import Path
import structlog
from sublet.app.wiring import log_to

log_to(Path(sys.argv[1]), "info", "api-0")
structlog.get_logger().info("ours", node_id="nod_1")
logging.getLogger("uvicorn.error").warning("Invalid %s received.", "HTTP request")
logging.getLogger("uvicorn.error").info("not worth a line")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("other").exception("it failed")
"""


def test_what_libraries_say_is_a_line_like_ours(tmp_path: Path) -> None:
    log = tmp_path / "sublet.log"
    subprocess.run([sys.executable, "-c", SAYS, str(log)], check=True, timeout=60)
    ours, theirs, failed = [json.loads(line) for line in log.read_text().splitlines()]
    assert (ours["event"], ours["process"]) == ("ours", "api-0")
    assert theirs["event"] == "library_said"
    assert theirs["library"] == "uvicorn.error"
    assert theirs["said"] == "Invalid HTTP request received."
    assert theirs["level"] == "warning"
    assert theirs["process"] == "api-0"
    assert "ZeroDivisionError" in failed["exception"]


def first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


def test_a_large_log_is_set_aside_and_five_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "sublet.log"
    rotate_log(log)
    log.write_text("small\n")
    rotate_log(log)
    assert [path.name for path in tmp_path.iterdir()] == ["sublet.log"]
    for number in range(LOGS_KEPT + 2):
        with log.open("wb") as file:
            file.write(b"%d\n" % number)
            file.truncate(LOG_BYTES)  # Sparse: it takes no room.
        rotate_log(log)
        assert not log.exists()
    kept = {path.name: first_line(path) for path in tmp_path.iterdir()}
    newest = LOGS_KEPT + 1
    assert kept == {f"sublet.log.{n}": b"%d\n" % (newest + 1 - n) for n in range(1, LOGS_KEPT + 1)}


def test_a_process_takes_all_the_descriptors_it_may_have() -> None:
    says = (
        "import resource; from sublet.app.child import _raise_descriptor_limit as up; "
        "print(up(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )

    def low() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 512))

    ran = subprocess.run(
        [sys.executable, "-c", says], preexec_fn=low, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.split() == ["512", "512", "512"]
