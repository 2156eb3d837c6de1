"""Intervals of models' error rates, and how sure their differences are."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from icefall_kd.errors import KDError, require
from icefall_kd.report.bootstrap import Bootstrap, Difference, Interval, sums_by_group
from icefall_kd.report.transcripts import Scores

Key = Tuple[str, str, str]  # kind of summary, decoding method, test set


@dataclass
class Statistics:
    """Intervals and differences of models on one test set.

    Args:
      words: The number of words, or characters, in the references of the test set.
      utterances: Its number of utterances.
      characters: Whether characters are scored.
      speakers: Its number of speakers if these are the units, else 0.
      intervals: Of the error rate of each model.
      differences: Of each model but the baseline, against the baseline.
    """

    words: int
    utterances: int
    characters: bool = False
    speakers: int = 0
    intervals: Dict[str, Interval] = field(default_factory=dict)
    differences: Dict[str, Difference] = field(default_factory=dict)


def measure(
    scores: Mapping[str, Sequence[Scores]],
    baseline: str = "",
    speakers: Optional[Mapping[str, str]] = None,
) -> Statistics:
    """Compute intervals and differences from the errors of each utterance.

    Args:
      scores: The scores of each seed by model, all of one test set.
      baseline: The model that the others are compared with; "" for none.
      speakers: The speaker of each cut id, to resample speakers instead of utterances.

    Raises:
      KDError: the utterances of two runs, or their references, differ; a cut has no
        speaker; there is only one speaker.
    """
    runs = [run for seeds in scores.values() for run in seeds]
    for other in runs[1:]:
        _need_same_utterances(runs[0], other)
    errors, words = (
        np.stack(
            [sum(getattr(run, name) for run in seeds) for seeds in scores.values()], 1
        )
        for name in ("errors", "words")
    )
    statistics = Statistics(
        int(runs[0].words.sum()), len(runs[0].ids), runs[0].characters
    )
    if speakers is not None:
        groups = _speakers_of(runs[0], speakers)
        statistics.speakers = len(set(groups))
        errors, words = (
            sums_by_group(values, np.array(groups)) for values in (errors, words)
        )
    bootstrap = Bootstrap(errors, words)
    columns = {name: i for i, name in enumerate(scores)}
    for name, column in columns.items():
        statistics.intervals[name] = bootstrap.interval(column)
        if baseline in columns and name != baseline:
            statistics.differences[name] = bootstrap.difference(
                column, columns[baseline]
            )
    return statistics


def need_interval(statistics: Mapping[Key, Statistics], wanted: float) -> None:
    """Refuse test sets that have too few words for the wanted interval.

    The width of an interval falls as the square root of the number of words.

    Args:
      statistics: Those of each result.
      wanted: The half width of each interval, in percentage points.

    Raises:
      KDError: an interval is wider; the widest one is named.
    """
    widest = max(
        (
            (interval.half_width, key, name)
            for key, result in statistics.items()
            for name, interval in result.intervals.items()
        ),
        default=(0.0, ("", "", ""), ""),
    )
    half_width, key, name = widest
    if half_width <= wanted:
        return
    result = statistics[key]
    times = (half_width / wanted) ** 2
    unit = "characters" if result.characters else "words"
    have, need = f"{result.words} {unit}", f"{math.ceil(result.words * times)} {unit}"
    if result.speakers:
        have += f" of {result.speakers} speakers"
        need += f" of {math.ceil(result.speakers * times)} speakers"
    # Rounded up, so that the offered value is accepted.
    offered = math.ceil(100 * half_width) / 100
    raise KDError(
        f"the test set {key[2]} has {have}, too few for `interval` {wanted:g}: the "
        f"95 % interval of {name!r} by {key[1]} is ±{half_width:.2f} percentage "
        f"points, and {need} are needed; test on more, or give `interval` "
        f"{offered:.2f}"
    )


def _need_same_utterances(one: Scores, other: Scores) -> None:
    """Refuse to compare runs whose utterances or references differ."""
    remedy = (
        "decode both with the same manifest, or remove one of these files for a "
        "report without its interval"
    )
    for has, lacks in ((one, other), (other, one)):
        only = sorted((Counter(has.ids) - Counter(lacks.ids)))
        if only:
            raise KDError(
                f"utterance {only[0]} is in {has.path} and not in {lacks.path}, and "
                f"only results of the same utterances can be compared: {remedy}"
            )
    for cut_id, *texts in zip(one.ids, one.references, other.references):
        require(
            texts[0] == texts[1],
            f"the references of utterance {cut_id} differ, {texts[0]!r} in {one.path} "
            f"and {texts[1]!r} in {other.path}: {remedy}",
        )


def _speakers_of(scores: Scores, speakers: Mapping[str, str]) -> List[str]:
    """The speaker of each utterance; there must be two speakers or more."""
    for cut_id in scores.ids:
        require(
            cut_id in speakers,
            f"`by_speaker` is given, and the manifest of the test set has no speaker "
            f"for the cut {cut_id} of {scores.path}: give the `manifest_dir` that was "
            "decoded, or leave `by_speaker` out",
        )
    names = [speakers[cut_id] for cut_id in scores.ids]
    require(
        len(set(names)) > 1,
        f"`by_speaker` is given, and {scores.path} has one speaker, {names[0]}, and "
        "an interval needs two or more: leave `by_speaker` out, and the interval is "
        "that of other utterances of this speaker",
    )
    return names
