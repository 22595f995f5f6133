from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.shops.compute.states import LIVE, TABLE, TERMINAL, State, Step, WrongState, next_state


@given(state=st.sampled_from(State), step=st.sampled_from(Step))
def test_every_step_is_listed_or_refused(state: State, step: Step) -> None:
    if (state, step) in TABLE:
        assert next_state(state, step) is TABLE[state, step]
    else:
        with pytest.raises(WrongState) as refused:
            next_state(state, step)
        assert refused.value.details["state"] == state


@given(state=st.sampled_from(sorted(TERMINAL)), step=st.sampled_from(Step))
def test_nothing_leads_out_of_an_end(state: State, step: Step) -> None:
    with pytest.raises(WrongState):
        next_state(state, step)


def test_every_state_is_reached_from_pending_and_reaches_an_end() -> None:
    reached = {State.PENDING}
    for _ in State:
        reached |= {to for (state, _), to in TABLE.items() if state in reached}
    assert reached == set(State)
    ends = set(TERMINAL)
    for _ in State:
        ends |= {state for (state, _), to in TABLE.items() if to in ends}
    assert ends == set(State)


@given(steps=st.lists(st.sampled_from(Step), max_size=40))
def test_on_any_path_running_comes_only_from_a_start(steps: list[Step]) -> None:
    state, admitted = State.PENDING, False
    for step in steps:
        if (state, step) not in TABLE:
            continue
        before, state = state, next_state(state, step)
        admitted = admitted or step is Step.ADMITTED
        if state in LIVE:
            assert admitted
        if state is State.RUNNING and before is not State.RUNNING:
            assert step in (Step.STARTED, Step.WITHDRAWN)
        if state in (State.AWAITING_CAPACITY, State.STOPPED) or state in TERMINAL:
            admitted = False


def test_only_a_first_admission_or_start_hands_out_devices() -> None:
    sources = {state for (state, _), to in TABLE.items() if to is State.PROVISIONING}
    assert sources == {State.PENDING, State.AWAITING_CAPACITY, State.STOPPED}
