#!/usr/bin/env python3
"""
Time of the searches, and whether they find what icefall's functions find.

The trained joiner and decoder of a small model are set into the corner of matrices of
Zipformer-M's size: they decide as they did and cost as M's do. Its utterances are
joined to long ones, and their surest blank frames are taken out until there are as many
tokens a frame as BPE has. The same is measured with the model as it is, on single
utterances.

All ways of a case run in turn in one process, and a figure is a ratio of medians. On a
CPU it is of CPU time on one thread, on a GPU of seconds. "floor" is the encoder
projection and one row of the joiner a frame, as the model's own modules compute them. A
search that asks each frame once can be faster by its cheaper products alone.

Usage:

  benchmarks/decode.py --exp-dir exp/teacher --epoch 10 --bpe-model bpe.model \
    --manifest data/fbank/cuts_dev.jsonl.gz --recipe egs/digits/ASR/zipformer \
    --icefall icefall/egs/librispeech/ASR --json decode.json
"""

import argparse
import ast
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import kaldialign
import torch
import torch.nn.functional as F
from lhotse import CutSet
from lhotse.dataset.collation import collate_features
from torch import nn
from tqdm.auto import tqdm
from zipformer.decode import search as package_search
from zipformer.modules.model import Decoder, Joiner

from icefall_kd import (
    BeamSearch,
    GreedySearch,
    KDError,
    ModelTap,
    load_model,
    load_tokenizer,
    one_sentence,
    skip_blanks,
)
from icefall_kd.decode import ctc_draft

M = {"vocab": 500, "encoder": 512, "decoder": 512, "joiner": 512}
BATCHES = (1, 4, 16)
THRESHOLDS = (0.9, 0.95, 0.99, 0.999, 0.9999)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, help="A trained model with both heads.")
    add("--epoch", type=int, default=10)
    add("--avg", type=int, default=1)
    add("--recipe", type=Path, default="egs/digits/ASR/zipformer")
    add("--bpe-model", help="Its tokens.")
    add("--manifest", type=Path, help="Transcribed cuts.")
    add("--num-cuts", type=int, default=100)
    add("--icefall", type=Path, help="A folder with zipformer/beam_search.py.")
    add("--tokens-a-frame", type=float, default=0.2)
    add("--frames", type=int, default=300, help="Of a joined utterance.")
    add("--beam", type=int, default=4)
    add("--repeats", type=int, default=5)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


class Head(nn.Module):
    """Decoder, joiner and CTC head, with another's parameters in their corners.

    Tokens that the other one has not are never found.
    """

    def __init__(self, parameters: Dict[str, torch.Tensor], sizes: Dict[str, int]):
        super().__init__()
        context = parameters["decoder.conv.weight"].size(2)
        self.decoder = Decoder(sizes["vocab"], sizes["decoder"], 0, context)
        self.joiner = Joiner(
            sizes["encoder"], sizes["decoder"], sizes["joiner"], sizes["vocab"]
        )
        linear = nn.Linear(sizes["encoder"], sizes["vocab"])
        self.ctc_output = nn.Sequential(nn.Dropout(0.1), linear, nn.LogSoftmax(-1))
        own = self.state_dict()
        for name, values in own.items():
            values.zero_()
            corner = tuple(slice(n) for n in parameters[name].shape)
            values[corner] = parameters[name]
        for bias in (self.joiner.output_linear.bias, linear.bias):
            bias.data[len(parameters["ctc_output.1.bias"]) :] = -30.0
        self.eval()


def sizes_of(parameters: Dict[str, torch.Tensor]) -> Dict[str, int]:
    """The sizes of a head by its parameters."""
    joiner, encoder = parameters["joiner.encoder_proj.weight"].shape
    vocab, decoder = parameters["decoder.embedding.weight"].shape
    return dict(vocab=vocab, encoder=encoder, decoder=decoder, joiner=joiner)


@dataclass
class DecodingResults:
    """What icefall's functions return."""

    hyps: List[List[int]]
    timestamps: List[List[int]]
    scores: Any = None


