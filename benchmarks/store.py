#!/usr/bin/env python3
"""
What each form of a teacher's targets costs, and what it loses.

On a trained teacher and student of the digits recipe, and on the same speech with 500
symbols in place of 54: each symbol but blank becomes several, its probability split by
random logits that change from frame to frame.

Columns: bytes a frame of the encoder; |KL(stored) - KL(dense)| against the student, in
nats a frame (a lattice: summed over its nodes, weighted by their occupancy), mean and
99th percentile, at temperature T where the name ends in @T; and the bias of the
gradient, the norm of its mean error over the mean norm of the dense gradient.

Usage, when egs/digits/ASR/run.sh has run:

  benchmarks/store.py --work-dir egs/digits/ASR --json store.json
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch
from lhotse import CutSet
from lhotse.dataset.collation import collate_features
from tqdm.auto import tqdm

from icefall_kd import (
    Codec,
    Distribution,
    ModelTap,
    PrunedLattice,
    SparseDistribution,
    load_model,
    load_tokenizer,
)
from icefall_kd.kinds.lattice import LatticeCodec

ROOT = Path(__file__).resolve().parents[1]
CTC = "dense top:4 top:8 adaptive:0.99:16 adaptive:0.998:16 adaptive:0.999:16"
CTC += " adaptive:0.9995:32 adaptive:0.9999:64 adaptive:0.999:16@2 adaptive:0.999:64@2"
CTC += " adaptive:0.999:64@4 sampled:12 sampled:50"
LATTICE = "dense collapsed top:4 adaptive:0.99:8 adaptive:0.999:8 adaptive:0.999:16"
LATTICE += " adaptive:0.9995:16 adaptive:0.9999:32 path:adaptive:0.999:16"
Pair = Tuple[torch.Tensor, torch.Tensor]  # logits of teacher and student, (M, V)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work-dir", type=Path, default=ROOT / "egs/digits/ASR")
    add("--recipe", type=Path, default=ROOT / "egs/digits/ASR/zipformer")
    add("--teacher-epoch", type=int, default=10)
    add("--student-epoch", type=int, default=2)
    add("--num-cuts", type=int, default=200, help="Of the training cuts.")
    add("--s-range", type=int, default=5, help="Label positions at a frame.")
    add("--seed", type=int, default=0, help="For the 500 symbols.")
    add("--mvq-iters", type=int, default=100, help="Training steps of each phase.")
    add("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


class Split:
    """54 symbols become 500; teacher and student differ on how they split them."""

    def __init__(self, v: int, blank_id: int, seed: int, size: int = 500) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        non_blank = [i for i in range(v) if i != blank_id]
        self.origin = torch.tensor(
            [blank_id] + [non_blank[i % len(non_blank)] for i in range(size - 1)]
        )
        self.first = {int(o): i for i, o in reversed(list(enumerate(self.origin)))}

    def __call__(self, teacher: torch.Tensor, student: torch.Tensor) -> Pair:
        shape = (*teacher.shape[:-1], len(self.origin))
        common = torch.randn(shape, generator=self.generator)
        difference = torch.randn(shape, generator=self.generator)
        a = 2.0 * common
        b = 1.6 * common + 1.2 * difference
        a[..., 0] = b[..., 0] = 0
        return teacher[..., self.origin] + a, student[..., self.origin] + b

    def labels(self, symbols: torch.Tensor) -> torch.Tensor:
        """Return the token ids of ``symbols`` after the split."""
        return torch.tensor([self.first[int(s)] for s in symbols.flatten()]).view_as(
            symbols
        )


def kl_and_grad(stored: Distribution, student: torch.Tensor) -> Pair:
    """Return the KL of each row from ``stored`` to ``student``, and its gradient.

    The gradient is that towards the student's logits; both are in float64.
    """
    log_q = student.double().log_softmax(-1)
    floor = -1e30
    if not isinstance(stored, SparseDistribution):
        log_p = stored.double().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1), log_q.exp() - log_p.exp()
    log_p, log_tail = stored.log_probs.double(), stored.log_tail.double()
    inside = torch.zeros_like(log_q)
    inside.scatter_add_(1, stored.indices, (log_p > -torch.inf).double())
    log_q_tail = log_q.masked_fill(inside > 0, -torch.inf).logsumexp(-1)
    p, p_tail = log_p.exp(), log_tail.exp()
    kl = (p * (log_p.clamp(min=floor) - log_q.gather(1, stored.indices))).sum(-1)
    kl += p_tail * (log_tail.clamp(min=floor) - log_q_tail.clamp(min=floor))
    ratio = torch.where(p_tail > 0, (log_tail - log_q_tail).exp(), p_tail)
    grad = log_q.exp() * torch.where(inside > 0, inside / inside, 1 - ratio[:, None])
    return kl, grad.scatter_add(1, stored.indices, -p)


class Row:
    """One form's figures, gathered utterance by utterance."""

    def __init__(self, case: str, name: str) -> None:
        self.case, self.name = case, name
        self.bytes = self.frames = 0
        self.errors: List[torch.Tensor] = []
        self.bias: Any = 0.0
        self.norm = 0.0

    def add(self, size: int, error: torch.Tensor, grad: Pair) -> None:
        """Add an utterance.

        Args:
          size: Its bytes.
          error: Of the KL, by frame (T,).
          grad: The gradient by what is stored, and that by all logits.
        """
        self.bytes += size
        self.frames += len(error)
        self.errors.append(error)
        self.bias = self.bias + (grad[0] - grad[1]).sum(0)
        self.norm += float(grad[1].norm(dim=-1).sum())

    def figures(self, dense: float) -> Dict[str, Any]:
        """Return the row's cells; ``dense`` is the bytes a frame of dense targets."""
        error = torch.cat(self.errors).abs()
        per_frame = self.bytes / self.frames
        return {
            "case": self.case,
            "representation": self.name,
            "bytes_per_frame": per_frame,
            "times_smaller": dense / per_frame,
            "kl_error_mean": float(error.mean()),
            "kl_error_p99": float(error.quantile(0.99)),
            "gradient_bias": float(self.bias.norm() / self.norm),
        }


