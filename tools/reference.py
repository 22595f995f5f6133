"""Writes docs/reference/ from the source: settings, commands, errors, events, the API.

Run by `make docs`; tests/docs asserts that the pages equal what is generated now.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic_core import PydanticUndefined

import sublet
from sublet.app.settings import Settings
from sublet.base.kernel.clock import SystemClock
from sublet.base.kernel.errors import SubletError
from sublet.base.kernel.ids import SystemIds
from sublet.base.store import Event, open_store
from sublet.capacity.engines.simulated import SimulatedEngine
from sublet.cli.main import app as cli
from sublet.edge.api import Deps, create_api
from sublet.edge.api.routes import ROUTERS
from sublet.gateway.errors import KINDS
from sublet.records.tenancy import Action
from sublet.records.tenancy.policy import OWNERS_ACTS, ROLES

PAGES = Path(__file__).resolve().parents[1] / "docs" / "reference"
MADE = "Made from the source by `make docs`: do not edit.\n"


def pages() -> dict[str, str]:
    """Every page by its file name, as it should be now."""
    return {
        "settings.md": settings_page(),
        "commands.md": commands_page(),
        "errors.md": errors_page(),
        "gateway-errors.md": gateway_errors_page(),
        "events.md": events_page(),
        "api.md": api_page(),
    }


def main() -> int:
    PAGES.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text)
        print(f"docs/reference/{name}")
    return 0


# Settings.


def settings_page() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, PydanticUndefined) else f"`{_plain(field.default)}`"
        rows.append((f"`{name}`", f"`SUBLET_{name.upper()}`", default, field.description or ""))
    return "\n".join(
        [
            "# Settings",
            MADE,
            "A setting comes from the command line of `sublet up`, else from its variable in the "
            "environment, else from `sublet.toml` in the folder where `sublet up` is started, else "
            "from its default. It is read once, at the start. Instead of `--x-y` on the command line, "
            "the file says `x_y = …`.",
            "",
            *_table(("setting", "variable", "default", "meaning"), rows),
            "",
            "Two more variables name the cloud that a command talks to, and are no settings of "
            "`sublet up`: `SUBLET_URL` and `SUBLET_KEY`. With `SUBLET_DEBUG=1` a command that fails "
            "unexpectedly shows where.",
            "",
        ]
    )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# Commands.


def commands_page() -> str:
    lines = [
        "# Commands",
        MADE,
        "Every command has `--help`. Answers go to stdout, everything else to stderr. Exit codes: 0 "
        "done, 1 refused or failed, 2 called wrongly, 130 interrupted; `sublet exec` and `sublet ssh` "
        "exit as the command inside does. `NAME` is an id or a name of your own.",
    ]
    panel = None
    for words, command in commands():
        if command.rich_help_panel != panel and len(words) == 1:
            panel = command.rich_help_panel
            lines += ["", f"## {panel}"]
        if not hasattr(command, "commands"):
            lines += ["", *_command(words, command)]
    return "\n".join([*lines, ""])


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group with its words, in the order of the help."""
    yield from _below((), typer.main.get_command(cli))


