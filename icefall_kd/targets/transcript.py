"""Where the transcript of a training cut comes from."""

from typing import Any

from lhotse.cut import Cut

PSEUDO_LABEL = "kd_label"  # the custom field of a supervision whose text a teacher gave
TRANSCRIBED, PSEUDO, UNTRANSCRIBED = ORIGINS = (
    "transcribed",
    "pseudo",
    "untranscribed",
)


def has_no_text(cut: Cut) -> bool:
    """Return whether a cut has no transcript.

    Args:
      cut: The cut.
    """
    return not any((s.text or "").strip() for s in cut.supervisions)


def origin_of(cut: Cut) -> str:
    """Return whether people transcribed a cut, a teacher did, or nobody.

    Args:
      cut: The cut.

    Returns:
      One of ``ORIGINS``.
    """
    if has_no_text(cut):
        return UNTRANSCRIBED
    labels: Any = ((s.custom or {}).get(PSEUDO_LABEL) for s in cut.supervisions)
    return PSEUDO if any(label is not None for label in labels) else TRANSCRIBED
