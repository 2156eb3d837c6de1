"""What the scripts share: what one has started ends with it, however it is stopped."""

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kd_stand_ins import SCRIPT as SCRIPT_OF_KD

SHARED = Path(__file__).resolve().parents[2] / "egs" / "digits" / "ASR" / "shared"

SCRIPT = f"""
set -eou pipefail
. {SHARED}/stoppable.sh
work() {{ run sleep 64; }}
if [ "$1" = alone ]; then alone "$2"; fi
in_background work
echo begun
run sleep 65
"""


@pytest.fixture
def start():
    """A script in a session of its own, as a user's terminal has one."""
    sessions = []

    def begin(code, *words, **options):
        process = subprocess.Popen(
            ["bash", "-c", code, "a-script", *map(str, words)],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        sessions.append(process.pid)
        return process

    yield begin
    for session in sessions:
        try:
            os.killpg(session, signal.SIGKILL)
        except ProcessLookupError:
            pass


def living(session):
    """How many processes of a session live."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += int(fields[3]) == session and fields[0] != "Z"
    return found


def soon(condition):
    for _ in range(30_000):
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("whole", [False, True], ids=["script", "all"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_all_that_a_script_started_ends_with_it(start, name, whole):
    process, number = start(SCRIPT, "free"), getattr(signal, name)
    assert process.stdout.readline() == "begun\n"
    assert soon(lambda: living(process.pid) == 4)
    (os.killpg if whole else os.kill)(process.pid, number)
    assert process.wait(600) == 128 + number
    assert soon(lambda: living(process.pid) == 0)


def test_a_failure_in_the_foreground_ends_what_runs_in_the_background(start):
    process = start(SCRIPT.replace("sleep 65", "sh -c 'exit 7'"), "free")
    assert process.wait(600) == 7
    assert soon(lambda: living(process.pid) == 0)


def test_what_ends_well_ends_the_script_well(start):
    code = f"""
set -eou pipefail
. {SHARED}/stoppable.sh
work() {{ run sh -c "echo $1; exit $2"; }}
in_background work first 0; first=$!
in_background work second 3; second=$!
wait "$first" && echo good
wait "$second" || echo "bad $?"
"""
    out, _ = start(code).communicate(timeout=600)
    assert sorted(out.split("\n")[:-1]) == ["bad 3", "first", "good", "second"]


def test_ctrl_c_reaches_what_runs_in_the_foreground(start):
    """Bash lets what it starts in the background ignore it."""
    python = "import signal; print(signal.getsignal(signal.SIGINT).__name__)"
    code = f". {SHARED}/stoppable.sh\nrun python3 -c '{python}'"
    out, _ = start(code).communicate(timeout=600)
    assert out == "default_int_handler\n"


def test_a_second_run_waits_for_what_a_killed_one_left(start, tmp_path):
    first = start(SCRIPT, "alone", tmp_path)
    assert first.stdout.readline() == "begun\n"
    first.kill()
    second = start(SCRIPT.replace("sleep 65", "true"), "alone", tmp_path)
    said = second.stdout.readline()
    assert "another run works in" in said and "fuser" in said
    os.killpg(first.pid, signal.SIGKILL)
    assert second.stdout.readline() == "begun\n"
    assert second.wait(600) == 0


def test_a_check_of_kd_sh_ends_with_it(start, place, tmp_path):
    tool = tmp_path / "bin" / "icefall-kd"
    tool.write_text("#!/bin/sh\necho begun\nexec sleep 99\n")
    code = f"""
PATH={tmp_path / "bin"}:$PATH
exec {SCRIPT_OF_KD} --asr-dir {place} --train-manifests train.jsonl.gz --python python3
"""
    process = start(code)
    assert "Stage 0" in process.stdout.readline()
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(600) == 128 + signal.SIGTERM
    assert soon(lambda: living(process.pid) == 0)


def test_run_streaming_waits_for_another_run_in_its_folder(start, tmp_path):
    targets = tmp_path / "seed-1" / "data" / "kd" / "cuts_train.jsonl.gz"
    targets.parent.mkdir(parents=True)
    targets.touch()
    (tmp_path / "streaming").mkdir()
    with open(tmp_path / "streaming" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(f"exec {SHARED.parent}/run_streaming.sh --work-dir {tmp_path}")
        assert "another run works in" in process.stdout.readline()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(600) == 128 + signal.SIGTERM
    assert [p.name for p in (tmp_path / "streaming").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "given, idle, said",
    [
        ({}, 10, "PASSIVE,"),
        ({}, 100, ",1000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 10, "ACTIVE,"),
        ({"GOMP_SPINCOUNT": "9"}, 10, ",9"),
        ({"KMP_BLOCKTIME": "9"}, 10, ","),
    ],
    ids=str,
)
def test_how_threads_wait_is_left_to_who_has_said_it(
    start, tmp_path, given, idle, said
):
    """Else to whether the machine is busy, which two readings of its clock tell."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    env = {k: v for k, v in os.environ.items() if k not in names}
    (tmp_path / "awk").write_text(
        f"#!/bin/sh\ncase $2 in /proc/stat) echo 0 0;; *) echo {idle};; esac\n"
    )
    (tmp_path / "awk").chmod(0o755)
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    code = f". {SHARED}/threads.sh\nsh -c 'echo \"$OMP_WAIT_POLICY,$GOMP_SPINCOUNT\"'"
    out, _ = start(code, env={**env, **given}).communicate(timeout=600)
    assert out == said + "\n"
