"""The floor kept by changes is the floor made from the rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from allocation_builders import HOUR, NOW, a_need, a_sale, examples
from hypothesis import given
from hypothesis import strategies as st

from sublet.capacity.allocation.floor import Floor
from sublet.capacity.allocation.model import Claim
from sublet.capacity.allocation.place import FIRST_PARTY_RUNG
from sublet.capacity.allocation.store import Placement
from sublet.capacity.fleet import Device, Pool, Roster

NODES, DEVICES = 3, 4


def a_roster(edition: str, *, broken: frozenset[str] = frozenset()) -> Roster:
    devices = tuple(
        Device(
            id=f"n{node}/{number}",
            node_id=f"n{node}",
            pool_id="pol_1",
            name=str(number),
            healthy=f"n{node}/{number}" not in broken,
            misses=0,
            missed_since=None,
        )
        for number in range(DEVICES)
        for node in range(NODES)
    )
    return Roster(
        pool=Pool(
            id="pol_1",
            site_id="sit_1",
            name="gpu",
            device_kind="gpu",
            device_model="H100",
            memory_bytes=1,
            head_room_percent=2,
            scrub_seconds=60,
            return_promise_seconds=210,
            outbound="none",
        ),
        edition=edition,
        nodes=(),
        devices=devices,
        sellable=tuple(device for device in devices if device.healthy),
        largest_node=DEVICES,
        missing_fences=(),
        closed_to_strangers=(),
    )


@dataclass
class Rows:
    """The rows of one pool, and the floor that is kept beside them."""

    roster: Roster
    floor: Floor
    claims: dict[str, Claim] = field(default_factory=dict)
    placements: list[Placement] = field(default_factory=list)

    def held(self) -> list[Placement]:
        return [row for row in self.placements if row.ends_at is None]

    def free(self) -> list[str]:
        taken = {row.device_id for row in self.held() if row.level == 0}
        return [device.id for device in self.roster.sellable if device.id not in taken]

    def file(self, claim: Claim) -> None:
        self.claims[claim.id] = claim
        self.changed(claim)

    def bind(self, claim: Claim) -> None:
        inside = claim.parent_claim_id is not None
        for device_id in self.free()[: claim.size]:
            self.placements.append(
                Placement(
                    claim_id=claim.id,
                    pool_id="pol_1",
                    node_id=self.floor.node_of[device_id],
                    device_id=device_id,
                    level=1 if inside else 0,
                    starts_at=NOW,
                    ends_at=None,
                )
            )
        self.changed(claim)

    def release(self, claim: Claim) -> None:
        self.placements = [
            replace(row, ends_at=NOW + HOUR)
            if row.claim_id == claim.id and row.ends_at is None
            else row
            for row in self.placements
        ]
        gone = replace(claim, released_at=NOW + HOUR)
        del self.claims[claim.id]
        self.changed(gone)

    def changed(self, claim: Claim) -> None:
        of_it = [row for row in self.placements if row.claim_id == claim.id]
        self.floor = self.floor.with_placements([claim], of_it)

    def made_anew(self) -> Floor:
        return Floor.of(self.roster, self.claims.values(), self.held())


def rows(broken: frozenset[str] = frozenset()) -> Rows:
    roster = a_roster("one", broken=broken)
    return Rows(roster=roster, floor=Floor.of(roster, (), ()))


acts = st.lists(
    st.tuples(
        st.sampled_from(["sale", "node", "need", "child", "bind", "release"]), st.integers(0)
    ),
    max_size=25,
)
breakages = st.frozensets(
    st.builds(
        lambda node, number: f"n{node}/{number}",
        st.integers(0, NODES - 1),
        st.integers(0, DEVICES - 1),
    ),
    max_size=4,
)


@examples(150)
@given(acts, breakages)
def test_after_any_changes_it_is_the_floor_that_the_rows_make(
    done: list[tuple[str, int]], broken: frozenset[str]
) -> None:
    pool = rows(broken)
    for act, pick in done:
        standing = sorted(pool.claims.values(), key=lambda claim: claim.id)
        if act == "sale":
            pool.file(a_sale(1 + pick % 2))
        elif act == "node":
            pool.file(a_sale(DEVICES, whole_node=True))
        elif act == "need":
            pool.file(a_need(1 + pick % 2))
        elif standing:
            claim = standing[pick % len(standing)]
            is_placed = any(row.claim_id == claim.id for row in pool.held())
            if act == "child":
                pool.file(a_need(1, parent=claim.id))
            elif act == "release":
                pool.release(claim)
            elif not is_placed and len(pool.free()) >= claim.size:
                pool.bind(claim)
        assert pool.floor == pool.made_anew()


def test_it_says_who_stands_where_and_who_waits() -> None:
    pool = rows(broken=frozenset({"n2/0"}))
    sale, need, waiting = a_sale(2), a_need(1), a_sale(1)
    for claim in (sale, need, waiting):
        pool.file(claim)
    pool.bind(sale)
    pool.bind(need)
    assert pool.floor.unbound == {waiting.id}
    rungs = {s.device_id: s.rung for view in pool.floor.views for s in view.slots}
    assert [name for name, rung in rungs.items() if rung == sale.rung] == ["n0/0", "n1/0"]
    assert [name for name, rung in rungs.items() if rung == FIRST_PARTY_RUNG] == ["n0/1"]
    assert "n2/0" not in rungs
    nodes = pool.floor.nodes(unbound_whole=0)
    assert nodes is not None
    assert list(nodes.devices) == [4, 4, 3]
    assert list(nodes.free) == [2, 3, 3]
    assert (nodes.size, nodes.whole, nodes.fractions) == (4, 2, 2)
    pool.release(sale)
    assert [view.free for view in pool.floor.views] == [3, 4, 3]
