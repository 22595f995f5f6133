"""Who: sign up, keys, projects, members, budgets."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sublet.cli import profile, values
from sublet.cli.commands import PEOPLE, Json, Yes, client, command, group
from sublet.cli.errors import CliError, UsageError
from sublet.cli.screen import confirm, facts, say, show, show_json, table

if TYPE_CHECKING:
    from sublet.base.wire import rest

keys = group(
    "Keys: list, make, revoke.",
    "sublet keys create --name ci --expires 30d",
    "sublet keys revoke key_… --yes",
)
projects = group("Projects: list, make.", "sublet projects create training")
members = group(
    "Members: users and service accounts of your organisation.",
    "sublet members add Grace --email grace@example.org",
)
budgets = group(
    "Budgets: caps on spending, enforced before it happens.",
    "sublet budgets set organisation month 50",
)

Role = Annotated[str, typer.Option("--role", help="admin, member or viewer.")]


def add_to(app: typer.Typer) -> None:
    command(
        app,
        "sublet signup --email ada@example.org --organisation 'Ada Labs' --save",
        """eval "$(sublet signup --email ada@example.org --organisation 'Ada Labs' --export)\"""",
        panel=PEOPLE,
    )(signup)
    command(app, "sublet whoami", panel=PEOPLE)(whoami)
    command(keys, "sublet keys list", name="list")(list_keys)
    command(
        keys,
        "sublet keys create --name ci",
        "sublet keys create --name ci --role viewer --expires 30d --project prj_…",
        name="create",
    )(create_key)
    command(keys, "sublet keys revoke key_…", name="revoke")(revoke_key)
    command(
        app,
        "sublet limits prj_… --tokens-per-minute 100000 --tokens-per-day 5000000",
        "sublet limits org_… --model smollm2-135m-instruct",
        panel=PEOPLE,
        name="limits",
    )(set_limits)
    command(projects, "sublet projects list", name="list")(list_projects)
    command(projects, "sublet projects create training", name="create")(create_project)
    command(members, "sublet members list", name="list")(list_members)
    command(
        members,
        "sublet members add 'Grace' --email grace@example.org --role member",
        "sublet members add ci --service-account --role viewer",
        name="add",
    )(add_member)
    command(budgets, "sublet budgets list", name="list")(list_budgets)
    command(
        budgets,
        "sublet budgets set organisation month 50",
        "sublet budgets set key day 2.50 --scope key_…",
        name="set",
    )(set_budget)
    for name, sub in (
        ("keys", keys),
        ("projects", projects),
        ("members", members),
        ("budgets", budgets),
    ):
        app.add_typer(sub, name=name, rich_help_panel=PEOPLE)


