"""A cascade: the student answers, and where it is unsure the teacher does.

Both have decoded the same cuts. How sure a student is of an utterance is one number,
the confidence, by one of several measures; below a threshold the teacher is asked. Each
threshold has a word error rate and a cost, which together are the measure's curve.
"""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from icefall_kd.errors import require
from icefall_kd.report.transcripts import Scores, read_scores
from icefall_kd.transcripts.journal import read_journal

Utterance = Dict[str, Any]  # a journal's
_RATE = re.compile(r"%WER = (\d+\.\d+)")
NO_TOKENS = -100.0  # a log-probability below all others


class Point(NamedTuple):
    """What a threshold gives."""

    threshold: float  # the teacher is asked below it
    asked: int  # utterances that go to the teacher
    rate: float  # error rate, in percent
    cost: float  # of student and teacher; 1: that of the teacher for all utterances


@dataclass(frozen=True)
class Decoded:
    """A model's decoding of a set of cuts.

    Args:
      path: The journal.
      header: Its first line.
      utterances: What was found, by cut id.
      costs: Of each utterance, by cut id: seconds or multiply-adds.
    """

    path: Path
    header: Dict[str, Any]
    utterances: Dict[str, Utterance]
    costs: Dict[str, Dict[str, float]]

    @classmethod
    def read(cls, path: Path) -> "Decoded":
        """Read a journal of `icefall-kd decode`.

        Args:
          path: Its ``utterances-*.jsonl``.

        Raises:
          KDError: a file that can't be read, or is no journal.
        """
        header, *batches = read_journal(path)
        utterances: Dict[str, Utterance] = {}
        costs: Dict[str, Dict[str, float]] = {"seconds": {}, "multiply-adds": {}}
        for batch in batches:
            duration = math.fsum(u["duration"] for u in batch["utterances"])
            took = math.fsum(batch["seconds"].values())
            for utterance in batch["utterances"]:
                utterances[utterance["id"]] = utterance
                share = utterance["duration"] / duration if duration else 0.0
                costs["seconds"][utterance["id"]] = took * share
                if header.get("multiply_adds"):
                    products = header["multiply_adds"] * utterance["duration"]
                    costs["multiply-adds"][utterance["id"]] = products
        return cls(path, header, utterances, costs)

    def scores(self) -> Scores:
        """The errors of each transcribed utterance, by the files beside the journal.

        Raises:
          KDError: files that are not there or don't agree, or utterances that are
            missing from the journal.
        """
        stem = self.path.stem.replace("utterances-", "", 1)
        errs, recogs = (
            self.path.with_name(f"{kind}-{stem}.txt") for kind in ("errs", "recogs")
        )
        again = "give the same `icefall-kd decode` again, to its end"
        for path in (errs, recogs):
            require(
                path.is_file(), f"there is no {path} beside the utterances: {again}"
            )
        with open(errs, encoding="utf8") as f:
            rate = _RATE.match(f.readline())
        require(rate, f"{errs} begins without an error rate: {again}")
        scores = read_scores(recogs, float(rate[1]))
        require(
            set(scores.ids) <= set(self.utterances),
            f"{self.path} lacks utterances of {recogs}: {again}",
        )
        return scores


# How sure a student is of an utterance


def _mean_token(u: Utterance) -> float:
    log_probs = u["log_probs"]
    return sum(log_probs) / len(log_probs) if log_probs else NO_TOKENS


def _worst_token(u: Utterance) -> float:
    return min(u["log_probs"], default=NO_TOKENS)


def _mean_frame(u: Utterance) -> float:
    return u["ctc_log_prob"] if u["num_frames"] else NO_TOKENS


def _frames_of_all(u: Utterance) -> float:
    return u["ctc_log_prob"] * u["num_frames"] if u["num_frames"] else NO_TOKENS


def _heads(u: Utterance) -> float:
    import kaldialign

    both = ([str(t) for t in u[name]] for name in ("tokens", "ctc_tokens"))
    tokens, ctc_tokens = both
    longest = max(len(tokens), len(ctc_tokens), 1)
    differ = kaldialign.edit_distance(tokens, ctc_tokens)["total"]
    # Where they agree, which is often, the frames decide.
    return _mean_frame(u) - differ / longest


MEASURES: Dict[str, Tuple[str, Callable[[Utterance], float]]] = {
    "token": ("mean log-probability of a token", _mean_token),
    "worst-token": ("lowest log-probability of a token", _worst_token),
    "frame": ("mean log-probability of the CTC head's best at a frame", _mean_frame),
    "path": ("log-probability of the CTC head's best path", _frames_of_all),
    "heads": (
        "mean log-probability at a frame, less the share of tokens in which the two "
        "heads differ",
        _heads,
    ),
}


def measures_of(header: Dict[str, Any]) -> List[str]:
    """The measures that a decoding has what it takes for.

    Args:
      header: The journal's.
    """
    if not header["ctc"]:
        return ["token", "worst-token"]
    if header["method"]["name"] == "ctc-greedy-search":
        return ["token", "worst-token", "frame", "path"]
    return list(MEASURES)


def confidences(measure: str, utterances: Dict[str, Utterance]) -> Dict[str, float]:
    """How sure the student is of each utterance, by cut id.

    Args:
      measure: One of :data:`MEASURES`.
      utterances: The student's.
    """
    _, function = MEASURES[measure]
    return {cut_id: function(u) for cut_id, u in utterances.items()}


