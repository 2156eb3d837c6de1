"""Labels a manifest, stretch by stretch, and goes on where it was stopped.

The cuts of a stretch are labelled, and then their labels become a line of the job's
journal. At the end the cuts and the lines of all jobs are read side by side. So nothing
but a stretch is ever in memory.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Protocol,
    Tuple,
)

from lhotse.cut import Cut
from tqdm.auto import tqdm

from icefall_kd.errors import disk_errors, require
from icefall_kd.files import making_folder, replacing
from icefall_kd.labels.pseudo_label import PseudoLabel, check_can_carry, put
from icefall_kd.targets.batches import STRETCH, DumpBatch, batches_of, stretches
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.targets.manifest import open_manifest
from icefall_kd.transcripts.cuts import hash_of_manifest
from icefall_kd.transcripts.journal import Journal, whole_lines

VERSION = 1  # of the journal's lines


class LabelTeacher(Protocol):
    """What labels cuts: a recipe's model, or another program."""

    name: str
    settings: Dict[str, Any]  # what the labels depend on beside the name
    max_duration: float  # seconds in a batch, padding counted

    def problem(self, cut: Cut) -> str:
        """Why a cut can't be labelled, as the rest of a sentence; "" if it can.

        Args:
          cut: The next one of the manifest.
        """

    def __call__(
        self, plan: Iterable[DumpBatch]
    ) -> Iterator[Tuple[DumpBatch, List[PseudoLabel]]]:
        """Label the cuts of batches.

        Args:
          plan: The batches.

        Yields:
          Each batch with the labels of its cuts.
        """


@dataclass(frozen=True)
class Job:
    """One of several processes that share a manifest.

    Args:
      in_cuts: The manifest that is labelled.
      out_cuts: The manifest that all write together.
      number: That of this one, from 0 on.
      num_jobs: How many there are.
    """

    in_cuts: str
    out_cuts: Path
    number: int = 0
    num_jobs: int = 1

    def journal(self, number: int) -> Path:
        """The journal of a job.

        Args:
          number: The job's.
        """
        stem = self.out_cuts.name.split(".jsonl")[0]
        name = f"{stem}.labels-{number}-of-{self.num_jobs}.jsonl"
        return self.out_cuts.with_name(name)

    def header(self, teacher: LabelTeacher) -> Dict[str, Any]:
        """What the labels depend on.

        Args:
          teacher: What labels.
        """
        return {
            "labels": VERSION,
            "teacher": teacher.name,
            "settings": teacher.settings,
            "manifest": hash_of_manifest(self.in_cuts),
        }


class LabelPlan:
    """The batches of one job that are not labelled yet, in their order.

    Args:
      job: The job.
      max_duration: Seconds in a batch, padding counted.
      done: How many of the job's stretches are labelled.
    """

    def __init__(self, job: Job, max_duration: float, done: int) -> None:
        self.job, self.max_duration, self.done = job, max_duration, done

    def __iter__(self) -> Iterator[DumpBatch]:
        for i, stretch in enumerate(stretches(ManifestCuts(self.job.in_cuts), STRETCH)):
            turn, number = divmod(i, self.job.num_jobs)
            if number != self.job.number or turn < self.done:
                continue
            yield from batches_of(stretch, stretch, self.max_duration)


@dataclass
class Survey:
    """Counts of a manifest."""

    cuts: int = 0
    seconds: float = 0.0
    stretches: int = 0


def survey(path: str, teacher: LabelTeacher) -> Survey:
    """Check all cuts before the teacher starts.

    Args:
      path: The manifest.
      teacher: What will label them.

    Raises:
      KDError: a cut that can't be labelled, or that occurs twice near to itself.
    """
    counts = Survey()
    bar = tqdm(desc="Checking the cuts", unit=" cuts", delay=2, leave=False)
    with bar:
        for stretch in stretches(ManifestCuts(path), STRETCH):
            ids = set()
            for cut in stretch:
                require(
                    cut.id not in ids,
                    f"the cut id {cut.id} occurs twice in {path}: make cut ids unique",
                )
                ids.add(cut.id)
                problem = teacher.problem(cut)
                require(not problem, f"the cut {cut.id} of {path} {problem}")
                check_can_carry(cut)
            counts.cuts += len(stretch)
            counts.seconds += sum(cut.duration for cut in stretch)
            counts.stretches += 1
            bar.update(len(stretch))
    return counts


