"""docs/invariants.md has every invariant, in its own words, with its mutants."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sublet.audit import INVARIANTS

mutants = sys.modules["audit_mutants"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "invariants.md"


def entries() -> dict[str, str]:
    found = re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.M | re.S)
    assert len(found) == len(dict(found)), "an invariant has two entries"
    return dict(found)


def test_page_lists_exactly_the_invariants() -> None:
    assert set(entries()) == set(INVARIANTS)


def test_entries_quote_the_statement_and_say_the_predicate() -> None:
    for name, text in entries().items():
        assert text.startswith(f"{INVARIANTS[name].statement}\n"), name
        assert len(re.findall(r"^- Predicate: .+\.$", text, re.M)) == 1, name


def test_entries_quote_their_mutants() -> None:
    for name, text in entries().items():
        said = re.findall(r"^- Mutant: (.+?)(?: \(Necessarily .*\))?$", text, re.M)
        assert said == [m.said for m in mutants.MUTANTS if m.breaks == name], name


def test_what_falls_necessarily_is_named() -> None:
    text = entries()
    for mutant in mutants.MUTANTS:
        for name in mutant.also:
            assert re.search(
                rf"{re.escape(mutant.said)} \(Necessarily .*`{name}`", text[mutant.breaks]
            )
