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
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from decode import in_turn, wer_of
from lhotse import CutSet
from lhotse.dataset.collation import collate_features
from zipformer.decode.search import modified_beam_search

from icefall_kd import (
    BeamSearch,
    GreedySearch,
    Hypothesis,
    KDError,
    ModelTap,
    load_model,
    load_tokenizer,
    skip_blanks,
)
from icefall_kd.decode.speculation import draft_of
from icefall_kd.decode.types import SearchResult
from icefall_kd.errors import require

Encoded = Tuple[torch.Tensor, torch.Tensor]  # (N, T, C), and (N,) frames
Ways = Dict[str, Callable[[], List[Any]]]  # what is timed, for all batches


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


def draft_ways(
    teacher: Model, student: Optional[Model], inputs: List[Encoded]
) -> Tuple[Ways, Ways]:
    """Return the search of all batches by draft, and what makes the draft before it.

    What is made before costs time beside the teacher's encoder and its search.
    """
    outs = [teacher.encode(batch) for batch in inputs]
    alone = GreedySearch(teacher.model, draft="none")
    checking = GreedySearch(teacher.model, draft="ctc")
    searches: Ways = {
        "none": lambda: [alone(*out) for out in outs],
        "CTC": lambda: [checking(*out) for out in outs],
    }
    if student is None:
        return searches, {}
    own = GreedySearch(student.model)

    def make_drafts() -> List[torch.Tensor]:
        results = [own(*student.encode(batch)) for batch in inputs]
        pairs = zip(results, outs)
        return [draft_of(r.hypotheses, out.size(1)) for r, (out, _) in pairs]

    drafts = make_drafts()
    pairs = list(zip(outs, drafts))
    searches["student"] = lambda: [checking(*out, draft=d) for out, d in pairs]
    return searches, {"student": make_drafts}


def measure_drafts(
    teacher: Model, student: Optional[Model], cuts: List[Any], n: int, args
) -> Iterator[Dict[str, Any]]:
    """Yield the figures of each draft, in batches of ``n`` utterances."""
    inputs = list(batches_of(cuts, n, args.device))
    searches, before = draft_ways(teacher, student, inputs)
    ways = {**searches, "encoder": lambda: [teacher.encode(batch) for batch in inputs]}
    ways.update({f"before {name}": way for name, way in before.items()})
    seconds = in_turn(ways, args.repeats, torch.device(args.device))
    expected = paths_of(searches["none"]())
    for name, search in searches.items():
        results = search()
        report = results[0].report
        for result in results[1:]:
            report.add(result.report)
        whole = seconds["encoder"] + seconds[name]
        yield {
            "batch": n, "draft": name, "search": seconds[name],
            "whole": whole + seconds.get(f"before {name}", 0.0),
            "calls": report.rounds / len(results),
            "rows": report.joiner_rows / report.frames,
            "drafted": report.drafted, "accepted": report.accepted,
            "differ": sum(a != b for a, b in zip(paths_of(results), expected)),
        }  # fmt: skip


def paths_of(results: List[SearchResult]) -> List[Tuple[List[int], List[int]]]:
    """Return tokens and frames of each utterance of all batches."""
    return [(h.tokens, h.frames) for result in results for h in result.hypotheses]


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


def search_kept(
    model: torch.nn.Module, search: BeamSearch, out: Encoded, threshold: float
) -> Tuple[float, List[Hypothesis]]:
    """Return the share of frames that are kept, and what is found in these alone."""
    head = model.ctc_output(out[0])
    kept = skip_blanks(*out, head, threshold)
    result = search(kept.encoder_out, kept.encoder_out_lens)
    return kept.share, kept.restore(result.hypotheses)


def times_of_skipping(
    teacher: Model, cuts: List[Any], n: int, thresholds: List[float], args
) -> Dict[float, float]:
    """Return how many times faster than icefall's it is, in batches of ``n``."""
    model, search = teacher.model, BeamSearch(teacher.model, args.beam)
    outs = [teacher.encode(batch) for batch in batches_of(cuts, n, args.device)]
    ways: Dict[Any, Callable] = {
        "icefall": lambda: [
            modified_beam_search(model, *out, beam=args.beam) for out in outs
        ],
        1.0: lambda: [search(*out) for out in outs],
    }
    for p in thresholds:
        ways[p] = lambda p=p: [search_kept(model, search, out, p) for out in outs]
    seconds = in_turn(ways, args.repeats, torch.device(args.device))
    return {p: seconds["icefall"] / seconds[p] for p in (1.0, *thresholds)}


def measure_skipping(
    teacher: Model, cuts: List[Any], sp: Any, args
) -> Iterator[Dict[str, Any]]:
    """Yield frames kept, utterances changed, WER, and times, by threshold."""
    thresholds = [float(x) for x in args.thresholds.split()]
    timed = cuts[: args.timed_cuts]
    times = {
        n: times_of_skipping(teacher, timed, n, thresholds, args)
        for n in map(int, args.batches.split())
    }
    search = BeamSearch(teacher.model, args.beam)
    outs = [teacher.encode(batch) for batch in batches_of(cuts, 16, args.device)]
    whole = [h.tokens for out in outs for h in search(*out).hypotheses]
    frames = sum(int(lens.sum()) for _, lens in outs)
    for p in (1.0, *thresholds):
        tokens, kept = [], 0.0
        for out in outs:
            share, hypotheses = search_kept(teacher.model, search, out, p)
            kept += share * int(out[1].sum())
            tokens += [h.tokens for h in hypotheses]
        yield {
            "threshold": p, "kept": kept / frames,
            "changed": sum(a != b for a, b in zip(tokens, whole)) / len(whole),
            "wer": wer_of(sp, tokens, cuts),
            "times": {n: of_batch[p] for n, of_batch in times.items()},
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
