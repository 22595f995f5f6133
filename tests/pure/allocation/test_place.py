"""Placement: units on one node, aligned, with their like, on the fullest node that fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sublet.capacity.allocation.place import NodeView, Slot, choose_devices

SPOT = (1, 120)
FIRM = (2, 3600)


def a_node(name: str, *held: tuple[int, int] | None) -> NodeView:
    return NodeView(
        node_id=name,
        slots=tuple(Slot(device_id=f"{name}/{n}", rung=rung) for n, rung in enumerate(held)),
    )


def chosen(
    *nodes: NodeView,
    devices: int,
    count: int = 1,
    rung: tuple[int, int] = SPOT,
    whole: bool = False,
    kept: int = 0,
) -> tuple[str, ...] | None:
    return choose_devices(
        nodes, devices=devices, count=count, rung=rung, whole_node=whole, kept_empty=kept
    )


def test_a_pair_is_aligned_and_leaves_the_larger_block_whole() -> None:
    node = a_node("n", SPOT, None, None, None, None, None, None, None)
    assert chosen(node, devices=2) == ("n/2", "n/3")
    assert chosen(node, devices=4) == ("n/4", "n/5", "n/6", "n/7")
    assert chosen(node, devices=1) == ("n/1",)


def test_what_was_admitted_is_placed_even_where_nothing_is_aligned() -> None:
    node = a_node("n", SPOT, None, None, SPOT)
    assert chosen(node, devices=2) == ("n/1", "n/2")
    assert chosen(a_node("n", None, None, None), devices=3) == ("n/0", "n/1", "n/2")


def test_one_machines_whole_node_shape_is_all_its_devices() -> None:
    assert chosen(a_node("n", None, None, None), devices=3, whole=True) == ("n/0", "n/1", "n/2")
    assert chosen(a_node("n", None, None, SPOT), devices=3, whole=True) is None


def test_claims_that_can_leave_together_live_together() -> None:
    nodes = a_node("a", FIRM, None, None, None), a_node("b", SPOT, None, None, None)
    assert chosen(*nodes, devices=1, rung=SPOT) == ("b/1",)
    assert chosen(*nodes, devices=1, rung=FIRM) == ("a/1",)


def test_then_the_fullest_node_that_fits_and_an_empty_one_last() -> None:
    nodes = (
        a_node("a", None, None, None, None),
        a_node("b", SPOT, None, None, None),
        a_node("c", SPOT, SPOT, None, None),
    )
    assert chosen(*nodes, devices=2) == ("c/2", "c/3")
    assert chosen(*nodes, devices=3) == ("b/1", "b/2", "b/3")
    assert chosen(*nodes, devices=4) == ("a/0", "a/1", "a/2", "a/3")


def test_promised_empty_nodes_are_not_broken() -> None:
    nodes = a_node("a", None, None), a_node("b", None, None)
    assert chosen(*nodes, devices=1, kept=1) is not None
    assert chosen(*nodes, devices=1, kept=2) is None
    assert chosen(*nodes, devices=2, count=2, whole=True) == ("a/0", "a/1", "b/0", "b/1")


rungs = st.sampled_from([None, None, SPOT, FIRM])


@given(
    st.lists(st.lists(rungs, min_size=8, max_size=8), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 3),
)
def test_units_are_free_distinct_and_each_on_one_node(
    held: list[list[tuple[int, int] | None]], devices: int, count: int
) -> None:
    nodes = [a_node(f"n{i}", *slots) for i, slots in enumerate(held)]
    found = choose_devices(
        nodes, devices=devices, count=count, rung=SPOT, whole_node=False, kept_empty=0
    )
    free = {s.device_id for n in nodes for s in n.slots if s.rung is None}
    room = sum(n.free // devices for n in nodes)
    assert (found is None) == (room < count)
    if found is None:
        return
    assert len(set(found)) == devices * count
    assert set(found) <= free
    for at in range(0, len(found), devices):
        assert len({name.split("/")[0] for name in found[at : at + devices]}) == 1
