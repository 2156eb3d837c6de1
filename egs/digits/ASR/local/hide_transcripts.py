#!/usr/bin/env python3
"""
Split training cuts as if most speakers had no transcripts: four of five voices lose
theirs, and the fifth keeps them.

Usage:
  ./local/hide_transcripts.py --manifest data/fbank/cuts_train.jsonl.gz

It writes, beside the manifest,
  cuts_train-transcribed.jsonl.gz
  cuts_train-untranscribed.jsonl.gz
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List

from script_utils import read_manifest, run_script, staged_dir, write_manifest

from icefall_kd import KDError

SHARE = 5  # one voice in so many keeps its transcripts


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--manifest", type=Path, required=True)
    return parser.parse_args()


def voice_of(cut: Dict[str, Any]) -> str:
    """The voice of a cut: eSpeak NG's speakers are ACCENT_VOICE."""
    return cut["supervisions"][0]["speaker"].partition("_")[2]


def main() -> None:
    args = get_args()
    if not args.manifest.is_file():
        raise KDError(f"the manifest {args.manifest} does not exist, run stage 2")
    cuts = read_manifest(args.manifest)
    voices = sorted({voice_of(cut) for cut in cuts})
    if len(voices) < 2:
        raise KDError(
            f"{args.manifest} has {len(voices)} voice and must have at least 2: give a "
            "larger --num-train"
        )
    kept = set(voices[::SHARE])
    transcribed: List[Dict[str, Any]] = []
    untranscribed: List[Dict[str, Any]] = []
    for cut in cuts:
        if voice_of(cut) in kept:
            transcribed.append(cut)
        else:
            del cut["supervisions"][0]["text"]
            untranscribed.append(cut)
    stem = args.manifest.name.split(".")[0]
    with staged_dir(args.manifest.parent) as scratch:
        for kind, part in (
            ("transcribed", transcribed),
            ("untranscribed", untranscribed),
        ):
            path = scratch / f"{stem}-{kind}.jsonl.gz"
            write_manifest(path, part)
            path.replace(args.manifest.parent / path.name)
    print(
        f"{len(transcribed)} utterances of {len(kept)} voices keep their transcripts, "
        f"{len(untranscribed)} of {len(voices) - len(kept)} lose them"
    )


if __name__ == "__main__":
    run_script(main)
