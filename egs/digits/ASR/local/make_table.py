#!/usr/bin/env python3
"""
The table: parameters, WER of both heads and RTF of every model.

Usage:
  ./local/make_table.py --bpe-model data/lang_bpe_54/bpe.model \
    --manifest data/fbank/cuts_test.jsonl.gz --output exp/summary.json \
    exp/teacher:4 exp/student:3 exp/student-kd:3

RTF is the time that one core takes from features to words with the transducer head,
one utterance at a time, by the length of the audio: the median of five rounds in
which the models take turns.
"""

import argparse
import json
import re
import time
from pathlib import Path
from statistics import median
from typing import Any, Dict, List

import torch
from lhotse import CutSet
from script_utils import check_range, run_script, staged_dir
from tqdm import tqdm

from icefall_kd import GreedySearch, KDError, load_checkpoint, load_model
from icefall_kd.targets.cuts import ManifestCuts

RECIPE = Path(__file__).resolve().parent.parent / "zipformer"
HEADS = {"ctc_wer": "ctc-greedy-search", "transducer_wer": "greedy_search"}
ROUNDS = 5


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


def read_wer(exp_dir: Path, method: str, epoch: int, avg: int) -> float:
    """Return the WER in ``exp_dir`` by ``method``, of ``epoch`` and ``avg``."""
    name = f"errs-test-epoch-{epoch}-avg-{avg}-use-averaged-model.txt"
    path = exp_dir / method / name
    if not path.is_file():
        raise KDError(f"the result {path} does not exist, run the decoding stage")
    match = re.match(r"%WER (\d+\.?\d*)%", path.read_text("utf8", errors="replace"))
    if match is None:
        raise KDError(f"{path} does not begin with %WER, decode again")
    return float(match.group(1))


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
    """Return ``rows`` as a table."""
    lines = [
        "| model | parameters | steps | WER % CTC | WER % transducer | RTF, one core |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['params']:,} | {r['steps']} | {r['ctc_wer']:.2f} | "
            f"{r['transducer_wer']:.2f} | {r['rtf']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    args = get_args()
    check_range(args.seed, 0, "--seed", 2**32 - 1)
    check_range(args.num_utterances, 1, "--num-utterances")
    check_range(args.avg, 1, "--avg")
    cuts = ManifestCuts(str(args.manifest)).cuts.subset(first=args.num_utterances)
    rows, models = [], []
    for name in args.models:
        exp_dir, _, epoch = name.rpartition(":")
        if not exp_dir or not re.fullmatch("[0-9]{1,6}", epoch):
            raise KDError(
                f"the model is {name!r} but must be EXP_DIR:EPOCH, such as "
                "exp/teacher:4"
            )
        exp_dir = Path(exp_dir)
        avg = max(min(args.avg, int(epoch) - 1), 1)
        model, _ = load_model(
            RECIPE, exp_dir, int(epoch), avg=avg, use_averaged_model=True
        )
        last = load_checkpoint(exp_dir / f"epoch-{epoch}.pt")
        models.append(model)
        row = {
            "model": exp_dir.name,
            "params": sum(p.numel() for p in model.parameters()),
            "steps": last["batch_idx_train"],
            "seed": args.seed,
        }
        for head, method in HEADS.items():
            row[head] = read_wer(exp_dir, method, int(epoch), avg)
        rows.append(row)
    for row, rtf in zip(rows, measure_rtf(models, cuts)):
        row["rtf"] = rtf
    texts = {
        args.output: json.dumps(rows, indent=2) + "\n",
        args.output.with_suffix(".md"): markdown(rows),
    }
    with staged_dir(args.output.parent) as scratch:
        for path, text in texts.items():
            (scratch / path.name).write_text(text, "utf8")
            (scratch / path.name).replace(path)


if __name__ == "__main__":
    run_script(main)
