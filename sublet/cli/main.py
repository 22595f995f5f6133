"""The command's parts put together, and its way out."""

from __future__ import annotations

import sys

import typer

from sublet.cli import account, cloud, models, money, owner, recalls, rent, tokens, top, workloads
from sublet.cli.commands import epilog
from sublet.cli.errors import INTERRUPTED, report

app = typer.Typer(
    name="sublet",
    help="An AI cloud out of the accelerator capacity you are not using.",
    epilog="SUBLET_URL and SUBLET_KEY name the cloud and the key. "
    + epilog(
        "sublet up --tour",
        "sublet rent cpu-spot --name box --yes --wait",
        "sublet ssh box -- nproc",
        "sublet status",
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for part in (cloud, rent, workloads, models, tokens, money, account, recalls, owner, top):
    part.add_to(app)


def run() -> None:
    """The entry point: whatever happens is an exit code and at most a sentence."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has seen enough. Nothing may be flushed into it at exit.
        sys.stdout = None
        sys.exit(0)
    except Exception as error:
        sys.exit(report(error))