def icefalls_greedy(folder: Optional[Path]) -> Dict[int, Callable]:
    """icefall's own functions by batch size, without its imports, or the package's."""
    package = package_search.greedy_search
    if folder is None:
        both = [package, package]
    else:
        tree = ast.parse((folder / "zipformer" / "beam_search.py").read_text("utf8"))
        names = ["greedy_search", "greedy_search_batch"]
        tree.body = [node for node in tree.body if getattr(node, "name", "") in names]
        there = {
            "torch": torch,
            "nn": nn,
            "List": List,
            "Union": Union,
            "DecodingResults": DecodingResults,
        }
        exec(compile(tree, "beam_search.py", "exec"), there)
        alone, batch = (there[name] for name in names)
        both = [lambda m, x, lens, **k: alone(m, x, 1, **k), batch]
    return {n: both[n > 1] for n in BATCHES}


def clock(device: torch.device) -> float:
    """Seconds of this process's CPU time, or those of the wall where a GPU works."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(ways: Dict[str, Callable], repeats: int, device) -> Dict[str, float]:
    """The median seconds of each way."""
    seconds: Dict[str, List[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(repeats):
        for name, run in ways.items():
            begin = clock(device)
            run()
            seconds[name].append(clock(device) - begin)
    return {name: median(values) for name, values in seconds.items()}


def encode(args: argparse.Namespace) -> Tuple[nn.Module, List[Any], List[torch.Tensor]]:
    """The model, its cuts and their encoder output, each (T, C)."""
    model, _ = load_model(args.recipe, args.exp_dir, args.epoch, 0, args.avg, True)
    model.to(args.device).eval()
    cuts = list(CutSet.from_file(args.manifest).subset(first=args.num_cuts))
    rows = []
    with ModelTap(model) as tap:
        for i in tqdm(range(0, len(cuts), 20), desc="Encoding", unit=" batches"):
            x, lens = collate_features(CutSet.from_cuts(cuts[i : i + 20]))
            out = tap.encode(x.to(args.device), lens.to(args.device))
            lens = out.encoder_out_lens.tolist()
            rows += [row[:n].clone() for row, n in zip(out.encoder_out, lens)]
    return model, cuts, rows


def joined(head: Head, rows: List[torch.Tensor], args) -> torch.Tensor:
    """Utterances (N, T, C) with about as many tokens a frame as wished."""
    search = GreedySearch(head)
    lens = torch.tensor([len(row) for row in rows])
    found = search(nn.utils.rnn.pad_sequence(rows, batch_first=True), lens).hypotheses
    frames = torch.cat(rows)
    keep = int(sum(len(f.tokens) for f in found) / args.tokens_a_frame)
    if not keep:
        raise KDError(
            f"greedy search finds no token in {len(rows)} utterances of the model in "
            f"{args.exp_dir}, epoch {args.epoch}: give one that was trained to the end"
        )
    blank = head.ctc_output(frames)[:, 0]
    frames = frames[blank.argsort()[:keep].sort().values]
    count = max(len(frames) // args.frames, 1)
    frames = frames[: count * args.frames]
    return frames.reshape(count, -1, frames.size(1))


def filled_up(x: torch.Tensor) -> torch.Tensor:
    """Utterances (N, T, C), again from the first until they fill the largest batch."""
    # Nothing is remembered of an utterance, so some may come again.
    most = max(BATCHES)
    return x.repeat(-(-most // len(x)), 1, 1)[: max(most, len(x))]


def measure_greedy(head: Head, x: torch.Tensor, args) -> List[Dict[str, Any]]:
    """Greedy search of utterances (N, T, C), for each batch size."""
    icefalls = icefalls_greedy(args.icefall)
    return [greedy_row(head, x, n, icefalls[n], args.repeats) for n in BATCHES]


def greedy_row(
    head: Head, x: torch.Tensor, n: int, icefall: Callable, repeats: int
) -> Dict[str, Any]:
    """Greedy search in batches of ``n`` utterances."""
    linear = head.joiner.output_linear
    looping = GreedySearch(head, draft="none")
    checking = GreedySearch(head, draft="ctc")
    batches = x[: 4 * n].split(n)[: len(x) // n]
    lens = torch.full((n,), x.size(1))
    drafts = [ctc_draft(head.ctc_output(part)) for part in batches]

    def floor(part: torch.Tensor) -> None:
        for rows in head.joiner.encoder_proj(part.flatten(0, 1)).split(512):
            F.linear(torch.tanh(rows), linear.weight, linear.bias)

    ways = {
        "icefall": lambda b, d: icefall(head, b, lens, return_timestamps=True),
        "label looping": lambda b, d: looping(b, lens),
        "CTC draft": lambda b, d: checking(b, lens),
        "given draft": lambda b, d: checking(b, lens, draft=d),
        "floor": lambda b, d: floor(b),
    }
    row: Dict[str, Any] = {"batch": n, "differ": 0, "tokens": 0}
    for part, draft in zip(batches, drafts):
        expected = ways["icefall"](part, draft)
        row["tokens"] += sum(map(len, expected.hyps))
        for way in ("label looping", "CTC draft", "given draft"):
            for found, y, t in zip(
                ways[way](part, draft).hypotheses,
                expected.hyps,
                expected.timestamps,
            ):
                row["differ"] += (found.tokens, found.frames) != (y, t)
    row["tokens"] /= len(batches) * n * x.size(1)
    seconds = in_turn(
        {
            name: lambda way=way: [way(b, d) for b, d in zip(batches, drafts)]
            for name, way in ways.items()
        },
        repeats,
        x.device,
    )
    row["ms"] = 1e3 * seconds["icefall"] / len(batches)
    row["times"] = {k: seconds["icefall"] / v for k, v in seconds.items()}
    for name, search in (("label looping", looping), ("CTC draft", checking)):
        row[name] = vars(search(batches[0], lens).report)
    return row


def measure_beam(head: Head, x: torch.Tensor, args) -> List[Dict[str, Any]]:
    """Beam search of utterances (N, T, C), for each batch size."""
    repeats = max(args.repeats // 3, 1)
    return [beam_row(head, x, n, args.beam, repeats) for n in BATCHES]


def beam_row(
    head: Head, x: torch.Tensor, n: int, beam: int, repeats: int
) -> Dict[str, Any]:
    """Beam search in batches of ``n`` utterances."""
    search = BeamSearch(head, beam)
    batches = x[: max(n, 4)].split(n)[: len(x) // n]
    lens = torch.full((n,), x.size(1))

    def icefall(part):
        return package_search.modified_beam_search(
            head, part, lens, beam=beam, return_timestamps=True
        )

    def skipping(part):
        kept = skip_blanks(part, lens, head.ctc_output(part))
        found = search(kept.encoder_out, kept.encoder_out_lens)
        return kept.restore(found.hypotheses)

    row: Dict[str, Any] = {"batch": n, "differ": 0, "changed": 0.0}
    for part in batches:
        expected = icefall(part)
        found = search(part, lens)
        row["report"] = vars(found.report)
        pairs = zip(found.hypotheses, expected.hyps, expected.timestamps)
        row["differ"] += sum((f.tokens, f.frames) != (y, t) for f, y, t in pairs)
        row["changed"] += sum(
            f.tokens != y for f, y in zip(skipping(part), expected.hyps)
        )
    row["changed"] /= n * len(batches)
    ways = {
        "icefall": icefall,
        "windows": lambda b: search(b, lens),
        "windows, blanks skipped": skipping,
    }
    seconds = in_turn(
        {name: lambda way=way: [way(b) for b in batches] for name, way in ways.items()},
        repeats,
        x.device,
    )
    row["ms"] = 1e3 * seconds["icefall"] / len(batches)
    row["times"] = {k: seconds["icefall"] / v for k, v in seconds.items()}
    return row


def wer_of(sp, tokens: List[List[int]], cuts) -> float:
    """The WER in percent."""
    errors = words = 0
    for text, cut in zip(sp.decode(tokens), cuts):
        reference = cut.supervisions[0].text.split()
        errors += kaldialign.edit_distance(reference, text.split())["total"]
        words += len(reference)
    return 100 * errors / words


def measure_skipping(head: Head, rows, cuts, sp, beam: int) -> List[Dict[str, float]]:
    """Frames kept, utterances changed and WER by threshold, of beam search."""
    search = BeamSearch(head, beam)
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lens = torch.tensor([len(row) for row in rows])
    logits = head.ctc_output(x)
    whole = [f.tokens for f in search(x, lens).hypotheses]
    wer = wer_of(sp, whole, cuts)
    table = [{"threshold": 1.0, "kept": 1.0, "changed": 0.0, "wer": wer}]
    for threshold in THRESHOLDS:
        kept = skip_blanks(x, lens, logits, threshold)
        result = search(kept.encoder_out, kept.encoder_out_lens)
        found = [f.tokens for f in result.hypotheses]
        changed = sum(a != b for a, b in zip(found, whole)) / len(whole)
        row = dict(threshold=threshold, kept=kept.share, changed=changed)
        table.append({**row, "wer": wer_of(sp, found, cuts)})
    return table


def measure_whole(model, cuts, args) -> Dict[str, float]:
    """The search's share of decoding single utterances, and what a user gains."""
    search, device = GreedySearch(model), torch.device(args.device)
    beam = BeamSearch(model, args.beam)
    icefall = icefalls_greedy(args.icefall)[1]
    batches = [collate_features(CutSet.from_cuts([cut])) for cut in cuts[:12]]
    batches = [(x.to(device), lens.to(device)) for x, lens in batches]
    outs = [model.forward_encoder(*batch) for batch in batches]
    ways = {
        "encoder": lambda: [model.forward_encoder(*batch) for batch in batches],
        "icefall's greedy search": lambda: [icefall(model, *out) for out in outs],
        "greedy search": lambda: [search(*out) for out in outs],
        "icefall's beam search": lambda: [
            package_search.modified_beam_search(model, *out, beam=args.beam)
            for out in outs
        ],
        "beam search": lambda: [beam(*out) for out in outs],
    }
    return in_turn(ways, args.repeats, device)


