"""The tour: owner and consumer act out the whole story, and every promise is measured.

It uses what everybody has: the SDK, SSH, real work in real workloads. Exit 0: every promise was
kept. 1: one was not, or the story could not be told to its end. 2: this cloud cannot be toured,
and the sentence names the way.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sublet.base.kernel.clock import read_boot_ns
from sublet.cli import values
from sublet.cli.errors import FAILED, USAGE, report
from sublet.cli.tour.stage import CannotTour, Scene, StoryBroken, Tour

if TYPE_CHECKING:
    from sublet.base.wire import rest

NOTICE_SECONDS = 30
TRUSTED_NOTICE_SECONDS = 5


def main(url: str, owner_key: str, *, as_json: bool = False) -> int:
    """Walk the tour on the cloud at `url`, as its owner and as a stranger who signs up."""
    from sublet.cli.tour.work import Visitor
    from sublet.sdk import Client

    with (
        tempfile.TemporaryDirectory(prefix="sublet-tour-") as folder,
        Client(url, owner_key) as own,
    ):
        tour = Tour(url=url, owner=own, visitor=Visitor(Path(folder)), quiet=as_json)
        code = _walk(tour)
        if as_json:
            print(json.dumps(_summary(tour, code)))
        return code


def _summary(tour: Tour, code: int) -> dict[str, Any]:
    return {
        "kept": code == 0,
        "seconds": round(tour.seconds(), 1),
        "promises": [asdict(promise) for promise in tour.promises],
    }


def _walk(tour: Tour) -> int:
    try:
        scene = _look_around(tour)
        _story(tour, scene)
    except CannotTour as error:
        print(f"sublet: {error}", file=sys.stderr)
        return USAGE
    except StoryBroken as error:
        print(f"sublet: the tour stopped at step {tour.number}: {error}.", file=sys.stderr)
        return FAILED
    except Exception as error:
        print(f"sublet: the tour stopped at step {tour.number}, {tour.step}:", file=sys.stderr)
        report(error)
        return FAILED
    broken = [promise for promise in tour.promises if not promise.kept]
    tour.tell("")
    if broken:
        tour.tell(f"{len(broken)} of {len(tour.promises)} promises were NOT kept:")
        for promise in broken:
            tour.tell(f"  {promise.step}: {promise.promised} (measured: {promise.measured})")
        return FAILED
    tour.tell(f"All {len(tour.promises)} promises were kept, in {tour.seconds():.0f} s.")
    tour.tell("Your turn: `sublet offers`, `sublet --help`.")
    return 0


def _look_around(tour: Tour) -> Scene:
    """Is this a cloud that can be toured? Raises CannotTour naming the way."""
    me = tour.owner.me()
    if not me.is_owner:
        raise CannotTour("the tour acts as the owner too: set SUBLET_KEY to the owner's key.")
    nodes = list(tour.owner.nodes.list())
    for node in nodes:
        if node.missing_for_strangers and not node.trusted_tenants:
            ways = [f.remedy for f in node.fences if f.fence in node.missing_for_strangers]
            way = next((remedy for remedy in ways if remedy), "")
            raise CannotTour(
                f"strangers would be refused on {node.name}: not fenced there: "
                f"{', '.join(node.missing_for_strangers)}. {way + ' Or o' if way else 'O'}pen it "
                "with `sublet up --trusted-tenants`, for tenants you trust."
            )
    trusted = any(node.trusted_tenants for node in nodes)
    offers = list(tour.owner.offers.list())
    pools = {pool.id: pool for pool in tour.owner.pools.list()}
    spots = [o for o in offers if o.product == "spot" and o.devices == 1]
    open_spots = [o for o in spots if pools[o.pool_id].free_devices]
    if not open_spots:
        raise CannotTour(
            "no device is idle: end what runs or give back what was recalled (`sublet devices`)."
            if spots
            else "no spot offer of one device is on the rate card: add one (`sublet rate-card set`)."
        )
    spot = max(open_spots, key=lambda o: pools[o.pool_id].free_devices)
    wanted = TRUSTED_NOTICE_SECONDS if trusted else NOTICE_SECONDS
    notices = sorted(choice.notice_seconds for choice in spot.notices)
    notice = next((n for n in notices if n >= wanted), notices[-1])
    on_demand = [o for o in offers if o.product == "on_demand" and o.pool_id == spot.pool_id]
    return Scene(
        pool=pools[spot.pool_id],
        spot=spot,
        on_demand=min(on_demand, key=lambda o: o.devices, default=None),
        notice_seconds=notice,
        trusted=trusted,
    )


def _story(tour: Tour, scene: Scene) -> None:
    from sublet.cli.tour.story import Actors
    from sublet.sdk import Client

    tour.tell(f"The tour of {tour.url}: every promise is measured. It takes under 3 minutes.")
    if scene.trusted:
        tour.note("This cloud serves trusted tenants: not every fence that strangers need holds.")
    if not scene.together:
        tour.note("One device is free, so instance and job run one after the other.")
    signed, credit = _sign_up(tour, scene)
    with Client(tour.url, signed.secret) as consumer:
        actors = Actors(tour=tour, scene=scene, consumer=consumer, signed=signed, credit=credit)
        try:
            actors.play()
        finally:
            actors.leave()


def _sign_up(tour: Tour, scene: Scene) -> tuple[rest.SignUp, int]:
    """The stranger, and the credit in micros that the story is paid from."""
    from sublet.base.wire import rest

    tour.begin("A stranger signs up")
    start = read_boot_ns()
    mark = f"{start % 10**9:09d}"
    signed = tour.owner.sign_up(
        rest.SignUpCreate(email=f"ada-{mark}@example.org", organisation_name="Ada Labs")
    )
    tour.note(f"{signed.organisation.name}, {signed.organisation.standing}; key shown once")
    if not signed.trial_credit.micros:
        # The owner has set the trial to nothing: somebody has to pay for the story.
        per_hour = max(c.price_micros_per_device_hour for c in scene.spot.notices)
        amount = 4 * per_hour
        tour.owner.money.grant(
            rest.CreditCreate(
                organisation_id=signed.organisation.id,
                amount_micros=amount,
                reference=f"tour-{mark}",
                note="for the tour",
            )
        )
        tour.note("no trial credit is granted here, so the owner grants some for the tour")
        return signed, amount
    dearest = max(
        (
            choice.price_micros_per_device_hour
            for offer in tour.owner.offers.list()
            if offer.product == "on_demand" and offer.devices == 1
            for choice in offer.notices
            if choice.notice_seconds == offer.default_notice_seconds
        ),
        default=0,
    )
    credit = signed.trial_credit.micros
    tour.promise(
        "a trial credit that one hold always fits into",
        f"{values.money(credit)}, an on-demand hour is at most {values.money(dearest)}",
        credit >= dearest,
    )
    return signed, credit
