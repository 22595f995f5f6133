from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.errors import Invalid
from sublet.shops.compute.model import WorkloadSpec
from sublet.shops.compute.spec import checked, from_document, to_document

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0r9bGZ8J3uTq0Zt0K7iS1yC3iJXo8l2n5b3m0e6mVx ada@laptop"


def job(**fields: Any) -> WorkloadSpec:
    return dataclasses.replace(WorkloadSpec(command=("true",)), **fields)


@pytest.mark.parametrize(
    ("kind", "spec", "field"),
    [
        ("job", job(command=()), "command"),
        ("job", job(command=("",)), "command"),
        ("job", job(command=("a\0b",)), "command"),
        ("job", job(command=("echo", "\udcff")), "command"),
        ("job", job(command=("x" * 200_000,)), "command"),
        ("job", job(ssh_keys=(KEY,)), "ssh_keys"),
        ("job", job(script="true"), "script"),
        ("instance", job(), "command"),
        ("instance", WorkloadSpec(script="x" * 70_000), "script"),
        ("instance", WorkloadSpec(ssh_keys=("ssh-ed25519",)), "ssh_keys"),
        ("instance", WorkloadSpec(ssh_keys=("ssh-ed25519 !!!!",)), "ssh_keys"),
        ("instance", WorkloadSpec(ssh_keys=("ssh-rsa " + KEY.split()[1],)), "ssh_keys"),
        ("instance", WorkloadSpec(ssh_keys=(KEY + "\nssh-rsa x",)), "ssh_keys"),
        ("instance", WorkloadSpec(ssh_keys=(KEY,) * 17), "ssh_keys"),
        ("instance", WorkloadSpec(max_run_seconds=60), "max_run_seconds"),
        ("job", job(env={"1X": "a"}), "env.1X"),
        ("job", job(env={"A B": "a"}), "env.A B"),
        ("job", job(env={"SUBLET_X": "a"}), "env.SUBLET_X"),
        ("job", job(env={"X": "\0"}), "env.X"),
        ("job", job(env={f"X{i}": "" for i in range(300)}), "env"),
        ("job", job(image="ubuntu"), "image"),
        ("job", job(notice_signal="SIGKILL"), "notice_signal"),
        ("job", job(stop_grace_seconds=601), "stop_grace_seconds"),
        ("job", job(stop_grace_seconds=-1), "stop_grace_seconds"),
        ("job", job(max_retries=101), "max_retries"),
        ("job", job(max_retries=True), "max_retries"),
        ("job", job(max_run_seconds=0), "max_run_seconds"),
        ("job", job(name="two\nlines"), "name"),
        ("vm", job(), "kind"),
    ],
)
def test_a_wrong_value_names_its_field(kind: Any, spec: WorkloadSpec, field: str) -> None:
    with pytest.raises(Invalid) as refused:
        checked(kind, spec)
    assert refused.value.param == field
    assert str(refused.value).startswith(field)


def test_a_key_is_kept_on_one_line() -> None:
    kind, blob, comment = KEY.split()
    found = checked("instance", WorkloadSpec(ssh_keys=(f"  {kind}   {blob}  {comment} ",)))
    assert found.ssh_keys == (KEY + " ",) or found.ssh_keys == (KEY,)


@given(
    command=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=5),
    env=st.dictionaries(
        st.from_regex(r"\A[A-RT-Z_][A-Z0-9_]{0,9}\Z"),
        st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    ),
    retries=st.integers(0, 100),
)
def test_what_is_kept_is_what_was_given(
    command: list[str], env: dict[str, str], retries: int
) -> None:
    given_spec = job(command=("run", *command), env=env, max_retries=retries, outbound=True)
    kept = checked("job", given_spec)
    assert from_document(to_document(kept)) == kept == given_spec
