#!/usr/bin/env python3
"""
Stop each command at many moments, give it again, and compare what it leaves with what
an undisturbed run leaves: files, parameters, targets, tables, and no half-written file.

A command runs in a session of its own. It is stopped by Ctrl-C, `kill`, a closed
terminal or `kill -9`, the program alone or with all that it started, where its output
has reached a share of the whole or at a random time. Afterwards none of its processes
may be left, except those of a script that was killed by -9 itself.

Usage, about an hour for all; kd.sh, with stand-ins for icefall, takes five minutes:

  tests/egs/stop_and_go_on.py --work-dir DIR --json stops.json
  tests/egs/stop_and_go_on.py --work-dir DIR --only kd.sh dump
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stop_scenarios import Scenario, scenarios, tree  # noqa: E402

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL")
PATIENCE = 600.0  # seconds for any one run
END = 120.0  # seconds that a stopped command's processes may take to end


@dataclass
class Moment:
    """When and whom a signal reaches."""

    signal: str
    whole_session: bool
    output: Optional[float] = None  # share of an undisturbed run's bytes
    time: Optional[float] = None  # share of its seconds


@dataclass
class Stop:
    """What came of one stop."""

    scenario: str
    moment: Moment
    stopped: bool  # False: it had ended before
    status: int
    again: int = 0  # status of the second run
    seconds: float = 0.0
    left: List[str] = field(default_factory=list)  # processes
    differs: List[str] = field(default_factory=list)  # files
    twice: List[str] = field(default_factory=list)  # work that was done twice

    @property
    def good(self) -> bool:
        return not (self.again or self.left or self.differs or self.twice)


def processes_of(session: int) -> List[str]:
    """The commands of a session's processes that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                words = (stat.parent / "cmdline").read_bytes().split(b"\0")
                found.append(b" ".join(words).decode(errors="replace")[:200].strip())
        except OSError:
            continue  # it ended meanwhile
    return found


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class Run:
    """A command in a session of its own, whose output goes to a file."""

    def __init__(self, scenario: Scenario, folder: Path, log: Path) -> None:
        self.log = log
        self.begun = time.monotonic()
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                scenario.command(folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **scenario.env(folder)},
                cwd=scenario.cwd,
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return -99

    def stop(self, moment: Moment, seconds: float, size: int) -> bool:
        """Wait for the moment and send the signal; False if the command had ended."""

        def reached() -> bool:
            if moment.output is not None:
                return self.log.stat().st_size >= moment.output * size
            return time.monotonic() - self.begun >= moment.time * seconds

        if not wait_until(lambda: reached() or self.ended(), PATIENCE) or self.ended():
            return False
        number = getattr(signal, moment.signal)
        if moment.whole_session:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return True


def undisturbed(scenario: Scenario, work: Path) -> Tuple[Dict[str, str], float, int]:
    """What a run leaves, its seconds and the bytes of its output."""
    folder, log = work / "undisturbed", work / "undisturbed.log"
    for path in (folder, log):
        _remove(path)
    scenario.prepare(folder)
    run = Run(scenario, folder, log)
    if run.finish():
        raise SystemExit(f"{scenario.name} fails undisturbed: see {log}")
    return tree(folder), time.monotonic() - run.begun, log.stat().st_size


def stop_once(
    scenario: Scenario,
    work: Path,
    moment: Moment,
    whole: Tuple[Dict[str, str], float, int],
) -> Stop:
    """One run that is stopped at ``moment``, and the same command again."""
    folder, log = work / "stopped", work / "stopped.log"
    for path in (folder, log):
        _remove(path)
    scenario.prepare(folder)
    expected, seconds, size = whole
    run = Run(scenario, folder, log)
    stopped = run.stop(moment, seconds, size)
    found = Stop(scenario.name, moment, stopped, run.finish())
    session = run.process.pid
    orphans = moment.signal == "SIGKILL" and not moment.whole_session
    if not orphans and not wait_until(lambda: not processes_of(session), END):
        found.left = processes_of(session)
    begun = time.monotonic()
    found.again = Run(scenario, folder, log).finish()
    found.seconds = time.monotonic() - begun
    wait_until(lambda: not processes_of(session), 60)
    after = tree(folder)
    found.differs = sorted(
        name for name in {*expected, *after} if expected.get(name) != after.get(name)
    )
    found.twice = scenario.done_twice(folder, log.read_text(errors="replace"))
    return found


def moments(number: int, seed: int, signals=SIGNALS) -> List[Moment]:
    """So many of each signal: by output and by time, to one process and to all."""
    draw = random.Random(seed)
    found = []
    for name in signals:
        for i in range(number):
            moment = Moment(name, whole_session=i % 4 < 2)
            if i % 2:
                moment.time = round(draw.random(), 3)
            else:
                moment.output = round((i + draw.random()) / number, 3)
            found.append(moment)
    return found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def try_scenario(scenario: Scenario, work: Path, number: int, seed: int) -> List[Stop]:
    work.mkdir(parents=True, exist_ok=True)
    whole = undisturbed(scenario, work)
    print(f"{scenario.name}: {whole[1]:.0f} s, {len(whole[0])} files", flush=True)
    stops = []
    for moment in moments(number, seed):
        stops.append(stop_once(scenario, work, moment, whole))
        if not stops[-1].good:
            keep = work / f"failed-{len(stops)}"
            _remove(keep)
            shutil.copytree(work / "stopped", keep, symlinks=True)
            shutil.copy(work / "stopped.log", keep.with_suffix(".log"))
            print(json.dumps(asdict(stops[-1])), flush=True)
    for name in SIGNALS:
        mine = [s for s in stops if s.moment.signal == name]
        counts = Counter(s.good for s in mine)
        ran = sum(s.stopped for s in mine)
        print(f"  {name}: {ran} of {len(mine)} stopped it, {counts[True]} good")
    return stops


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, help="Everything goes here.")
    add("--only", nargs="+", default=[], help="Of the commands, by name.")
    add("--stops", type=int, default=10, help="Of each signal.")
    add("--seed", type=int, default=13)
    add("--json", type=Path, help="Write what came of each stop to this file.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    # In the background of a script Ctrl-C is ignored, and by all that is started there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = args.work_dir.resolve()
    stops: List[Stop] = []
    for scenario in scenarios(work / "base", args.only):
        name = scenario.name.replace(" ", "-")
        stops += try_scenario(scenario, work / name, args.stops, args.seed)
        if args.json:
            rows = [{**asdict(s), "good": s.good} for s in stops]
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    bad = [s for s in stops if not s.good]
    print(f"{len(stops)} stops, {len(bad)} of them not good")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