def measure_ctc(rows: Dict[str, Row], teacher, student, key: str) -> None:
    """Add an utterance to each of ``rows``.

    Args:
      rows: By form.
      teacher: Logits (T, V).
      student: Logits (T, V).
      key: The cut's id, which a sampled form draws by.
    """
    v = teacher.size(1)
    for text, row in rows.items():
        t = float(text.partition("@")[2] or 1)
        dense = kl_and_grad(teacher / t, student / t)
        if text == "lilcom":
            decoded, size = lilcom_round_trip(teacher)
        else:
            codec = Codec.parse(text)
            data = codec.encode(teacher, key)
            decoded, size = codec.decode([data], [len(teacher)], v), len(data)
        kl, grad = kl_and_grad(decoded, student / t)
        row.add(size, kl - dense[0], (grad, dense[1]))


def lilcom_round_trip(logits: torch.Tensor) -> Tuple[torch.Tensor, int]:
    """Return what lilcom makes of ``logits``, and the number of bytes."""
    import lilcom

    data = lilcom.compress(logits.log_softmax(-1).numpy(), tick_power=-5)
    return torch.from_numpy(lilcom.decompress(data)), len(data)


def measure_lattice(rows: Dict[str, Row], teacher: PrunedLattice, student) -> None:
    """``student``: (T, S, V), the student's logits on the teacher's nodes."""
    t = int(teacher.boundary[0, 3])
    v = teacher.logits.size(-1)
    weight = teacher.occupancy[0, :t].double()
    shape = weight.shape

    def weigh(kl, grad, mask) -> Pair:
        full, full_grad = torch.zeros(shape, dtype=torch.float64), None
        full[mask] = kl * weight[mask]
        full_grad = torch.zeros(*shape, v, dtype=torch.float64)
        full_grad[mask] = grad * weight[mask][:, None]
        return full.sum(-1), full_grad.sum(1)

    all_nodes = torch.ones(shape, dtype=torch.bool)
    flat = student[:t].reshape(-1, v)
    dense = kl_and_grad(teacher.logits[0, :t].reshape(-1, v), flat)
    dense_kl, dense_grad = weigh(*dense, all_nodes.nonzero(as_tuple=True))
    for text, row in rows.items():
        if text == "every node, dense":
            row.add(2 * t * shape[1] * v, dense_kl * 0, (dense_grad, dense_grad))
            continue
        codec = LatticeCodec.parse(text, 0)
        data = codec.encode(teacher)
        decoded = codec.decode(data, v)
        mask = decoded.occupancy > 0
        kl, grad = kl_and_grad(decoded.nodes, student[:t][mask])
        kl, grad = weigh(kl, grad, mask.nonzero(as_tuple=True))
        row.add(len(data), kl - dense_kl, (grad, dense_grad))


def measure_mvq(outs: List[torch.Tensor], head: Callable, cases, rows, iters) -> None:
    """Codes of the encoder's output, decoded and sent through the CTC head.

    How symbols are split into 500 is no part of the encoder's output; it is given to
    the codes, which leaves the error of the 54 symbols behind them.
    """
    from multi_quantization import QuantizerTrainer

    flat = torch.cat(outs)
    trainer = QuantizerTrainer(
        dim=flat.size(1),
        bytes_per_frame=8,
        device=torch.device("cpu"),
        phase_one_iters=iters,
        phase_two_iters=iters,
    )
    generator = torch.Generator().manual_seed(0)
    while not trainer.done():
        trainer.step(flat[torch.randint(len(flat), (600,), generator=generator)])
    quantizer = trainer.get_quantizer()
    for out, pairs in zip(outs, cases):
        with torch.no_grad():
            codes = quantizer.encode(out)
            decoded = head(quantizer.decode(codes.to(torch.uint8).long()))
        for row, (teacher, student, added) in zip(rows, pairs):
            logits = decoded if added is None else decoded[:, added[0]] + added[1]
            dense = kl_and_grad(teacher, student)
            kl, grad = kl_and_grad(logits, student)
            row.add(codes.numel(), kl - dense[0], (grad, dense[1]))