# Curves


@dataclass(frozen=True)
class Pair:
    """The same transcribed utterances, decoded by student and teacher.

    Args:
      confidence: By measure, of each utterance (N,).
      errors: The student's and the teacher's, (N,) each.
      words: Of the references, (N,).
      costs: By kind of cost, the student's and the teacher's, (N,) each.
    """

    confidence: Dict[str, List[float]]
    errors: Tuple[List[int], List[int]]
    words: List[int]
    costs: Dict[str, Tuple[List[float], List[float]]]

    @classmethod
    def of(cls, student: Decoded, teacher: Decoded) -> "Pair":
        """Put two decodings side by side.

        Args:
          student: The student's.
          teacher: The teacher's.

        Raises:
          KDError: decodings of other cuts, or without scores.
        """
        scores = [decoded.scores() for decoded in (student, teacher)]
        ids = scores[0].ids
        require(
            (ids, scores[0].references) == (scores[1].ids, scores[1].references),
            f"{scores[0].path} and {scores[1].path} have other utterances or "
            "references: decode the same cuts with both models, and the same --unit",
        )
        confidence = {}
        for measure in measures_of(student.header):
            values = confidences(measure, student.utterances)
            confidence[measure] = [values[i] for i in ids]
        costs = {
            kind: tuple([d.costs[kind][i] for i in ids] for d in (student, teacher))
            for kind in student.costs
            if all(set(ids) <= set(d.costs[kind]) for d in (student, teacher))
        }
        errors = tuple(of_model.errors.tolist() for of_model in scores)
        return cls(confidence, errors, scores[0].words.tolist(), costs)

    def curve(self, measure: str, kind: str) -> List[Point]:
        """The error rate and the cost of each threshold, the lowest first.

        Args:
          measure: One of :data:`MEASURES`.
          kind: Of cost, ``seconds`` or ``multiply-adds``.
        """
        values = self.confidence[measure]
        student, teacher = self.errors
        of_student, of_teacher = self.costs[kind]
        order = sorted(range(len(values)), key=lambda i: values[i])
        words, whole = sum(self.words), math.fsum(of_teacher)
        errors, cost = sum(student), math.fsum(of_student)
        points = [
            Point(values[order[0]], 0, 100 * errors / words, cost / whole),
        ]
        for asked, i in enumerate(order, 1):
            errors += teacher[i] - student[i]
            cost += of_teacher[i]
            above = values[order[asked]] if asked < len(order) else math.inf
            if above == values[i]:
                continue  # equal ones go together
            # Halfway to the next one, where other cuts are as likely on both sides.
            threshold = (values[i] + above) / 2 if above < math.inf else 1.0
            points.append(Point(threshold, asked, 100 * errors / words, cost / whole))
        return points


def mean_rate(points: Sequence[Point]) -> float:
    """The mean of a curve's error rate over its costs, by which measures are compared.

    Args:
      points: A curve.
    """
    area = sum(
        (b.cost - a.cost) * (a.rate + b.rate) / 2 for a, b in zip(points, points[1:])
    )
    return area / (points[-1].cost - points[0].cost) if len(points) > 1 else 0.0


def choose(
    points: Sequence[Point],
    max_rate: Optional[float] = None,
    max_cost: Optional[float] = None,
) -> Point:
    """The threshold for a wish.

    Args:
      points: A curve.
      max_rate: The highest error rate, in percent: the cheapest such point is chosen.
      max_cost: Without ``max_rate``, the highest cost: the point of the lowest rate is
        chosen.

    Raises:
      KDError: the curve has no such point.
    """
    if max_rate is not None:
        fit = [p for p in points if p.rate <= max_rate + 1e-9]
        require(
            fit,
            f"`max_rate` is {max_rate:g}, and the lowest error rate of the cascade is "
            f"{min(p.rate for p in points):.2f} %: give more",
        )
        return min(fit, key=lambda p: (p.cost, p.rate))
    fit = [p for p in points if p.cost <= max_cost + 1e-9]
    require(
        fit,
        f"`max_cost` is {max_cost:g}, and the student alone costs "
        f"{points[0].cost:.3f} of the teacher: give more",
    )
    return min(fit, key=lambda p: (p.rate, p.cost))


@dataclass(frozen=True)
class Cascade:
    """A threshold that was chosen, and for which two models.

    Args:
      measure: One of :data:`MEASURES`.
      threshold: The teacher is asked below it.
      student: Model and method of the student's decoding.
      teacher: Model and method of the teacher's.
    """

    measure: str
    threshold: float
    student: Dict[str, Any]
    teacher: Dict[str, Any]

    def as_dict(self) -> Dict[str, Any]:
        """As the file has it."""
        return asdict(self)

    def unsure(self, utterances: Dict[str, Utterance]) -> List[str]:
        """The ids of the cuts that go to the teacher.

        Args:
          utterances: The student's.
        """
        confidence_of = confidences(self.measure, utterances)
        return [
            cut_id for cut_id, value in confidence_of.items() if value < self.threshold
        ]


def identity(header: Dict[str, Any]) -> Dict[str, Any]:
    """What of a decoding a cascade depends on.

    Args:
      header: The journal's.
    """
    return {name: header[name] for name in ("model", "method")}
