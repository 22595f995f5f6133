"""The reference is made from the source, and says all of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

from sublet.app.settings import Settings
from sublet.edge.api.routes import ROUTERS
from sublet.gateway.errors import KINDS

ROOT = Path(__file__).resolve().parents[2]


def test_reference_is_what_the_source_says_now(reference: ModuleType) -> None:
    for name, text in reference.pages().items():
        page = reference.PAGES / name
        kept = page.read_text() if page.exists() else ""
        assert kept == text, f"docs/reference/{name} is stale: run `make docs`"


def test_reference_holds_no_page_that_nothing_makes(reference: ModuleType) -> None:
    assert {page.name for page in reference.PAGES.iterdir()} == set(reference.pages())


def test_error_codes_are_unique_and_say_what_to_do(reference: ModuleType) -> None:
    kinds = reference.error_types()
    counted = Counter(kind.code for kind in kinds)
    assert len(kinds) > 50
    assert {code: n for code, n in counted.items() if n > 1} == {}
    assert [kind.__name__ for kind in kinds if not (vars(kind).get("__doc__") or "").strip()] == []
    assert [
        k.code for k in kinds if not k.code.replace("_", "").isalpha() or k.code.isupper()
    ] == []


def test_every_code_of_the_gateway_is_explained_once(reference: ModuleType) -> None:
    raised = reference.gateway_statuses()
    assert set(raised) <= set(KINDS), "a code without a kind of error for both SDKs"
    assert set(reference.WAYS_ON) == set(KINDS)
    assert set(KINDS) - set(raised) <= {"credit_exhausted"}, "nothing refuses with it"
    page = (reference.PAGES / "gateway-errors.md").read_text()
    assert [code for code in KINDS if f"| `{code}` |" not in page] == []


def test_event_kinds_are_unique(reference: ModuleType) -> None:
    kinds = [kind.kind for kind in reference.event_types()]
    assert len(kinds) > 10
    assert sorted(set(kinds)) == sorted(kinds)


def test_every_setting_has_a_meaning_and_an_effect() -> None:
    source = "".join(path.read_text() for path in (ROOT / "sublet" / "app").glob("*.py"))
    for name, field in Settings.model_fields.items():
        assert field.description, f"{name} has no description"
        assert f"settings.{name}" in source or f"self.{name}" in source, f"{name} does nothing"


def test_every_route_says_who_may(reference: ModuleType) -> None:
    """A handler that asks for no act is one of the few that are meant for everybody."""
    acts = {route.path: reference._acts(route.endpoint) for r in ROUTERS for route in r.routes}
    open_to_all = {path for path, found in acts.items() if not found}
    assert open_to_all == {"/v1/signup", "/v1/me", "/healthz", "/metrics"}