def main() -> None:
    args = get_args()
    torch.manual_seed(args.seed)
    args.recipe = args.recipe.resolve()
    args.json = args.json and args.json.resolve()
    os.chdir(args.work_dir)  # what a recipe's paths are relative to
    exp, data = Path("exp"), Path("data")
    teacher, settings = load_model(
        args.recipe, exp / "teacher", args.teacher_epoch, 0, 1, True
    )
    student, _ = load_model(
        args.recipe, exp / "student", args.student_epoch, 0, 1, True
    )
    v, blank = settings["vocab_size"], settings["blank_id"]
    split = Split(v, blank, args.seed)
    sp = load_tokenizer(settings["bpe_model"])
    cuts = CutSet.from_file(data / "fbank/cuts_train.jsonl.gz")
    cuts = cuts.subset(first=args.num_cuts)
    extra = []
    try:
        import lilcom  # noqa: F401

        extra.append("lilcom")
    except ImportError:
        print("lilcom's row is left out: pip install lilcom")
    rows: Dict[str, Dict[str, Row]] = {}
    for size in (v, 500):
        name = f"CTC, V = {size}"
        rows[name] = {text: Row(name, text) for text in CTC.split() + extra}
        name = f"lattice, s_range {args.s_range}, V = {size}"
        rows[name] = {t: Row(name, t) for t in ["every node, dense", *LATTICE.split()]}
    outs, cases = [], []
    with ModelTap(teacher) as teacher_tap, ModelTap(student) as student_tap:
        for cut in tqdm(list(cuts), desc="Utterances", unit=" cuts"):
            x, x_lens = collate_features(CutSet.from_cuts([cut]))
            a, b = teacher_tap.encode(x, x_lens), student_tap.encode(x, x_lens)
            y = [sp.encode(cut.supervisions[0].text, out_type=int)]
            lattice = teacher_tap.lattice(a, y, args.s_range)
            student_lattice = student_tap.lattice(
                b, y, args.s_range, ranges=lattice.ranges
            )
            pair = (a.ctc_logits[0], b.ctc_logits[0])
            outs.append(a.encoder_out[0])
            cases.append([(*pair, None)])
            nodes = (lattice.logits, student_lattice.logits)
            symbols = lattice.labels
            for size in (v, 500):
                if size == 500:
                    plain = pair[0]
                    pair, nodes = split(*pair), split(*nodes)
                    added = pair[0] - plain[:, split.origin]
                    cases[-1].append((*pair, (split.origin, added)))
                    symbols = split.labels(symbols)
                measure_ctc(rows[f"CTC, V = {size}"], *pair, cut.id)
                case = PrunedLattice(
                    lattice.ranges,
                    lattice.boundary,
                    symbols,
                    nodes[0],
                    lattice.occupancy,
                )
                name = f"lattice, s_range {args.s_range}, V = {size}"
                measure_lattice(rows[name], case, nodes[1][0])
    try:
        from icefall_kd.zipformer import ctc_linear

        tables = [f"CTC, V = {size}" for size in (v, 500)]
        mvq = [Row(name, "MVQ, 8 codes") for name in tables]
        measure_mvq(outs, ctc_linear(teacher), cases, mvq, args.mvq_iters)
        for name, row in zip(tables, mvq):
            rows[name][row.name] = row
    except ImportError:
        print("MVQ's row is left out: pip install multi_quantization")
    report(rows, args)


def report(rows: Dict[str, Dict[str, Row]], args: argparse.Namespace) -> None:
    """Print ``rows`` as tables; write them where ``args`` name a file."""
    figures = []
    for name, group in rows.items():
        first = next(iter(group.values()))
        print(f"\n### {name}, {first.frames:,} frames\n")
        print(
            "| representation | bytes a frame | times smaller | KL error: mean | "
            "99 % | gradient bias |"
        )
        print("|---|---|---|---|---|---|")
        dense = first.bytes / first.frames
        for row in group.values():
            f = row.figures(dense)
            figures.append(f)
            print(
                f"| {row.name} | {f['bytes_per_frame']:.2f} | "
                f"{f['times_smaller']:.1f} | {f['kl_error_mean']:.1e} | "
                f"{f['kl_error_p99']:.1e} | {f['gradient_bias']:.1e} |"
            )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf8")


if __name__ == "__main__":
    main()
