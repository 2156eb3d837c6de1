"""Transcribed cuts by which a student is measured before it is trained."""

from itertools import islice
from typing import Any, Dict, List

from lhotse.cut import Cut

from icefall_kd.errors import require
from icefall_kd.memory import enough_memory
from icefall_kd.student.importance import FeatureBatch
from icefall_kd.targets.batches import read_features
from icefall_kd.targets.cuts import Survey, checked
from icefall_kd.targets.model_input import check_supervision, why_unusable
from icefall_kd.targets.transcript_checks import labels_of, why_long

BATCH = 8  # cuts that a model runs on at once


def read_batches(
    path: str, num_cuts: int, settings: Dict[str, Any], tokenizer: Any
) -> List[FeatureBatch]:
    """Read transcribed cuts, to measure a student by.

    Args:
      path: Their manifest.
      num_cuts: How many, from the first on.
      settings: The teacher's.
      tokenizer: The teacher's.

    Returns:
      For each batch its features, lengths and labels.

    Raises:
      KDError: cuts that can't be used.
    """
    require(num_cuts >= 1, f"`num_cuts` is {num_cuts}, and must be 1 or more")
    use = "the measure of a student"

    def labels(cuts: List[Cut]) -> List[List[int]]:
        return labels_of(cuts, tokenizer, use, "label it first")

    def why_not(cut: Cut) -> str:
        reason = why_unusable(cut)
        if reason:
            return reason
        check_supervision(cut)
        return why_long(cut, labels([cut])[0], use)

    survey = Survey(path, why_not=why_not)
    num_features = int(settings["feature_dim"])
    cuts = list(islice(checked(survey, num_features, light=False), num_cuts))
    survey.check()
    survey.warn()
    batches = []
    work = f"reading the features of {len(cuts)} cuts"
    with enough_memory(work, "lower `num_cuts`"):
        for i in range(0, len(cuts), BATCH):
            batch = cuts[i : i + BATCH]
            batches.append((*read_features(batch), labels(batch)))
    return batches
