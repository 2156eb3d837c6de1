"""A command that is stopped by a signal leaves nothing half-written behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

STOPPED = """
import signal, sys, time
from pathlib import Path
from icefall_kd.cli.stops import clean_up_when_stopped
from icefall_kd.files import replacing
clean_up_when_stopped()
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    try:
        print("begun", flush=True)
        time.sleep(600)
    finally:
        print("cleans up", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def started(path, cleaning=0.0, before="", **options):
    code = before + STOPPED
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(cleaning)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_command_removes_what_it_was_writing(tmp_path, name):
    process = started(tmp_path / "out")
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=600)
    assert process.returncode not in (0, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("second", ["SIGTERM", "SIGHUP"])
def test_a_second_signal_does_not_break_off_the_cleaning(tmp_path, second):
    """As a script sends it that was stopped by Ctrl-C too."""
    process = started(tmp_path / "out", cleaning=1.0)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleans up\n"
    process.send_signal(getattr(signal, second))
    process.communicate(timeout=600)
    assert list(tmp_path.iterdir()) == []


CHILD = """
import signal, subprocess
def died(number, frame):  # as torch says it of a process that reads features
    raise RuntimeError("DataLoader worker is killed by signal: Terminated")
signal.signal(signal.SIGCHLD, died)
ends_late = "trap 'sleep 0.3; exit 1' TERM; sleep 600 & wait"
child = subprocess.Popen(["bash", "-c", ends_late])
"""


def test_a_queue_that_stops_all_processes_at_once_gets_no_traceback(tmp_path):
    """As Slurm's scancel does; a child ends while this one cleans up."""
    process = started(tmp_path / "out", 1.0, CHILD, start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM and error == ""
    assert list(tmp_path.iterdir()) == []


def test_what_nohup_ignores_stays_ignored(tmp_path):
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = started(tmp_path / "out", before=ignore)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM


def test_the_program_is_so_from_its_start(run_python):
    code = """
import signal
import icefall_kd.cli as cli
cli.cli = lambda prog_name: print(signal.getsignal(signal.SIGTERM).__module__)
cli.main()
"""
    done = run_python(code)
    assert done.stdout == "icefall_kd.cli.stops\n", done.stderr
