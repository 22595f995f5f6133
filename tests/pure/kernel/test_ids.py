"""Identifiers and secrets."""

from __future__ import annotations

import re

import pytest

from sublet.base.kernel.ids import Ids, SeededIds, SystemIds, seeded_rng


@pytest.mark.parametrize("ids", [SystemIds(), SeededIds(1)])
def test_ids_name_their_kind_and_do_not_repeat(ids: Ids) -> None:
    made = [ids.new("ins") for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(re.fullmatch(r"ins_[a-z2-7]{16}", one) for one in made)


@pytest.mark.parametrize("ids", [SystemIds(), SeededIds(1)])
def test_secrets_have_160_bits(ids: Ids) -> None:
    made = [ids.secret("sk") for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(re.fullmatch(r"sk_[a-z2-7]{32}", one) for one in made)


def test_a_seed_repeats_and_another_does_not() -> None:
    one, same, other = SeededIds(7), SeededIds(7), SeededIds(8)
    first = [one.new("a"), one.secret("sk"), one.new("b")]
    assert first == [same.new("a"), same.secret("sk"), same.new("b")]
    assert other.new("a") not in first
    assert seeded_rng(3).random() == seeded_rng(3).random()


def test_the_system_is_not_seeded() -> None:
    assert SystemIds().new("a") != SystemIds().new("a")
