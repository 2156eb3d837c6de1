"""A transcript that a teacher gave to a cut, and how the cut carries it.

It is the text of the cut's supervision, as any transcript. The supervision's custom
field ``kd_label`` says where it comes from::

    "kd_label": {
        "teacher": "command", "settings": {"command": "asr {wavs} {out}"},
        "said": "Seven, one.", "scores": {"score": -0.2}, "original": "SEVEN ONE"
    }

``said`` is what the teacher said, ``original`` the text before it, or None. If a
transducer's model has a CTC head too, ``ctc_text`` is what that heard. An n-best list
is in the cut's field ``kd_nbest`` (:mod:`icefall_kd.kinds.nbest`). Both are plain
dictionaries, so that the manifest loads with Lhotse alone.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from lhotse import SupervisionSegment
from lhotse.cut import Cut, MonoCut
from lhotse.utils import fastcopy

from icefall_kd.errors import require
from icefall_kd.kinds.nbest import write_nbest
from icefall_kd.targets.model_input import check_supervision
from icefall_kd.targets.transcript import PSEUDO_LABEL as FIELD


@dataclass(frozen=True)
class PseudoLabel:
    """What a teacher said of a cut.

    Args:
      text: The transcript; "" where it heard nothing.
      scores: How sure it is, by the name of the measure; more is surer.
      ctc_text: What the CTC head of a transducer's model heard.
      nbest: Texts with their log-probabilities in nats, the best first.
    """

    text: str
    scores: Dict[str, float] = field(default_factory=dict)
    ctc_text: Optional[str] = None
    nbest: List[Tuple[str, float]] = field(default_factory=list)

    def as_dict(self) -> Dict[str, Any]:
        """As a journal has it, without what is empty."""
        return {k: v for k, v in asdict(self).items() if v not in (None, {}, [])}


def check_can_carry(cut: Cut) -> None:
    """Refuse a cut that can't carry a label.

    Args:
      cut: The cut. One without a supervision gets one.

    Raises:
      KDError: several supervisions or one beyond the cut; a mixed cut without one.
    """
    if cut.supervisions:
        check_supervision(cut)
    else:
        require(
            isinstance(cut, MonoCut),
            f"the cut {cut.id} is a {type(cut).__name__} without a supervision, and a "
            "label needs one: label its parts before mixing, padding or appending",
        )


def put(cut: Cut, label: PseudoLabel, source: Dict[str, Any]) -> Cut:
    """Return a copy of a cut that carries a label.

    Args:
      cut: The cut. If it has a label already, the original text is that label's.
      label: What the teacher said.
      source: ``teacher`` and ``settings``.

    Raises:
      KDError: an n-best list for what is no MonoCut.
    """
    if not cut.supervisions:
        segment = SupervisionSegment(
            cut.id, cut.recording_id if cut.has_recording else cut.id, 0.0, cut.duration
        )
        cut = fastcopy(cut, supervisions=[segment])
    (supervision,) = cut.supervisions
    former = (supervision.custom or {}).get(FIELD)
    value = {**source, "said": label.text, "scores": label.scores}
    value["original"] = supervision.text
    if isinstance(former, dict):
        value["original"] = former.get("original")
    if label.ctc_text is not None:
        value["ctc_text"] = label.ctc_text
    cut = replaced(cut, label.text, value)
    return write_nbest(cut, label.nbest) if label.nbest else cut


def replaced(cut: Cut, text: str, value: Dict[str, Any]) -> Cut:
    """Return a copy of a cut with another text and another field ``kd_label``.

    Args:
      cut: A cut of one supervision.
      text: The text.
      value: The field.
    """
    return cut.map_supervisions(
        lambda s: fastcopy(s, text=text, custom={**(s.custom or {}), FIELD: value})
    )


def read(cut: Cut) -> Dict[str, Any]:
    """The field ``kd_label`` of a cut.

    Args:
      cut: The cut.

    Raises:
      KDError: a cut without one, or one that is damaged.
    """
    value = None
    if len(cut.supervisions) == 1:
        value = (cut.supervisions[0].custom or {}).get(FIELD)
    require(
        isinstance(value, dict)
        and isinstance(value.get("said"), str)
        and isinstance(value.get("scores"), dict)
        and isinstance(value.get("original") or "", str)
        and isinstance(value.get("ctc_text") or "", str),
        f"the cut {cut.id} has no pseudo-label ({FIELD} of its supervision): give a "
        "manifest of `icefall-kd label`",
    )
    return value