def _below(words: tuple[str, ...], group: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield (*words, name), command
        if hasattr(command, "commands"):
            yield from _below((*words, name), command)


def _command(words: tuple[str, ...], command: Any) -> list[str]:
    arguments = [p for p in command.params if not p.opts[0].startswith("-")]
    options = [p for p in command.params if p.opts[0].startswith("-")]
    shown = "".join(f" {_argument(p)}" for p in arguments)
    lines = [f"### `sublet {' '.join(words)}{shown}`", (command.help or "").strip()]
    if options:
        lines.append("")
    for option in options:
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        wants = "; required" if option.required else ""
        given = option.default
        default = (
            f"; default `{given}`" if given not in (None, False, True, "") and not wants else ""
        )
        lines.append(f"- {names}{default}{wants}: {(option.help or '').strip()}")
    examples = _examples(command.epilog or "")
    if examples:
        lines += ["", "```", *examples, "```"]
    return lines


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _examples(epilog: str) -> list[str]:
    mark = "[dim]$[/dim] "
    found = [line.strip() for line in epilog.splitlines() if mark in line]
    return [line.removeprefix(mark).replace("\\[", "[") for line in found]


# Errors and events.


def errors_page() -> str:
    rows = sorted(
        (f"`{kind.code}`", str(kind.status), _sentence(kind), _home(kind)) for kind in error_types()
    )
    return "\n".join(
        [
            "# Error codes",
            MADE,
            'A refusal over REST is `{"error": {"message", "type", "code", "param", "details"}}` with '
            "the status below; the command line says the message and the code. Codes are permanent. "
            "The message here is the default: where it can be more exact it is. `param` names the "
            "field that is wrong; `details` names the ways on, such as `earliest_at`.",
            "",
            *_table(("code", "status", "message", "raised by"), rows),
            "",
        ]
    )


def error_types() -> list[type[SubletError]]:
    """Every kind of error with a code of its own."""
    _import_everything()
    return [kind for kind in _subclasses(SubletError) if "code" in vars(kind)]


WAYS_ON = {
    "invalid_json": "Send one JSON object as the body.",
    "invalid_request": "The message says what is wrong, `param` where.",
    "unsupported_parameter": "Leave out the field that `param` names.",
    "context_length_exceeded": "Shorten the input, or ask for less output.",
    "sealed_parameter": "Leave it out: the weights of this model are sealed.",
    "invalid_api_key": "Send a key that is valid, as `Authorization: Bearer KEY`.",
    "insufficient_quota": "The organisation's credit is used up: add credit.",
    "credit_exhausted": "Credit ended in the middle of a stream: what was delivered is billed.",
    "budget_exceeded": "A budget is used up: the message names it, `retry-after` its end.",
    "quota_exceeded": "The tokens of this day (UTC) are used up: `retry-after` says for how long.",
    "standing_forbids": "The key, its role or its organisation may not call models: see the message.",
    "model_not_allowed": "This key may not call that model: ask for another list or a grant.",
    "model_not_found": "`GET /v1/models` of the gateway lists what this key may call.",
    "unknown_url": "There is no such path here.",
    "unsupported_surface": "It comes later: use another surface.",
    "method_not_allowed": "`allow` names the methods that are right.",
    "request_too_large": "Send less, or have `body_limit` raised.",
    "headers_too_large": "Send fewer or shorter headers.",
    "rate_limit_exceeded": "Send later: `retry-after`, and the `x-ratelimit` headers, say when.",
    "model_overloaded": "All replicas are busy and the queue took too long: try again.",
    "no_replica": "No replica is ready or can be reached: try again.",
    "snapshot_stale": "The gateway has lost its control plane for too long: try again.",
    "credit_unknown": "The gateway cannot ask for this key's credit now: try again.",
    "unavailable": "This gateway takes no requests now, or made a mistake: try again.",
    "stream_interrupted": "The stream broke off: what was delivered is billed. Ask anew.",
}
"""What to do next, by the gateway's code; its messages say more, case by case."""
IN_STREAMS = "an error event"


def gateway_errors_page() -> str:
    statuses = gateway_statuses()
    rows = [
        (f"`{code}`", ", ".join(statuses.get(code, [IN_STREAMS])), *kinds, WAYS_ON[code])
        for code, kinds in sorted(KINDS.items())
    ]
    return "\n".join(
        [
            "# Gateway errors",
            MADE,
            "What the model gateway refuses, in the form that the SDK of the surface expects: "
            '`{"error": {"message", "type", "code", "param"}}` for OpenAI\'s, '
            '`{"type": "error", "error": {"type", "message", "code", "param"}}` for Anthropic\'s. '
            "One cause has one code, and codes are permanent. A stream that cannot go on ends with "
            "such an object as its last event, and no end mark.",
            "",
            *_table(("code", "status", "OpenAI's type", "Anthropic's type", "what to do"), rows),
            "",
        ]
    )


def gateway_statuses() -> dict[str, list[str]]:
    """The statuses under which each code leaves the gateway, read off the places that refuse."""
    found: dict[str, set[str]] = {}
    root = Path(sublet.__path__[0]) / "gateway"
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            told = [a.value if isinstance(a, ast.Constant) else None for a in node.args[:2]]
            if isinstance(told[0], int) and isinstance(told[1], str):
                found.setdefault(told[1], set()).add(str(told[0]))
    # Said by the control plane, in an allowance or a key's policy; `state` gives them their status.
    found["insufficient_quota"] = {"402"}
    for code in ("budget_exceeded", "quota_exceeded", "standing_forbids"):
        found[code] = {"403"}
    return {code: sorted(statuses) for code, statuses in found.items()}


def events_page() -> str:
    lines = [
        "# Events",
        MADE,
        "An event is written to the outbox in the transaction of its cause, and read by the loops of "
        "the packages above, at least once and in order. Instants travel as microseconds since 1970.",
    ]
    for kind in sorted(event_types(), key=lambda found: (_home(found), found.kind)):
        fields = ", ".join(f"`{name}`" for name in inspect.signature(kind).parameters)
        lines += ["", f"### `{kind.kind}`", f"From {_home(kind)}. {_sentence(kind)}".strip()]
        lines += ["", f"Fields: {fields or 'none'}."]
    return "\n".join([*lines, ""])


def event_types() -> list[type[Event]]:
    _import_everything()
    return [kind for kind in _subclasses(Event) if "kind" in vars(kind)]


def _import_everything() -> None:
    for module in pkgutil.walk_packages(sublet.__path__, "sublet."):
        if not module.name.endswith("__main__") and ".migrations" not in module.name:
            importlib.import_module(module.name)


def _subclasses(kind: type[Any]) -> list[type[Any]]:
    """With itself, each once; classes with slots leave a nameless twin behind that is no kind."""
    found: dict[str, type[Any]] = {}
    waiting = [kind]
    while waiting:
        one = waiting.pop()
        waiting += one.__subclasses__()
        is_ours = one.__module__.startswith("sublet.")
        if is_ours and getattr(sys.modules[one.__module__], one.__name__, None) is one:
            found[f"{one.__module__}.{one.__qualname__}"] = one
    return list(found.values())


def _home(kind: type[Any]) -> str:
    parts = kind.__module__.split(".")[1:]
    # The package, not its rooms: a file may move.
    depth = (
        2 if parts[0] in ("base", "records", "capacity", "rights", "shops", "money", "edge") else 1
    )
    return ".".join(parts[:depth])


def _sentence(kind: type[Any]) -> str:
    text = inspect.cleandoc(vars(kind).get("__doc__") or "")
    # A dataclass without a docstring has its signature for one.
    return "" if text.startswith(f"{kind.__name__}(") else " ".join(text.split())


# The API.


def api_page() -> str:
    lines = [
        "# The API",
        MADE,
        "The whole of it, with every field, is `GET /openapi.json` (OpenAPI 3.1). Send "
        "`Authorization: Bearer <key>`. Lists take `after` and `limit` (1 to 1000) and answer "
        "`data` and `next`. A POST may carry an `Idempotency-Key`; a PUT or PATCH of a versioned thing "
        "carries its ETag in `If-Match`. Money is integer micros (a millionth of a dollar), instants "
        "are ISO 8601 in UTC. What a role may do is in the last column; a viewer may less than a "
        "member, a member less than an admin.",
    ]
    app = api()
    acts = {route.name: _acts(route.endpoint) for route in _routes()}
    by_tag: dict[str, list[tuple[str, ...]]] = {}
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            row = (
                f"`{method.upper()} {path}`",
                _summary(operation),
                _who(acts.get(operation["operationId"], []), operation),
            )
            by_tag.setdefault(operation.get("tags", ["system"])[0], []).append(row)
    for tag, rows in by_tag.items():
        lines += ["", f"## {tag}", "", *_table(("route", "", "who"), rows)]
    return "\n".join([*lines, ""])


def api() -> FastAPI:
    """The API of a cloud that nobody uses: its routes are the same."""
    clock = SystemClock.unanchored()
    store = open_store("sqlite://", clock, SystemIds())
    try:
        return create_api(
            Deps(store=store, engine=SimulatedEngine(clock), version=sublet.__version__)
        )
    finally:
        store.close()


def _routes() -> Iterable[APIRoute]:
    return [r for router in ROUTERS for r in router.routes if isinstance(r, APIRoute)]


def _summary(operation: dict[str, Any]) -> str:
    said = operation.get("description") or f"{operation['summary'].capitalize()}."
    return " ".join(said.split())


def _acts(function: Callable[..., Any]) -> list[Action]:
    """The acts that a handler asks for: in its module, else in the services that it calls."""
    here = list(_asked(function, lambda helper: helper.__module__ == function.__module__))
    return list(dict.fromkeys(here or _asked(function, lambda _: True)))


def _asked(
    function: Callable[..., Any], follows: Callable[[Any], bool], depth: int = 2
) -> Iterator[Action]:
    module = sys.modules[function.__module__]
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("Action"):
            yield Action[node.attr]
        elif isinstance(node, ast.Call) and depth:
            helper = _named(module, node.func)
            if inspect.isfunction(helper) and "sublet." in helper.__module__ and follows(helper):
                yield from _asked(helper, follows, depth - 1)


def _named(module: Any, name: ast.expr) -> Any:
    """What `function` or `package.function` stands for in a module."""
    if isinstance(name, ast.Name):
        return getattr(module, name.id, None)
    if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
        owner = getattr(module, name.value.id, None)
        return getattr(owner, name.attr, None) if inspect.ismodule(owner) else None
    return None


def _who(acts: list[Action], operation: dict[str, Any]) -> str:
    if not acts:
        return "anyone with a key" if operation.get("security") else "anyone"
    return "; ".join(f"{_least_role(act)} (`{act}`)" for act in acts)


def _least_role(act: Action) -> str:
    roles = [(kind, role) for (kind, role), allowed in ROLES.items() if act in allowed]
    order = ("viewer", "member", "admin")
    least = min((str(role) for _, role in roles), key=order.index)
    return f"{'owner ' if act in OWNERS_ACTS else ''}{least}"


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(['---'] * len(columns))}|"]
    for row in rows:
        cells = (cell.replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
