#!/usr/bin/env python3
"""
WERs of streaming students, and how late their CTC heads emit, beside their teacher.

Usage:
  ./local/streaming_table.py --work-dir work/fsdd --seeds "1 2 3" --variants "none d0"

A token's emission is the first frame where it is the CTC head's best symbol. The
emission delay is that of the student less that of the teacher, over the tokens that
both have at the same place of the aligned sequences. Results of a model are kept in
its folder, streaming.json.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median
from typing import Any, Dict, List, Tuple

import kaldialign
import numpy as np
import sentencepiece as spm
import torch
from lhotse import CutSet
from lhotse.dataset.collation import collate_features
from lhotse.dataset.sampling import SimpleCutSampler
from script_utils import run_script
from teacher_utils import RECIPE
from tqdm import tqdm

from icefall_kd import GreedySearch, KDError, ModelTap, load_model
from icefall_kd.report.bootstrap import Bootstrap

FRAME_MS = 40
GAP = "*"
BASE = "d0"  # the variant that the others are compared with
# Of each utterance: the tokens of the CTC head with the frames where they begin, and
# the words of both heads.
Utterance = Dict[str, Any]


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("work/fsdd"))
    add("--seeds", type=str, default="1 2 3")
    add("--variants", type=str, required=True)
    add("--teacher-epoch", type=int, default=10)
    add("--student-epoch", type=int, default=3)
    return parser.parse_args()


def emissions(ctc_logits: torch.Tensor, blank_id: int) -> List[Tuple[int, int]]:
    """Return the tokens of ``ctc_logits``, (T, V), with the frame where each begins.

    ``blank_id`` is no token.
    """
    symbols, counts = ctc_logits.argmax(-1).unique_consecutive(return_counts=True)
    frames = (counts.cumsum(0) - counts).tolist()
    return [(s, t) for s, t in zip(symbols.tolist(), frames) if s != blank_id]


@torch.no_grad()
def recognise(
    exp_dir: Path, epoch: int, bpe_model: Path, manifest: Path
) -> Dict[str, Utterance]:
    """Return the results of greedy search with both heads of a model.

    They are stored in the model's folder, and read from there the next time.

    Args:
      exp_dir: The model's experiment folder.
      epoch: Its checkpoint.
      bpe_model: The path of its tokenizer.
      manifest: The path of the cuts.
    """
    path = exp_dir / "streaming.json"
    if path.is_file():
        return json.loads(path.read_text("utf8"))
    if not (exp_dir / f"epoch-{epoch}.pt").is_file():
        raise KDError(f"{exp_dir} has no epoch-{epoch}.pt, let run_streaming.sh finish")
    model, settings = load_model(RECIPE, exp_dir, epoch, use_averaged_model=True)
    sp = spm.SentencePieceProcessor()
    sp.load(str(bpe_model))
    cuts = CutSet.from_file(manifest).to_eager()
    utterances: Dict[str, Utterance] = {}
    search = GreedySearch(model)
    bar = tqdm(total=len(cuts), desc=f"Decoding with {exp_dir.name}", unit=" cuts")
    with ModelTap(model) as tap, bar:
        for batch in SimpleCutSampler(cuts, max_duration=200.0, shuffle=False):
            out = tap.encode(*collate_features(batch))
            hyps = search(out.encoder_out, out.encoder_out_lens).hypotheses
            lens = out.encoder_out_lens.tolist()
            for cut, logits, n, hyp in zip(batch, out.ctc_logits, lens, hyps):
                tokens = emissions(logits[:n], settings["blank_id"])
                utterances[cut.id] = {
                    "reference": cut.supervisions[0].text.split(),
                    "tokens": tokens,
                    "ctc": sp.decode([s for s, _ in tokens]).split(),
                    "transducer": sp.decode(hyp.tokens).split(),
                }
            bar.update(len(batch))
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(utterances), "utf8")
    part.replace(path)
    return utterances


def errors(utterances: Dict[str, Utterance], head: str) -> np.ndarray:
    """Return a ``head``'s errors and the words of each of ``utterances``, (2, N)."""
    counts = [
        (
            kaldialign.edit_distance(u["reference"], u[head])["total"],
            len(u["reference"]),
        )
        for _, u in sorted(utterances.items())
    ]
    return np.array(counts).T


