#!/usr/bin/env python3
"""
The table: parameters, WER of both heads with 95 % intervals, and RTF of every model.

Usage:
  ./local/make_table.py --bpe-model data/lang_bpe_54/bpe.model \
    --manifest data/fbank/cuts_test.jsonl.gz --output exp/summary.json \
    exp/teacher:4 exp/student:3 exp/student-kd:3

A folder whose only checkpoint is epoch-99.pt holds a released model, which is taken
as it is. RTF is the time that one core takes from features to words with the
transducer head, one utterance at a time, by the length of the audio: the median of
five rounds in which the models take turns.
"""

import argparse
import json
import re
import time
from pathlib import Path
from statistics import median
from typing import Any, Dict, List

import numpy as np
import torch
from lhotse import CutSet
from script_utils import check_range, run_script, staged_dir
from tqdm import tqdm

from icefall_kd import GreedySearch, KDError, load_checkpoint, load_model
from icefall_kd.report.bootstrap import Bootstrap
from icefall_kd.report.transcripts import Scores, read_scores
from icefall_kd.targets.cuts import ManifestCuts

RECIPE = Path(__file__).resolve().parent.parent / "zipformer"
HEADS = {"ctc_wer": "ctc-greedy-search", "transducer_wer": "greedy_search"}
NAMES = {"ctc_wer": "CTC", "transducer_wer": "transducer"}
ROUNDS = 5
LONGEST_BAR = 50  # characters


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("models", nargs="+", help="EXP_DIR:EPOCH, decoded before")
    parser.add_argument(
        "--avg",
        type=int,
        default=1,
        help="Epochs to average; fewer, if there are fewer",
    )
    parser.add_argument("--bpe-model", type=str, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--num-utterances", type=int, default=20, help="For the RTF")
    return parser.parse_args()


def is_released(exp_dir: Path, epoch: int) -> bool:
    """Whether ``epoch`` is a released model's, which is not averaged."""
    return epoch == 99 and not (exp_dir / "epoch-98.pt").is_file()


def read_errors(exp_dir: Path, method: str, name: str) -> Scores:
    """The errors of each utterance in ``exp_dir`` by ``method``, of ``name``'s file."""
    path = exp_dir / method / f"errs-test-{name}.txt"
    if not path.is_file():
        raise KDError(f"the result {path} does not exist, run the decoding stage")
    match = re.match(r"%WER (\d+\.?\d*)%", path.read_text("utf8", errors="replace"))
    if match is None:
        raise KDError(f"{path} does not begin with %WER, decode again")
    return read_scores(path.with_name(f"recogs-test-{name}.txt"), float(match.group(1)))


def add_intervals(rows: List[Dict[str, Any]], scores: Dict[str, List[Scores]]) -> None:
    """Add each head's WER and its interval to ``rows``, and the gain of the last.

    Args:
      rows: One for each model.
      scores: For each head the errors of the models, in the same order.
    """
    for head, results in scores.items():
        for result in results[1:]:
            if result.ids != results[0].ids:
                raise KDError(
                    f"{results[0].path} has {len(results[0].ids)} utterances and "
                    f"{result.path} others ({len(result.ids)}): decode both again"
                )
        bootstrap = Bootstrap(
            np.stack([r.errors for r in results], axis=1),
            np.stack([r.words for r in results], axis=1),
        )
        for i, row in enumerate(rows):
            interval = bootstrap.interval(i)
            row[head] = round(results[i].percent, 2)
            row[f"{head}_interval"] = [round(interval.low, 2), round(interval.high, 2)]
            if i > 1 and row["model"].endswith("-kd"):  # its twin comes before it
                gain = bootstrap.difference(i, i - 1)
                ends = gain.ratio_interval
                ratio = [gain.ratio, ends.low, ends.high, gain.p]
                if np.isfinite(ratio).all():  # the twin has errors
                    row[f"{head}_ratio"] = ratio


@torch.no_grad()
def one_round(
    model: torch.nn.Module, search: GreedySearch, features: List[torch.Tensor]
) -> float:
    """Return the seconds that ``model`` takes from ``features`` to words."""
    begin = time.perf_counter()
    for x in features:
        lens = torch.tensor([x.size(1)])
        out, out_lens = model.forward_encoder(x, lens)
        search(out, out_lens)
    return time.perf_counter() - begin


def measure_rtf(models: List[torch.nn.Module], cuts: CutSet) -> List[float]:
    """Return the real-time factor of each of ``models`` on ``cuts``."""
    torch.set_num_threads(1)
    features = [torch.from_numpy(c.load_features()).unsqueeze(0) for c in cuts]
    seconds = sum(c.duration for c in cuts)
    times: List[List[float]] = [[] for _ in models]
    searches = [GreedySearch(model) for model in models]
    for model, search in zip(models, searches):
        one_round(model, search, features[:2])
    for _ in tqdm(range(ROUNDS), desc="RTF on one core", unit=" rounds"):
        for model, search, durations in zip(models, searches, times):
            durations.append(one_round(model, search, features))
    return [median(durations) / seconds for durations in times]


def markdown(rows: List[Dict[str, Any]]) -> str:
    """Return ``rows`` as a table, and what distillation gave as sentences."""
    lines = [
        "| model | parameters | steps | WER % CTC | WER % transducer | RTF, one core |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        wers = []
        for head in HEADS:
            low, high = r[f"{head}_interval"]
            wers.append(f"{r[head]:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(
            f"| {r['model']} | {r['params']:,} | {r['steps']} | {' | '.join(wers)} | "
            f"{r['rtf']:.4f} |"
        )
    lines.append(
        "\nIn brackets are 95 % intervals, over the test utterances. RTF is the time "
        "of 20 utterances one by one with the transducer head, by their length."
    )
    for r in rows:
        for head, name in NAMES.items():
            if f"{head}_ratio" in r:
                ratio, low, high, p = r[f"{head}_ratio"]
                lines.append(
                    f"With distillation the WER of the {name} head is {ratio:.2f} "
                    f"[{low:.2f}, {high:.2f}] times that without, after {r['steps']} "
                    f"steps (p = {p:.2g})."
                )
    return "\n".join(lines) + "\n"


def bars(rows: List[Dict[str, Any]]) -> str:
    """Return the WERs of both heads as bars of one scale, for a terminal."""
    width = max(len(r["model"]) for r in rows)
    most = max(max(r[head] for head in HEADS for r in rows), 1e-9)
    lines = []
    for head, name in NAMES.items():
        lines.append(f"WER %, {name} head")
        for r in rows:
            bar = "█" * round(LONGEST_BAR * r[head] / most)
            lines.append(f"  {r['model']:<{width}}  {r[head]:6.2f}  {bar}".rstrip())
    return "\n".join(lines) + "\n"


def main() -> None:
    args = get_args()
    check_range(args.seed, 0, "--seed", 2**32 - 1)
    check_range(args.num_utterances, 1, "--num-utterances")
    check_range(args.avg, 1, "--avg")
    cuts = ManifestCuts(str(args.manifest)).cuts.subset(first=args.num_utterances)
    rows, models = [], []
    scores: Dict[str, List[Scores]] = {head: [] for head in HEADS}
    for name in args.models:
        exp_dir, _, epoch = name.rpartition(":")
        if not exp_dir or not re.fullmatch("[0-9]{1,6}", epoch):
            raise KDError(
                f"the model is {name!r} but must be EXP_DIR:EPOCH, such as "
                "exp/teacher:4"
            )
        exp_dir = Path(exp_dir)
        avg = max(min(args.avg, int(epoch) - 1), 1)
        suffix = f"epoch-{epoch}-avg-{avg}-use-averaged-model"
        averaged = not is_released(exp_dir, int(epoch))
        if not averaged:
            avg, suffix = 1, "epoch-99-avg-1"
        model, _ = load_model(
            RECIPE, exp_dir, int(epoch), avg=avg, use_averaged_model=averaged
        )
        last = load_checkpoint(exp_dir / f"epoch-{epoch}.pt")
        models.append(model)
        row: Dict[str, Any] = {
            "model": exp_dir.name,
            "params": sum(p.numel() for p in model.parameters()),
            "steps": last["batch_idx_train"],
            "seed": args.seed,
        }
        for head, method in HEADS.items():
            scores[head].append(read_errors(exp_dir, method, suffix))
        rows.append(row)
    add_intervals(rows, scores)
    for row, rtf in zip(rows, measure_rtf(models, cuts)):
        row["rtf"] = rtf
    texts = {
        args.output: json.dumps(rows, indent=2) + "\n",
        args.output.with_suffix(".md"): markdown(rows),
        args.output.with_suffix(".txt"): bars(rows),
    }
    with staged_dir(args.output.parent) as scratch:
        for path, text in texts.items():
            (scratch / path.name).write_text(text, "utf8")
            (scratch / path.name).replace(path)


if __name__ == "__main__":
    run_script(main)
