#!/usr/bin/env python3
"""
Check that a manifest with features is fit for training and decoding.

Usage:
  ./local/validate_manifest.py data/fbank/cuts_train.jsonl.gz \\
    --bpe-model data/lang_bpe_54/bpe.model
  ./local/validate_manifest.py --allow-untranscribed true \\
    data/fbank/cuts_train-untranscribed.jsonl.gz

Exit status 1 and one sentence name the first cut that is not fit:
  - an id that another cut has,
  - no supervision or more than one,
  - no text, unless --allow-untranscribed true,
  - no features,
  - a sampling rate other than --sampling-rate,
  - with --bpe-model: text with unknown tokens, or fewer frames after subsampling
    than tokens + 2.
"""

import argparse
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional, Set

from audio_utils import SAMPLING_RATE
from script_utils import read_manifest, run_script, str2bool

from icefall_kd import KDError, encoder_frames

SPARE_FRAMES = 2


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("manifest", type=Path, help="The manifest to check")
    parser.add_argument(
        "--bpe-model",
        type=Path,
        default=None,
        help="Check also that there are frames enough for the tokens of this model",
    )
    parser.add_argument(
        "--sampling-rate", type=int, default=SAMPLING_RATE, help="Hz of the audio"
    )
    parser.add_argument(
        "--allow-untranscribed",
        type=str2bool,
        default=False,
        help="Accept supervisions without text",
    )
    return parser.parse_args()


def load_bpe_model(path: Path) -> Any:
    """Return the sentencepiece model of ``path``."""
    import sentencepiece as spm

    if not path.is_file():
        raise KDError(
            f"--bpe-model {path} does not exist, run local/train_bpe_model.py or name "
            "another"
        )
    sp = spm.SentencePieceProcessor()
    try:
        sp.load(str(path))
    except RuntimeError as e:
        raise KDError(
            f"--bpe-model {path} is no sentencepiece model, run "
            "local/train_bpe_model.py to make it again"
        ) from e
    return sp


def check_supervision(cut: Any, allow_untranscribed: bool) -> None:
    """Refuse a ``cut`` without one supervision, or without text.

    ``allow_untranscribed`` accepts one without text.
    """
    if len(cut.supervisions) != 1:
        raise KDError(
            f"cut {cut.id} has {len(cut.supervisions)} supervisions where 1 is needed, "
            "correct or remove it"
        )
    if not (cut.supervisions[0].text or "").strip() and not allow_untranscribed:
        raise KDError(
            f"cut {cut.id} has the text {cut.supervisions[0].text!r} where a "
            "transcript is needed, remove it or give --allow-untranscribed true"
        )


def check_features(cut: Any, rate: int) -> None:
    """Refuse a ``cut`` without features, or not of ``rate`` Hz."""
    if not cut.has_features:
        raise KDError(
            f"cut {cut.id} has no features where they are needed, run "
            "local/compute_fbank.py"
        )
    if cut.sampling_rate != rate:
        raise KDError(
            f"cut {cut.id} has {cut.sampling_rate} Hz where {rate} Hz are "
            "needed, resample it and compute its features again"
        )


def check_tokens(cut: Any, sp: Any) -> None:
    """Refuse a ``cut`` with more tokens of ``sp`` than its frames can hold."""
    text = cut.supervisions[0].text
    tokens = sp.encode(text)
    if sp.unk_id() in tokens:
        raise KDError(
            f"cut {cut.id} has the text {text!r}, for which the BPE model has no "
            "tokens but <unk>, train the model on these transcripts"
        )
    num_frames = encoder_frames(cut.num_frames)
    if num_frames < len(tokens) + SPARE_FRAMES:
        raise KDError(
            f"cut {cut.id} has {num_frames} frames after subsampling where its "
            f"{len(tokens)} tokens need {len(tokens) + SPARE_FRAMES}, remove it or "
            "train a BPE model of a larger vocabulary"
        )


def main() -> None:
    args = get_args()
    items = read_manifest(args.manifest)
    sp: Optional[Any] = None
    if args.bpe_model is not None:
        sp = load_bpe_model(args.bpe_model)

    from lhotse.serialization import deserialize_item

    ids: Set[str] = set()
    seconds = 0.0
    for number, item in enumerate(items, start=1):
        try:
            cut = deserialize_item(deepcopy(item))
            _ = (cut.supervisions, cut.has_features, cut.sampling_rate)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise KDError(
                f"line {number} of {args.manifest} is not a cut of Lhotse, make the "
                "manifest again"
            ) from e
        if cut.id in ids:
            raise KDError(
                f"cut {cut.id} is there twice in {args.manifest}, give each an id of "
                "its own"
            )
        ids.add(cut.id)
        check_supervision(cut, args.allow_untranscribed)
        check_features(cut, args.sampling_rate)
        if sp is not None and cut.supervisions[0].text:
            check_tokens(cut, sp)
        seconds += cut.duration
    logging.info(f"{args.manifest}: {len(ids)} cuts, {seconds / 3600:.2f} hours, fit")


if __name__ == "__main__":
    run_script(main)
