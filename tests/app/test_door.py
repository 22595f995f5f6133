"""What the bastion is told: the live run, or in words why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from sublet.app.folder import Folder
from sublet.app.serving import Door
from sublet.app.settings import Settings
from sublet.app.wiring import App
from sublet.base.store import Actor
from sublet.edge.bastion import Target
from sublet.records import tenancy
from sublet.rehearsal.world import World


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    with World(path=tmp_path) as made:
        yield made


def door_of(world: World, tmp_path) -> Door:
    return Door(
        App(
            settings=Settings(data=tmp_path),
            folder=Folder(tmp_path),
            clock=world.clock,
            ids=world.store.ids,
            store=world.store,
            engine=world.line.engine,
            installation_id="",
        )
    )


@pytest.mark.parametrize("standing", ["suspended", "closing"])
def test_a_suspended_organisations_door_is_shut_though_it_runs(
    world: World, tmp_path, standing: str
) -> None:
    door = door_of(world, tmp_path)
    buyer = world.sign_up()
    machine = buyer.rent()
    world.run_until(world.now + timedelta(minutes=2))
    assert isinstance(door.lookup(machine.id), Target)

    def stand(as_what: str) -> None:
        with world.work(Actor.system("test")) as work:
            tenancy.set_standing(work, buyer.organisation_id, as_what, "abuse report 12")

    stand(standing)
    said = door.lookup(machine.id)
    assert isinstance(said, str)
    assert standing in said
    assert "what runs goes on" in said
    world.run_until(world.now + timedelta(minutes=2))
    stand("good")
    # It went on running: the same run is behind the door again.
    assert isinstance(door.lookup(machine.id), Target)


def test_an_unknown_login_is_nothing(world: World, tmp_path) -> None:
    assert door_of(world, tmp_path).lookup("ins_none") is None
