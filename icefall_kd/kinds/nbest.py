"""A teacher's n-best list on a cut: text, which fits students of any tokens.

A plain dictionary in the cut's custom fields, so that the manifest loads with Lhotse
alone::

    "kd_nbest": {
        "hypotheses": [{"text": "SIX ONE", "score": -0.2}, ...],
        "start": 0.0, "duration": 1.9, "source": 1.9
    }

Scores are log-probabilities in nats; the other three, in seconds, are the cut's when it
was decoded, as in :class:`icefall_kd.targets.store.Pointer`.
"""

import math
from typing import Any, List, Sequence, Tuple

from lhotse.cut import Cut, MonoCut
from lhotse.utils import fastcopy

from icefall_kd.errors import KDError
from icefall_kd.targets.store import SLACK, source_duration

FIELD = "kd_nbest"


def write_nbest(cut: MonoCut, hypotheses: Sequence[Tuple[str, float]]) -> MonoCut:
    """Return a copy of ``cut`` that carries an n-best list.

    Args:
      cut: The cut that was decoded.
      hypotheses: Text and log-probability in nats; an empty list is legal.

    Raises:
      KDError: another kind of cut, or a bad text or score.
    """
    if not isinstance(cut, MonoCut):
        raise KDError(
            f"the cut {cut.id} is a {type(cut).__name__}, and n-best lists are kept on "
            "MonoCuts: decode before mixing, padding or appending"
        )
    value = {
        "hypotheses": [{"text": x, "score": score} for x, score in hypotheses],
        "start": cut.start,
        "duration": cut.duration,
        "source": source_duration(cut),
    }
    checked = _hypotheses(cut, value)
    value["hypotheses"] = [{"text": text, "score": score} for text, score in checked]
    return fastcopy(cut, custom={**(cut.custom or {}), FIELD: value})


def read_nbest(cut: Cut) -> List[Tuple[str, float]]:
    """Return the n-best list of a cut: text and log-probability in nats.

    It is empty where none fits: the cut carries none, it is no longer the whole of what
    was decoded, or it mixes several cuts with speech. A changed speed or tempo, which
    moves no word, leaves the list.

    Args:
      cut: The cut.

    Raises:
      KDError: a field that is damaged.
    """
    tracks = getattr(cut, "tracks", None)
    inner = [track.cut for track in tracks] if tracks else [cut]
    with_speech = [c for c in inner if c.supervisions or FIELD in (c.custom or {})]
    if len(with_speech) != 1:
        return []
    value = (with_speech[0].custom or {}).get(FIELD)
    if value is None:
        return []
    hypotheses = _hypotheses(with_speech[0], value)
    return hypotheses if _whole(with_speech[0], value) else []


def _whole(cut: MonoCut, value: Any) -> bool:
    """Whether ``cut`` spans what was decoded, up to a change of speed."""
    try:
        start, duration, source = (value[k] for k in ("start", "duration", "source"))
        now = source_duration(cut)
        scale = now / source if now and source else 1.0
        change = (cut.start - scale * start, cut.duration - scale * duration)
    except (KeyError, TypeError):
        raise _damaged(cut, "lacks a start, duration or source in seconds") from None
    return max(map(abs, change)) <= SLACK


def _hypotheses(cut: MonoCut, value: Any) -> List[Tuple[str, float]]:
    items = value.get("hypotheses") if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise _damaged(cut, "has no list of hypotheses")
    hypotheses = []
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise _damaged(cut, f"has a hypothesis without a text, {item!r}")
        try:
            score = float(item["score"])
        except (KeyError, TypeError, ValueError):
            raise _damaged(cut, f"has no score of {item['text']!r}") from None
        if not math.isfinite(score):
            raise _damaged(cut, f"has the score {score} of {item['text']!r}")
        hypotheses.append((item["text"], score))
    return hypotheses


def _damaged(cut: MonoCut, fault: str) -> KDError:
    return KDError(
        f"the n-best list ({FIELD}) of cut {cut.id} {fault}, and must give each "
        "hypothesis a text and a finite log-probability: write it with write_nbest()"
    )
