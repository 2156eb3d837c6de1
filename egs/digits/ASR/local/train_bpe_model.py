#!/usr/bin/env python3
"""
Train a BPE model on the transcripts of a manifest.

Usage:
  ./local/train_bpe_model.py --lang-dir data/lang_bpe_54 --vocab-size 54

It writes bpe.model and tokens.txt into --lang-dir. As in icefall, <blk> is 0,
<sos/eos> is 1 and <unk> is 2.
"""

import argparse
import io
import logging
import re
from pathlib import Path
from typing import List

from script_utils import check_range, read_manifest, run_script, staged_dir

from icefall_kd import KDError


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--lang-dir",
        type=Path,
        default=Path("data/lang_bpe_54"),
        help="Where bpe.model and tokens.txt go",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=54,
        help="Number of tokens; the ten digit words allow 19 to 92",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        default=Path("data/manifests/cuts_train.jsonl.gz"),
        help="The cuts whose transcripts are used",
    )
    return parser.parse_args()


def read_transcripts(manifest: Path) -> List[str]:
    """Return the transcripts of the cuts of ``manifest``."""
    texts = [
        supervision["text"]
        for cut in read_manifest(manifest)
        for supervision in cut.get("supervisions", [])
        if supervision.get("text")
    ]
    if not texts:
        raise KDError(
            f"the manifest {manifest} has 0 transcripts, name one of transcribed cuts"
        )
    return texts


def train(texts: List[str], vocab_size: int) -> bytes:
    """Train on ``texts``; return a model of ``vocab_size`` tokens as bytes."""
    import sentencepiece as spm

    user_defined_symbols = ["<blk>", "<sos/eos>"]
    # Note: icefall fixes unk_id to 2.
    unk_id = len(user_defined_symbols)
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            input_sentence_size=100000000,
            character_coverage=1.0,
            user_defined_symbols=user_defined_symbols,
            unk_id=unk_id,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as e:
        limits = re.search(r"required_chars\. -?\d+ vs (\d+)|value <= (\d+)", str(e))
        if limits is None:
            raise KDError(
                f"sentencepiece refused --vocab-size {vocab_size} ({e})"
            ) from e
        smallest, largest = limits.groups()
        raise KDError(
            f"--vocab-size is {vocab_size} but the transcripts give "
            + (f"at least {smallest}" if smallest else f"at most {largest}")
            + f" tokens, give {smallest or largest}"
        ) from e
    return model.getvalue()


def main() -> None:
    args = get_args()
    check_range(args.vocab_size, 1, "--vocab-size")
    texts = read_transcripts(args.manifest)
    model = train(texts, args.vocab_size)

    import sentencepiece as spm

    sp = spm.SentencePieceProcessor(model_proto=model)
    with staged_dir(args.lang_dir) as scratch:
        (scratch / "bpe.model").write_bytes(model)
        with open(scratch / "tokens.txt", "w", encoding="utf-8") as f:
            for i in range(sp.get_piece_size()):
                f.write(f"{sp.id_to_piece(i)} {i}\n")
        (scratch / "tokens.txt").replace(args.lang_dir / "tokens.txt")
        (scratch / "bpe.model").replace(args.lang_dir / "bpe.model")
    logging.info(f"{sp.get_piece_size()} tokens in {args.lang_dir}")


if __name__ == "__main__":
    run_script(main)