def say(title: str, table: List[Dict[str, Any]]) -> None:
    """Print the ratios of a table."""
    print(f"\n{title}: times faster than icefall's; utterances that differ")
    for row in table:
        times = ", ".join(f"{k} {v:.2f}" for k, v in row["times"].items())
        changed = f", changed {100 * row['changed']:.1f} %" if "changed" in row else ""
        print(f"batch {row['batch']} ({row['ms']:.1f} ms): {times}; {row['differ']}"
              f"{changed}")  # fmt: skip
        for name in ("label looping", "CTC draft", "report"):
            if name in row:
                r = row[name]
                print(
                    f"    {r['way']}: {r['rounds']} calls, "
                    f"{r['joiner_rows'] / r['frames']:.2f} joiner rows and "
                    f"{r['decoder_rows'] / r['frames']:.2f} decoder rows a frame, "
                    f"{r['accepted']} of {r['drafted']} drafted tokens accepted, "
                    f"{r['asked_again']} frames asked alone"
                )


def main() -> None:
    args = get_args()
    if not (args.exp_dir and args.manifest and args.bpe_model):
        raise SystemExit("give --exp-dir, --manifest and --bpe-model: see --help")
    torch.set_num_threads(1)
    with one_sentence(), torch.no_grad():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Print the figures of all cases, and write them to ``--json``."""
    model, cuts, rows = encode(args)
    parts = ("decoder", "joiner", "ctc_output")
    parameters = {
        name: values
        for name, values in model.state_dict().items()
        if name.split(".")[0] in parts
    }
    sizes = sizes_of(parameters)
    small, large = (Head(parameters, s).to(args.device) for s in (sizes, M))
    shortest = sorted(map(len, rows))[len(rows) // 2]
    single = [row[:shortest] for row in rows if len(row) >= shortest]
    single = filled_up(torch.stack(single))
    long = filled_up(joined(small, rows, args))
    long = F.pad(long, (0, M["encoder"] - long.size(2)))
    figures = {"device": args.device, "sizes": sizes, "frames": single.size(1)}
    for name, head, x in (("M", large, long), ("own", small, single)):
        figures[f"greedy, {name}"] = measure_greedy(head, x, args)
        rate = figures[f"greedy, {name}"][0]["tokens"]
        title = f"{name}, {tuple(x.shape)}, {rate:.2f} tokens a frame"
        say(f"Greedy search, {title}", figures[f"greedy, {name}"])
        figures[f"beam, {name}"] = measure_beam(head, x, args)
        say(f"Beam search, {title}", figures[f"beam, {name}"])
    figures["whole"] = measure_whole(model, cuts, args)
    encoder = figures["whole"]["encoder"]
    print("\nSingle utterances, the search's time by the encoder's:")
    for name, seconds in figures["whole"].items():
        print(f"{name}: {seconds / encoder:.3f}")
    sp = load_tokenizer(args.bpe_model)
    figures["skipping"] = measure_skipping(small, rows, cuts, sp, args.beam)
    print("\nBeam search, frames left out where P(blank) is above:")
    for r in figures["skipping"]:
        print(f"{r['threshold']}: {100 * r['kept']:.0f} % of the frames kept, "
              f"{100 * r['changed']:.1f} % of utterances changed, "
              f"WER {r['wer']:.2f} %")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