def signup(
    email: Annotated[str, typer.Option("--email", help="Yours.")],
    organisation: Annotated[str, typer.Option("--organisation", help="Its name.")],
    save: Annotated[
        bool, typer.Option("--save", help="Keep the key for the commands that follow.")
    ] = False,
    export: Annotated[
        bool, typer.Option("--export", help="Print lines for the shell to evaluate.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign up: an organisation, a key shown once, and a trial credit."""
    from sublet.base.wire import rest as shapes

    with client(needs_key=False) as cloud:
        found = cloud.sign_up(shapes.SignUpCreate(email=email, organisation_name=organisation))
    url = profile.load().url
    if save:
        path = profile.save(profile.Profile(url=url, key=found.secret))
        say(f"kept in {path}")
    if as_json:
        show_json(found)
        return
    if export:
        show(f"export SUBLET_URL={shlex.quote(url)} SUBLET_KEY={shlex.quote(found.secret or '')}")
        say(f"{found.organisation.name}: credit {values.money(found.trial_credit.micros)}")
        return
    facts(
        (
            ("organisation", f"{found.organisation.name} ({found.organisation.id})"),
            ("project", f"{found.project.name} ({found.project.id})"),
            ("standing", found.organisation.standing),
            ("credit", values.money(found.trial_credit.micros, found.trial_credit.currency)),
            ("key", f"{found.secret}   (shown this once)"),
        )
    )
    if not save:
        show(f"use it: export SUBLET_URL={url} SUBLET_KEY={found.secret}")


def whoami(as_json: Json = False) -> None:
    """Who the key speaks for, and what it may spend."""
    with client() as cloud:
        found = cloud.me()
    if as_json:
        show_json(found)
        return
    kind = ", the owner of this cloud" if found.is_owner else ""
    facts(
        (
            ("organisation", f"{found.organisation.name} ({found.organisation.id}){kind}"),
            ("standing", found.organisation.standing),
            ("principal", f"{found.principal.name} ({found.principal.kind})"),
            ("key", f"{found.key.prefix}… ({found.key.id})"),
            ("role", found.role),
            ("available", values.money(found.available.micros, found.available.currency)),
        )
    )


def list_keys(as_json: Json = False) -> None:
    """The keys of your organisation, without their secrets."""
    with client() as cloud:
        found = list(cloud.keys.list())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            k.id,
            k.name,
            f"{k.prefix}…",
            k.role or "its principal's",
            k.project_id or "all",
            values.when(k.expires_at),
            values.when(k.revoked_at),
        )
        for k in found
    ]
    table(("id", "name", "begins", "role", "project", "expires", "revoked"), rows)


RequestsAMinute = Annotated[
    int | None, typer.Option("--requests-per-minute", min=1, help="To models, at most.")
]
TokensAMinute = Annotated[int | None, typer.Option("--tokens-per-minute", min=1, help="At most.")]
TokensADay = Annotated[
    int | None, typer.Option("--tokens-per-day", min=1, help="At most, by UTC days.")
]
ModelNames = Annotated[
    list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")
]


def _limits(
    requests: int | None, tokens: int | None, daily: int | None, models: list[str] | None
) -> dict[str, Any]:
    found = {
        "requests_per_minute": requests,
        "tokens_per_minute": tokens,
        "tokens_per_day": daily,
        "models": models,
    }
    return {name: value for name, value in found.items() if value}


def set_limits(
    scope: Annotated[
        str, typer.Argument(metavar="SCOPE", help="Id of an organisation or project.")
    ],
    requests: RequestsAMinute = None,
    tokens: TokensAMinute = None,
    daily: TokensADay = None,
    models: ModelNames = None,
    as_json: Json = False,
) -> None:
    """Say what an organisation or project may ask of models; what is left out is no limit."""
    from sublet.base.wire import rest as shapes

    kind = "project" if scope.startswith("prj_") else "organisation"
    body = shapes.LimitsPut.model_validate(_limits(requests, tokens, daily, models))
    with client() as cloud:
        found = cloud.limits.set(kind, scope, body)
    if as_json:
        show_json(found)
        return
    facts(
        [
            (kind, scope),
            ("requests a minute", found.requests_per_minute or "no limit of its own"),
            ("tokens a minute", found.tokens_per_minute or "no limit of its own"),
            ("tokens a day", found.tokens_per_day or "no limit of its own"),
            ("models", ", ".join(found.models) if found.models else "all"),
        ]
    )


def create_key(
    name: Annotated[str, typer.Option("--name", help="What it is for.")],
    role: Annotated[str | None, typer.Option("--role", help="admin, member or viewer.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="Only for this one.")] = None,
    principal: Annotated[
        str | None, typer.Option("--principal", help="Whose; default: yours.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="A time, or from now such as 30d.")
    ] = None,
    max_devices: Annotated[
        int | None, typer.Option("--max-devices", min=0, help="Held at once, at most.")
    ] = None,
    requests: RequestsAMinute = None,
    tokens: TokensAMinute = None,
    daily: TokensADay = None,
    models: ModelNames = None,
    as_json: Json = False,
) -> None:
    """Make a key. Its secret is shown this once."""
    from sublet.base.wire import rest as shapes

    limits = _limits(requests, tokens, daily, models)
    if max_devices is not None:
        limits["max_devices"] = max_devices
    given = {
        "limits": limits or None,
        "name": name,
        "role": role,
        "project_id": project,
        "principal_id": principal,
        "expires_at": values.instant(expires, "--expires") if expires else None,
    }
    body = shapes.KeyCreate.model_validate({k: v for k, v in given.items() if v is not None})
    with client() as cloud:
        found = cloud.keys.create(body)
    if as_json:
        show_json(found)
        return
    facts((("id", found.key.id), ("key", f"{found.secret}   (shown this once)")))


def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="Its id.")],
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Revoke a key: it works no more."""
    confirm(f"Revoke {key_id}?", yes=yes)
    with client() as cloud:
        cloud.keys.revoke(key_id)
        found = cloud.keys.get(key_id)
    if as_json:
        show_json(found)
        return
    show(f"{key_id} revoked")


def list_projects(as_json: Json = False) -> None:
    """The projects of your organisation."""
    with client() as cloud:
        found = list(cloud.projects.list())
    if as_json:
        show_json(found)
        return
    table(("id", "name"), [(p.id, p.name) for p in found])


def create_project(
    name: Annotated[str, typer.Argument(help="Its name.")], as_json: Json = False
) -> None:
    """Make a project."""
    from sublet.base.wire import rest as shapes

    with client() as cloud:
        found = cloud.projects.create(shapes.ProjectCreate(name=name))
    if as_json:
        show_json(found)
        return
    show(f"{found.id}  {found.name}")


def list_members(as_json: Json = False) -> None:
    """Users and service accounts."""
    with client() as cloud:
        found = list(cloud.principals.list())
    if as_json:
        show_json(found)
        return
    rows = [(p.id, p.name, p.kind, p.role, p.email or "") for p in found]
    table(("id", "name", "kind", "role", "email"), rows)


def add_member(
    name: Annotated[str, typer.Argument(help="Their name.")],
    email: Annotated[str | None, typer.Option("--email", help="Of a user.")] = None,
    service_account: Annotated[
        bool, typer.Option("--service-account", help="A program's, without an email.")
    ] = False,
    role: Role = "member",
    as_json: Json = False,
) -> None:
    """Add a user or a service account; make a key for it with `sublet keys create --principal`."""
    from sublet.base.wire import rest as shapes

    given = {"kind": "service_account" if service_account else "user", "name": name, "role": role}
    if email:
        given["email"] = email
    with client() as cloud:
        found = cloud.principals.create(shapes.PrincipalCreate.model_validate(given))
    if as_json:
        show_json(found)
        return
    show(f"{found.id}  {found.name}  {found.role}")


def list_budgets(as_json: Json = False) -> None:
    """The budgets that apply, and what is spent of them."""
    with client() as cloud:
        found = list(cloud.budgets.list())
    if as_json:
        show_json(found)
        return
    _show_budgets(found)


def _show_budgets(found: list[rest.Budget]) -> None:
    rows = [
        (
            f"{b.scope_kind} {b.scope_id}",
            b.period,
            values.money(b.limit.micros, b.limit.currency),
            values.money(b.spent.micros, b.spent.currency),
            values.when(b.resets_at),
        )
        for b in found
    ]
    table(("of", "a", ">limit", ">spent", "resets"), rows, empty="no budgets are set")


def set_budget(
    kind: Annotated[str, typer.Argument(metavar="organisation|project|key")],
    period: Annotated[str, typer.Argument(metavar="day|week|month|lifetime")],
    limit: Annotated[str, typer.Argument(help="An amount such as 50 or 2.50.")],
    scope: Annotated[str | None, typer.Option("--scope", help="Its id; default: your own.")] = None,
    as_json: Json = False,
) -> None:
    """Set a budget: nothing is rented that would pass it."""
    from sublet.base.wire import rest as shapes

    limit_micros = values.micros(limit, "limit")
    with client() as cloud:
        body = {
            "scope_kind": kind,
            "scope_id": scope or _own(cloud.me(), kind),
            "period": period,
            "limit_micros": limit_micros,
        }
        found = cloud.budgets.set(shapes.BudgetPut.model_validate(body))
    if as_json:
        show_json(found)
        return
    _show_budgets([found])


def _own(me: rest.Me, kind: str) -> str:
    if kind == "organisation":
        return me.organisation.id
    if kind == "key":
        return me.key.id
    if kind != "project":
        raise UsageError(f"a budget is of an organisation, project or key, not {kind!r}.")
    if me.key.project_id is None:
        raise CliError("this key is of no one project: say which with --scope prj_….")
    return me.key.project_id
