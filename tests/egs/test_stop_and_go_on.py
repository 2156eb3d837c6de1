"""``kd.sh`` stopped once by each signal; stop_and_go_on.py stops all commands often."""

import sys

import pytest
import stop_and_go_on
from stop_and_go_on import Moment, stop_once, undisturbed
from stop_scenarios import Scenario, kd_sh, tree


@pytest.fixture(scope="module")
def kd_script(tmp_path_factory):
    work = tmp_path_factory.mktemp("kd.sh")
    return work, undisturbed(kd_sh(), work)


@pytest.mark.parametrize(
    "moment",
    [
        Moment("SIGINT", True, output=0.3),
        Moment("SIGTERM", False, output=0.45),
        Moment("SIGHUP", True, output=0.6),
        Moment("SIGKILL", True, output=0.35),
        Moment("SIGKILL", False, output=0.55),
    ],
    ids=lambda m: f"{m.signal}-{'all' if m.whole_session else 'script'}",
)
def test_kd_script_goes_on_where_it_was_stopped(kd_script, moment):
    work, whole = kd_script
    # Bash loses a Ctrl-C of the microseconds between the end of a command and its own
    # going on (jobs.c, wait_for): then a person presses it again.
    for _ in range(3):
        stop = stop_once(kd_sh(), work, moment, whole)
        assert stop.good, stop
        if stop.status:
            break
    assert stop.stopped and stop.status != 0


# Writes a file in two halves, and takes it for done where it is there.
CARELESS = """
import sys, time
from pathlib import Path
out = Path(sys.argv[1])
if not out.exists():
    with open(out, "w") as file:
        file.write("first ")
        file.flush()
        print("first", flush=True)
        time.sleep(600)
        file.write("second ")
"""


def test_a_command_that_takes_half_a_file_for_done_is_found_out(tmp_path):
    careless = Scenario(
        "careless",
        lambda folder: folder.mkdir(parents=True),
        lambda folder: [sys.executable, "-c", CARELESS, str(folder / "out")],
    )
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/out").write_text("first second ")
    whole = tree(tmp_path / "whole"), 0.0, len("first\n")
    stop = stop_once(careless, tmp_path, Moment("SIGKILL", True, output=1.0), whole)
    assert stop.stopped and stop.differs == ["out"] and not stop.good


# Leaves a process behind when it is stopped. The next one ends that, and has no work.
LEAVES = """
if [ -f "$0/left" ]; then kill -9 "$(cat "$0/left")"; exit 0; fi
(trap '' TERM; echo $BASHPID > "$0/left"; echo begun; exec sleep 600) & wait
"""


def test_what_lives_on_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_and_go_on, "END", 0.2)
    leaves = Scenario(
        "leaves",
        lambda folder: folder.mkdir(parents=True),
        lambda folder: ["bash", "-c", LEAVES, str(folder)],
    )
    whole = {}, 0.0, len("begun\n")
    stop = stop_once(leaves, tmp_path, Moment("SIGTERM", True, output=1.0), whole)
    assert stop.stopped and any("sleep 600" in words for words in stop.left)
    assert not stop.good
