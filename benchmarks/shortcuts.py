#!/usr/bin/env python3
"""
What shortcuts of a transducer's search give: drafts, and frames that are left out.

Drafts are checked by the model and change nothing. The table has the time of the search
and of the whole decoding, with what makes the draft: the model's own CTC head, or with
--student another model's encoder and search. Frames to whose blank the CTC head gives a
probability above a threshold are left out, which is not exact: the table has the share
of frames that are kept, of utterances that change, the WER, and how many times faster
beam search is than icefall's.

All ways of a case run in turn, and a figure is a median; on a CPU of CPU time on one
thread, on a GPU of seconds. Digits and commands recipe alike:

  benchmarks/shortcuts.py --exp-dir exp/teacher --epoch 10 --bpe-model bpe.model \
    --manifest data/fbank/cuts_dev.jsonl.gz --student exp/student-kd:3:1
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from decode import in_turn, wer_of
from lhotse import CutSet
from lhotse.dataset.collation import collate_features
from zipformer.decode.search import modified_beam_search

from icefall_kd import (
    BeamSearch,
    GreedySearch,
    KDError,
    ModelTap,
    load_model,
    load_tokenizer,
    skip_blanks,
)
from icefall_kd.decode.speculation import draft_of
from icefall_kd.errors import require

Encoded = Tuple[torch.Tensor, torch.Tensor]  # (N, T, C), and (N,) frames


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="A model with both heads.")
    add("--epoch", type=int, default=10)
    add("--avg", type=int, default=1)
    add("--student", help="EXP_DIR:EPOCH:AVG of a model of the same tokens.")
    add("--recipe", type=Path, default="egs/digits/ASR/zipformer")
    add("--bpe-model", required=True, help="Its tokens.")
    add("--manifest", type=Path, required=True, help="Transcribed cuts.")
    add("--num-cuts", type=int, default=200, help="For shares and WER.")
    add("--timed-cuts", type=int, default=32, help="Of these, for times.")
    add("--batches", default="1 4 16", help="Numbers of utterances.")
    add("--thresholds", default="0.9 0.99 0.999 0.9999")
    add("--beam", type=int, default=4)
    add("--repeats", type=int, default=3)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


class Model:
    """A model with its encoder."""

    def __init__(self, args: argparse.Namespace, exp_dir, epoch: int, avg: int) -> None:
        self.model, _ = load_model(args.recipe, exp_dir, epoch, 0, avg, True)
        self.model.to(args.device).eval()
        self.tap = ModelTap(self.model)

    def encode(self, batch: Encoded) -> Encoded:
        """Return encoder output and lengths of features (N, T, F) and lengths."""
        out = self.tap.encode(*batch)
        return out.encoder_out, out.encoder_out_lens


def batches_of(cuts: List[Any], n: int, device: str) -> Iterator[Encoded]:
    """Yield features of ``n`` cuts at a time."""
    for i in range(0, len(cuts), n):
        x, lens = collate_features(CutSet.from_cuts(cuts[i : i + n]))
        yield x.to(device), lens.to(device)


def measure_drafts(
    teacher: Model, student: Optional[Model], cuts: List[Any], n: int, args
) -> Iterator[Dict[str, Any]]:
    """Yield the figures of each draft, in batches of ``n`` utterances."""
    inputs = list(batches_of(cuts, n, args.device))
    outs = [teacher.encode(batch) for batch in inputs]
    alone = GreedySearch(teacher.model, draft="none")
    checking = GreedySearch(teacher.model, draft="ctc")
    searches = {"none": lambda i: alone(*outs[i]), "CTC": lambda i: checking(*outs[i])}
    # What a way costs beside the teacher's encoder and its search.
    before: Dict[str, Any] = {}
    if student is not None:
        own = GreedySearch(student.model)

        def draft(i: int) -> torch.Tensor:
            result = own(*student.encode(inputs[i]))
            return draft_of(result.hypotheses, outs[i][0].size(1))

        drafts = [draft(i) for i in range(len(inputs))]
        before["student"] = draft
        searches["student"] = lambda i: checking(*outs[i], draft=drafts[i])
    every = range(len(inputs))
    ways = {name: lambda f=f: [f(i) for i in every] for name, f in searches.items()}
    ways["encoder"] = lambda: [teacher.encode(batch) for batch in inputs]
    for name, work in before.items():
        ways[f"before {name}"] = lambda f=work: [f(i) for i in every]
    seconds = in_turn(ways, args.repeats, torch.device(args.device))
    expected = [h for r in ways["none"]() for h in r.hypotheses]
    for name in searches:
        results = ways[name]()
        report = results[0].report
        for result in results[1:]:
            report.add(result.report)
        found = [h for r in results for h in r.hypotheses]
        paths = [[(h.tokens, h.frames) for h in some] for some in (found, expected)]
        whole = seconds["encoder"] + seconds[name]
        yield {
            "batch": n, "draft": name, "search": seconds[name],
            "whole": whole + seconds.get(f"before {name}", 0.0),
            "calls": report.rounds / len(results),
            "rows": report.joiner_rows / report.frames,
            "drafted": report.drafted, "accepted": report.accepted,
            "differ": sum(a != b for a, b in zip(*paths)),
        }  # fmt: skip


def say_drafts(rows: List[Dict[str, Any]], seconds: float) -> None:
    print("| batch | draft | accepted | calls | rows a frame | search | all | differ |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        accepted = (
            "" if not row["drafted"] else f"{row['accepted']} of {row['drafted']}"
        )
        base = next(r for r in rows if r["batch"] == row["batch"])
        print(
            f"| {row['batch']} | {row['draft']} | {accepted} | {row['calls']:.1f} | "
            f"{row['rows']:.2f} | {row['search'] / base['search']:.2f} | "
            f"{row['whole'] / base['whole']:.2f} | {row['differ']} |"
        )
    print(f"Times are shares of those without a draft, of {seconds:.0f} s of audio.")


def measure_skipping(
    teacher: Model, cuts: List[Any], sp: Any, args
) -> Iterator[Dict[str, Any]]:
    """Yield frames kept, utterances changed, WER, and times, by threshold."""
    search = BeamSearch(teacher.model, args.beam)
    outs = [teacher.encode(batch) for batch in batches_of(cuts, 16, args.device)]

    def skipping(out: torch.Tensor, lens: torch.Tensor, threshold: float):
        head = teacher.model.ctc_output(out)
        kept = skip_blanks(out, lens, head, threshold)
        result = search(kept.encoder_out, kept.encoder_out_lens)
        return kept.share, kept.restore(result.hypotheses)

    timed = {
        n: [
            teacher.encode(b)
            for b in batches_of(cuts[: args.timed_cuts], n, args.device)
        ]
        for n in map(int, args.batches.split())
    }
    thresholds = [float(x) for x in args.thresholds.split()]
    times: Dict[Any, Dict[int, float]] = {}
    for n, batches in timed.items():
        ways: Dict[Any, Any] = {
            "icefall": lambda b=batches: [
                modified_beam_search(teacher.model, *out, beam=args.beam) for out in b
            ],
            1.0: lambda b=batches: [search(*out) for out in b],
        }
        for p in thresholds:
            ways[p] = lambda b=batches, p=p: [skipping(*out, p) for out in b]
        seconds = in_turn(ways, args.repeats, torch.device(args.device))
        for name, value in seconds.items():
            times.setdefault(name, {})[n] = seconds["icefall"] / value
    whole = [h.tokens for out in outs for h in search(*out).hypotheses]
    frames = sum(int(lens.sum()) for _, lens in outs)
    for p in (1.0, *thresholds):
        found, kept = [], 0.0
        for out in outs:
            share, hypotheses = skipping(*out, p)
            kept += share * int(out[1].sum())
            found += [h.tokens for h in hypotheses]
        yield {
            "threshold": p, "kept": kept / frames,
            "changed": sum(a != b for a, b in zip(found, whole)) / len(whole),
            "wer": wer_of(sp, found, cuts), "times": times[p],
        }  # fmt: skip


def say_skipping(rows: List[Dict[str, Any]]) -> None:
    batches = list(rows[0]["times"])
    times = f"times faster than icefall's, batch {', '.join(map(str, batches))}"
    print(f"\n| left out above | frames kept | utterances changed | WER % | {times} |")
    print("|---|---|---|---|---|")
    for row in rows:
        times = ", ".join(f"{row['times'][n]:.1f}" for n in batches)
        print(
            f"| {row['threshold']:g} | {100 * row['kept']:.0f} % | "
            f"{100 * row['changed']:.1f} % | {row['wer']:.2f} | {times} |"
        )


@torch.no_grad()
def main() -> None:
    args = get_args()
    torch.set_num_threads(1)
    teacher = Model(args, args.exp_dir, args.epoch, args.avg)
    student = None
    if args.student:
        folder, epoch, avg = args.student.rsplit(":", 2)
        student = Model(args, folder, int(epoch), int(avg))
        sizes = [m.model.joiner.output_linear.out_features for m in (teacher, student)]
        require(
            sizes[0] == sizes[1],
            f"--student has {sizes[1]} tokens and the teacher {sizes[0]}: give a "
            "student of the same tokens",
        )
    cuts = list(CutSet.from_file(args.manifest).subset(first=args.num_cuts))
    timed = cuts[: args.timed_cuts]
    drafts = [
        row
        for n in map(int, args.batches.split())
        for row in measure_drafts(teacher, student, timed, n, args)
    ]
    say_drafts(drafts, sum(cut.duration for cut in timed))
    sp = load_tokenizer(args.bpe_model)
    skipping = list(measure_skipping(teacher, cuts, sp, args))
    say_skipping(skipping)
    if args.json:
        figures = {"device": args.device, "drafts": drafts, "skipping": skipping}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    try:
        main()
    except KDError as e:
        raise SystemExit(f"shortcuts.py: error: {e.sentence}") from None
