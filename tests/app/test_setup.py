"""`sublet setup`: what it finds, what it installs, and that it leaves well alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from sublet.app import setup

APT = """#!/bin/sh
echo "$DEBIAN_FRONTEND $*" >> "{here}/calls"
case "$1" in
update) touch "{here}/lists" ;;
install)
    for name in "$@"; do package=$name; done
    [ {needs_lists} = no ] || [ -e "{here}/lists" ] ||
        {{ echo "E: Unable to locate package $package" >&2; exit 100; }}
    [ "$package" != {refuses} ] || {{ echo "E: no room on the disk" >&2; exit 100; }}
    case "$package" in
    bubblewrap) program=bwrap ;; passt) program=pasta ;; openssh-client) program=ssh ;;
    esac
    printf '#!/bin/sh\\n' > "{here}/$program"; chmod +x "{here}/$program" ;;
esac
"""


class Machine:
    """A PATH of its own, with the programs that a test says."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.said: list[str] = []
        for name in ("touch", "chmod"):
            self._link(name)

    def _link(self, name: str) -> None:
        (self.here / name).symlink_to(f"/bin/{name}")

    def has(self, *names: str) -> None:
        for name in names:
            self._script(name, "#!/bin/sh\n")

    def has_apt(self, *, needs_lists: bool = False, refuses: str = "nothing") -> None:
        lists = "yes" if needs_lists else "no"
        self._script("apt-get", APT.format(here=self.here, needs_lists=lists, refuses=refuses))

    def _script(self, name: str, text: str) -> None:
        (self.here / name).write_text(text)
        (self.here / name).chmod(0o755)

    def setup(self, *, is_root: bool = True) -> str:
        self.said.clear()
        assert setup.main(is_root=is_root, say=self.said.append) == 0
        return "\n".join(self.said)

    @property
    def calls(self) -> list[str]:
        log = self.here / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("PATH", str(tmp_path))
    return Machine(tmp_path)


def test_with_everything_here_nothing_is_called(machine: Machine) -> None:
    machine.has("bwrap", "slirp4netns", "ssh")
    machine.has_apt()
    said = machine.setup()
    assert machine.calls == []
    assert "missing" not in said
    assert said.count("found") == 3


def test_root_installs_what_is_missing_and_the_second_run_does_nothing(machine: Machine) -> None:
    machine.has("ssh")
    machine.has_apt()
    said = machine.setup()
    assert "Installing bubblewrap" in said
    assert [call.split()[-1] for call in machine.calls] == ["bubblewrap", "passt"]
    assert all(call.startswith("noninteractive install -y -qq") for call in machine.calls)
    before = machine.calls
    assert "missing" not in machine.setup()
    assert machine.calls == before


def test_the_lists_are_read_only_where_the_package_is_not_known(machine: Machine) -> None:
    machine.has("ssh", "pasta")
    machine.has_apt(needs_lists=True)
    machine.setup()
    assert [call.split()[1] for call in machine.calls] == ["install", "update", "install"]
    assert (machine.here / "bwrap").exists()


def test_a_failure_is_one_sentence_and_the_rest_goes_on(machine: Machine) -> None:
    machine.has("ssh")
    machine.has_apt(refuses="bubblewrap")
    machine.setup()
    failures = [line for line in machine.said if "was not installed" in line]
    assert failures == [
        "bubblewrap was not installed (no room on the disk): Sublet works, but only tenants whom "
        "you trust can be served."
    ]
    assert (machine.here / "pasta").exists()


def test_an_ordinary_user_is_told_the_one_line(machine: Machine) -> None:
    machine.has("ssh")
    machine.has_apt()
    said = machine.setup(is_root=False)
    assert said.endswith("sudo apt-get install bubblewrap passt")
    assert machine.calls == []


def test_without_apt_the_packages_are_named(machine: Machine) -> None:
    said = machine.setup()
    assert said.endswith("own package manager: bubblewrap, passt, openssh-client")