def label_cuts(
    job: Job,
    teacher: LabelTeacher,
    counts: Survey,
    overwrite: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Label the cuts of a job that its journal does not have yet.

    Args:
      job: The job.
      teacher: What labels.
      counts: Of the manifest.
      overwrite: Whether to label anew what is labelled already.
      begin: Called where nothing is left that would refuse the work.

    Raises:
      KDError: a journal of another teacher, manifest or other settings; what the
        teacher raises.
    """
    path, header = job.journal(job.number), job.header(teacher)
    if not overwrite:
        _check_same(path, header)
    is_new = not path.exists()
    with making_folder(path.parent):
        journal = Journal(
            path, header, overwrite, keep=False, remedy="give each job its own --job"
        )
        try:
            with journal:
                begin()
                _label(job, teacher, journal, counts)
        except BaseException:
            if is_new and not journal.num_batches:
                path.unlink()  # nothing that could be continued
            raise


def _label(job: Job, teacher: LabelTeacher, journal: Journal, counts: Survey) -> None:
    plan = LabelPlan(job, teacher.max_duration, journal.num_batches)
    by_id: Dict[str, PseudoLabel] = {}
    total = -(-counts.cuts // job.num_jobs)
    with tqdm(desc="Labelling", unit=" cuts", total=total) as bar:
        bar.update(journal.num_utterances)
        for batch, labels in teacher(plan):
            by_id.update((cut.id, label) for cut, label in zip(batch.cuts, labels))
            bar.update(len(batch.cuts))
            if batch.stretch is not None:
                lines = [{"id": c.id, **by_id[c.id].as_dict()} for c in batch.stretch]
                journal.append({"utterances": lines})
                by_id = {}


def _check_same(path: Path, header: Dict[str, Any]) -> None:
    """Refuse to lose labels that were made with other settings."""
    first = _header_of(path)
    require(
        first is None or first == header,
        f"{path} has labels of another teacher, manifest or other settings: name "
        "another OUT_CUTS, or give --overwrite to lose those",
    )


def _header_of(path: Path) -> Optional[Dict[str, Any]]:
    if not path.is_file():
        return None
    with open(path, "rb") as f:
        return next((value for value, _ in whole_lines(f)), None)


def are_done(job: Job, teacher: LabelTeacher, counts: Survey) -> bool:
    """Whether all jobs have labelled their cuts.

    Args:
      job: One of them.
      teacher: What labels.
      counts: Of the manifest.
    """
    header = job.header(teacher)
    for number in range(job.num_jobs):
        path = job.journal(number)
        if _header_of(path) != header:
            return False
        lines = sum(1 for _ in _lines_of(path))
        if lines < len(range(number, counts.stretches, job.num_jobs)):
            return False
    return True


def _lines_of(path: Path) -> Iterator[List[Dict[str, Any]]]:
    """The labels of each stretch in a journal."""
    with open(path, "rb") as f:
        lines = whole_lines(f)
        next(lines)
        for batch, _ in lines:
            yield batch["utterances"]


@dataclass
class Outcome:
    """What a labelling gave."""

    cuts: int = 0
    seconds: float = 0.0
    words: int = 0
    empty: int = 0  # cuts in which nothing was heard
    first_empty: str = ""  # the id of one


def write_manifest(job: Job, teacher: LabelTeacher) -> Outcome:
    """Write the manifest of all jobs.

    Args:
      job: One of them.
      teacher: What labelled.

    Raises:
      KDError: a disk that is full.
    """
    source = {"teacher": teacher.name, "settings": teacher.settings}
    outcome = Outcome()
    with ExitStack() as stack:
        stack.enter_context(disk_errors(job.out_cuts))
        # Jobs that end together may all write it.
        temporary = stack.enter_context(replacing(job.out_cuts, shared=True))
        out = stack.enter_context(open_manifest(temporary, "wb"))
        lines = [_lines_of(job.journal(number)) for number in range(job.num_jobs)]
        for i, stretch in enumerate(stretches(ManifestCuts(job.in_cuts), STRETCH)):
            for cut, line in zip(stretch, next(lines[i % job.num_jobs])):
                require(
                    cut.id == line.pop("id"),
                    f"{job.in_cuts} was changed while it was labelled: give the same "
                    "command again with --overwrite",
                )
                label = PseudoLabel(**line)
                values = put(cut, label, source).to_dict()
                out.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
                outcome.cuts += 1
                outcome.seconds += cut.duration
                outcome.words += len(label.text.split())
                if not label.text:
                    outcome.empty += 1
                    outcome.first_empty = outcome.first_empty or cut.id
    return outcome
