"""The student's answers in a cascade, and the cuts that it leaves to the teacher."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List

from icefall_kd.errors import require
from icefall_kd.transcripts.cascade import MEASURES, Cascade, Utterance, identity
from icefall_kd.transcripts.journal import read_journal


@dataclass(frozen=True)
class FirstAnswers:
    """The student's answers to all cuts, and which of them go to the teacher.

    Args:
      cascade: The threshold.
      batches: The student's, of its journal.
      utterances: What it found, by cut id.
      asked: The ids of the cuts that go to the teacher, in the manifest's order.
    """

    cascade: Cascade
    batches: List[Dict[str, Any]]
    utterances: Dict[str, Utterance]
    asked: List[str]

    @classmethod
    def read(
        cls, path: Path, answers: Path, header: Dict[str, Any], ids: Iterable[str]
    ) -> "FirstAnswers":
        """Read a threshold and the student's answers.

        Args:
          path: The ``cascade.json``.
          answers: The student's ``utterances-*.jsonl``.
          header: That of the teacher's decoding.
          ids: Those of all cuts.

        Raises:
          KDError: files that can't be read, or models, searches or cuts that are not
            those of the cascade.
        """
        cascade = read_cascade(path)
        of_student, *batches = read_journal(answers)
        same = "`icefall-kd cascade` chooses for two models with their searches"
        require(
            identity(header) == cascade.teacher,
            f"{path} is for another teacher or another search than this one: give "
            f"those that it was chosen for, as {same}",
        )
        require(
            identity(of_student) == cascade.student,
            f"{answers} is of another student or another search than {path} is for: "
            f"decode the cuts with those that it was chosen for, as {same}",
        )
        utterances = {u["id"]: u for batch in batches for u in batch["utterances"]}
        order = list(ids)
        missing = [cut_id for cut_id in order if cut_id not in utterances]
        require(
            of_student["manifest"] == header["manifest"] and not missing,
            f"{answers} is of another manifest or lacks cuts of this one: decode the "
            "manifest with the student first, to its end",
        )
        unsure = set(cascade.unsure(utterances))
        asked = [cut_id for cut_id in order if cut_id in unsure]
        return cls(cascade, batches, utterances, asked)


def read_cascade(path: Path) -> Cascade:
    """Read a threshold.

    Args:
      path: The ``cascade.json`` of `icefall-kd cascade`.

    Raises:
      KDError: a file that can't be read, or another one.
    """
    names = ("measure", "threshold", "student", "teacher")
    try:
        values = json.loads(path.read_text("utf8"))
        cascade = Cascade(*(values[name] for name in names))
        known = cascade.measure in MEASURES
        known = known and isinstance(cascade.threshold, (int, float))
    except (OSError, ValueError, LookupError, TypeError):
        known = False
    require(
        known,
        f"{path} is no threshold: give the cascade.json of `icefall-kd cascade`",
    )
    return cascade
