"""What the pages promise exists: links, commands with their options, settings, routes, targets."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from sublet.app.settings import Settings
from sublet.cli.main import app
from sublet.gateway.dialects import SURFACES
from sublet.gateway.pages import MODELS
from sublet.rights import market
from sublet.rights.market import ratecard

pages = sys.modules["docs_pages"]
ROOT = Path(__file__).resolve().parents[2]
CLI = typer.main.get_command(app)
PAGES = [pytest.param(page, id=pages.named(page)) for page in pages.PAGES]


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words begin with, and the words after it."""
    command, rest = CLI, list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command `sublet {' '.join(words)}`"
        command = command.commands[rest.pop(0)]
    return command, rest


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in pages.anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_commands_to_be_typed_are_accepted(page: Path) -> None:
    """Through the command line's own parser: names, options, values and how many words."""
    for block in pages.blocks(page):
        for line in pages.shell_lines(block):
            for words in pages.calls(line) if "sublet" in line else ():
                command, rest = resolve(words)
                if "--help" in rest or hasattr(command, "commands"):
                    continue
                try:
                    command.make_context("sublet", list(rest)).close()
                except Exception as error:
                    pytest.fail(f"line {block.line}: `{line}`: {type(error).__name__}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_passing_exist(page: Path) -> None:
    for span in pages.spans(page):
        words = span.split()
        if words[0] != "sublet" or "…" in words[1:2] or "|" in span:
            continue
        command, rest = resolve([word for word in words[1:] if word != "…"])
        known = {
            name
            for parameter in getattr(command, "params", ())
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        asked = {w.partition("=")[0] for w in rest[: rest.index("--") if "--" in rest else None]}
        unknown = {w for w in asked if w.startswith("-")} - known - {"--help"}
        assert not unknown, f"`{span}`: no such option {', '.join(unknown)}"


@pytest.mark.parametrize("page", PAGES)
def test_offers_that_are_rented_are_on_the_seed_card(page: Path) -> None:
    entries = ratecard.parse_rate_card(market.seed_rate_card())
    tails = {1: "", ratecard.WHOLE_NODE: "-node"}
    ids = {f"{e.id}{tails.get(shape, f'-{shape}')}" for e in entries for shape in e.shapes}
    assert "cpu-spot-2" in ids
    for block in pages.blocks(page):
        for line in pages.shell_lines(block):
            for words in pages.calls(line) if "sublet" in line else ():
                if words[:1] and words[0] in ("rent", "run", "quote"):
                    assert words[1] in ids, f"line {block.line}: there is no offer {words[1]}"


@pytest.mark.parametrize("page", PAGES)
def test_variables_targets_and_metrics_exist(page: Path) -> None:
    source = "".join(path.read_text() for path in (ROOT / "sublet").rglob("*.py"))
    text = page.read_text()
    settings = {f"SUBLET_{name.upper()}" for name in Settings.model_fields}
    for name in set(re.findall(r"\bSUBLET_[A-Z_]+\b", text)) - settings:
        assert name in source, f"nothing reads or sets {name}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in re.findall(r"`make ([a-z]+)", text):
        assert name in targets, f"there is no `make {name}`"
    for name in re.findall(r"`(sublet_[a-z_]+)`", text):
        said = f'"{name}"' in source or f"# TYPE {name} " in source
        assert said, f"there is no metric {name}"


@pytest.fixture(scope="module")
def routes(reference: ModuleType) -> set[tuple[str, str]]:
    documented = {
        (method.upper(), re.sub(r"\{\w+\}", "*", path))
        for path, operations in reference.api().openapi()["paths"].items()
        for method in operations
    }
    inside = {("GET", "/v1/metadata"), ("GET", "/v1/metadata/interruption")}
    of_models = {("GET", found) for found in (MODELS.decode(), f"{MODELS.decode()}/*", "/health")}
    called = {("POST", path.decode()) for path in SURFACES}
    return documented | inside | of_models | called | {("GET", "/openapi.json")}


@pytest.mark.parametrize("page", PAGES)
def test_routes_exist(page: Path, routes: set[tuple[str, str]]) -> None:
    route = r"\b(GET|POST|PUT|PATCH|DELETE) (/[\w/{}<>-]+(?:\.json)?)"
    for method, path in re.findall(route, page.read_text()):
        asked = re.sub(r"[{<]\w+[}>]", "*", path)
        assert (method, asked) in routes, f"there is no route {method} {path}"