def bootstrap(*models: List[np.ndarray]) -> Bootstrap:
    """Resample the utterances of models, each given by the :func:`errors` of its seeds.

    The WER of a model is the mean of its seeds. A draw is the same for all of them.
    """
    wrong, words = np.stack([sum(counts) for counts in models], axis=2)
    return Bootstrap(wrong, words)


def delays(teacher: Dict[str, Utterance], student: Dict[str, Utterance]) -> List[float]:
    """Return the delay in ms of each token that ``student`` and ``teacher`` share."""
    late = []
    for cut_id, ours in student.items():
        teacher_tokens = teacher[cut_id]["tokens"]
        i = j = 0
        symbols = [[str(s) for s, _ in x] for x in (teacher_tokens, ours["tokens"])]
        for a, b in kaldialign.align(*symbols, GAP):
            if a == b:
                late.append(FRAME_MS * (ours["tokens"][j][1] - teacher_tokens[i][1]))
            i, j = i + (a != GAP), j + (b != GAP)
    return late


def cell(runs: List[Dict[str, Utterance]], head: str) -> str:
    """Return the mean WER of a ``head`` over ``runs``, its interval, and each run's."""
    counts = [errors(run, head) for run in runs]
    wers = [100 * wrong.sum() / words.sum() for wrong, words in counts]
    each = f" ({', '.join(f'{w:.2f}' for w in wers)})" if len(wers) > 1 else ""
    half = bootstrap(counts).interval(0).half_width
    return f"**{mean(wers):.2f}** ± {half:.1f}{each}"


def against(runs: List[Dict[str, Utterance]], base: List[Dict[str, Utterance]]) -> str:
    """Return how far the mean CTC WER of ``runs`` is from that of ``base``."""
    counts, base_counts = ([errors(run, "ctc") for run in x] for x in (runs, base))
    difference = bootstrap(counts, base_counts).difference(0, 1)
    return f"{difference.points:+.2f} ± {difference.interval.half_width:.1f}"


def main() -> None:
    args = get_args()
    base = args.work_dir / "seed-1"
    bpe_model = base / "data/lang_bpe_54/bpe.model"
    manifest = base / "data/fbank/cuts_test.jsonl.gz"
    common = (bpe_model, manifest)
    teacher = recognise(base / "exp/teacher", args.teacher_epoch, *common)
    print(
        f"| student | WER % CTC: mean ± 95 % (seeds) | to {BASE} | WER % transducer | "
        "emission delay, ms: mean (seeds) | median, ms |"
    )
    print("|---|---|---|---|---|")
    print(
        f"| teacher | {cell([teacher], 'ctc')} | {cell([teacher], 'transducer')} | | |"
    )
    runs = {}
    for variant in args.variants.split():
        folders = [
            args.work_dir / f"streaming/seed-{seed}/exp-{variant}"
            for seed in args.seeds.split()
        ]
        runs[variant] = [recognise(x, args.student_epoch, *common) for x in folders]
    for variant, variant_runs in runs.items():
        late = [delays(teacher, run) for run in variant_runs]
        means = [mean(x) for x in late]
        each = ", ".join(f"{x:.0f}" for x in means)
        compared = variant != BASE and BASE in runs
        print(
            f"| {variant} | {cell(variant_runs, 'ctc')} | "
            f"{against(variant_runs, runs[BASE]) if compared else ''} | "
            f"{cell(variant_runs, 'transducer')} | **{mean(means):.0f}** ({each}) | "
            f"{mean(median(x) for x in late):.0f} |"
        )


if __name__ == "__main__":
    run_script(main)
