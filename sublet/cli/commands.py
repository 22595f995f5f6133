"""How a command is declared: its place in the help, its examples, the options all share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sublet.cli import profile
from sublet.cli.errors import CliError, UsageError
from sublet.cli.screen import progress

if TYPE_CHECKING:
    from sublet.base.wire import rest
    from sublet.sdk import Client
    from sublet.sdk.workloads import Workloads

F = TypeVar("F", bound=Callable[..., Any])

CLOUD = "The cloud on this machine"
RENT = "Rent"
WORK = "Your workloads"
MODELS = "Models"
MONEY = "Money"
PEOPLE = "People and keys"
OWNER = "For the owner"

Json = Annotated[bool, typer.Option("--json", help="Print the API's own JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Agree without being asked.")]
Named = Annotated[str, typer.Argument(metavar="NAME", help="Id or name of an instance or job.")]
Organisation = Annotated[
    str | None, typer.Option("--organisation", help="Another organisation's; for the owner.")
]
PoolWord = Annotated[str | None, typer.Option("--pool", help="Its id or name; default: the one.")]
Start = Annotated[
    str | None, typer.Option("--from", help="A time, or 1d ago; default: this month, UTC.")
]
End = Annotated[str | None, typer.Option("--to", help="A time, or 1h ago; default: now.")]


def group(help_text: str, *examples: str) -> typer.Typer:
    """A command with commands below it, and examples of their use."""
    return typer.Typer(
        help=help_text,
        epilog=epilog(*examples),
        no_args_is_help=True,
        rich_markup_mode="rich",
        add_completion=False,
    )


def epilog(*examples: str) -> str:
    """What `--help` ends with."""
    assert examples, "a command shows how it is used"
    lines = [f"  [dim]$[/dim] {example.replace('[', chr(92) + '[')}" for example in examples]
    return "\n\n".join(["Examples:", *lines])


def command(
    app: typer.Typer, *examples: str, panel: str | None = None, name: str | None = None
) -> Callable[[F], F]:
    """Declare a command with at least one example of its use."""
    return app.command(name=name, epilog=epilog(*examples), rich_help_panel=panel)


@contextmanager
def client(*, quiet: bool = False, needs_key: bool = True) -> Iterator[Client]:
    """The cloud that environment or profile name; a line appears when it takes over a second."""
    from sublet.sdk import Client

    chosen = profile.load()
    if chosen.key is None and needs_key:
        raise CliError(
            "no key is named: set SUBLET_KEY to yours, or sign up with `sublet signup --save`."
        )
    with Client(chosen.url, chosen.key) as found:
        if quiet:
            yield found
        else:
            with progress(f"waiting for {chosen.url}"):
                yield found


def kind_of(cloud: Client, workload_id: str) -> Workloads:
    return cloud.jobs if workload_id.startswith("job_") else cloud.instances


def find_workload(cloud: Client, word: str) -> rest.Workload:
    """By id, or by name: among those that live first. Raises where a name stands for several."""
    if word.startswith(("ins_", "job_")):
        return kind_of(cloud, word).get(word)
    named = [w for kind in (cloud.instances, cloud.jobs) for w in kind.list() if w.name == word]
    living = [w for w in named if w.state not in ("terminated", "completed", "failed")]
    chosen = living or named[-1:]
    if not chosen:
        raise CliError(f"there is no instance or job called {word!r}: `sublet ls --all` shows all.")
    if len(chosen) > 1:
        ids = ", ".join(w.id for w in chosen)
        raise UsageError(f"{word!r} is the name of several: say which by its id ({ids}).")
    return chosen[0]


def only_pool(cloud: Client, word: str | None) -> rest.Pool:
    """The pool named by id or name; without a word the only one."""
    pools: Sequence[rest.Pool] = list(cloud.pools.list())
    chosen = [p for p in pools if word is None or word in (p.id, p.name)]
    if len(chosen) != 1:
        names = ", ".join(f"{p.name} ({p.id})" for p in pools) or "none"
        raise UsageError(f"say which pool with --pool: {names}.")
    return chosen[0]


def only_node(cloud: Client, word: str | None) -> rest.Node:
    nodes: Sequence[rest.Node] = list(cloud.nodes.list())
    chosen = [n for n in nodes if word is None or word in (n.id, n.name)]
    if len(chosen) != 1:
        names = ", ".join(f"{n.name} ({n.id})" for n in nodes) or "none"
        raise UsageError(f"say which node: {names}.")
    return chosen[0]
