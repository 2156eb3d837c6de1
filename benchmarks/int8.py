#!/usr/bin/env python3
"""
What int8-aware training gives a student that loses words in 8 bits.

The student has outliers: with --factor F, one channel of each attention value, of each
query and of each convolution is F times as large, and what takes it in F times as
small, so that its output in fp32 stays as it is. With --factor 1 the student is
measured as it is.

It then goes on for --steps steps with its own former self as the teacher, in three
ways: in fp32, with --kd-int8-from 0, and with this after `export --equalize`'s
change of its channels: the same steps, batches and seeds. All WERs are of files
of ONNX in onnxruntime, utterance by utterance, int8 as quantize_dynamic makes it.
The file has the account of outliers of each model too; the layers of the largest errors
are printed:

  benchmarks/int8.py --exp-dir exp/student --epoch 12 --recipe zipformer \
    --bpe-model data/lang_bpe_120/bpe.model --cuts data/fbank/cuts_train.jsonl.gz \
    --test-cuts data/fbank/cuts_dev.jsonl.gz --json int8.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Optional, Tuple

import kaldialign
import torch
from lhotse import CutSet
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from torch import nn
from tqdm.auto import tqdm
from zipformer.modules import model as zipformer_model
from zipformer.modules.optim import ScaledAdam
from zipformer.utils import get_parameter_groups_with_lrs

from icefall_kd import (
    KDError,
    get_engine,
    import_train,
    load_model,
    load_tokenizer,
    one_sentence,
)
from icefall_kd.export.equalize import equalize
from icefall_kd.export.files import write_offline
from icefall_kd.export.graph import exportable
from icefall_kd.export.quantize import write_int8
from icefall_kd.export.sides import Side, ctc_tokens, greedy, onnx_side
from icefall_kd.rounding import SCALES, TENSOR
from icefall_kd.student.cuts import read_batches
from icefall_kd.student.outliers import account_of_outliers, table
from icefall_kd.training import session
from icefall_kd.training.options import all_options

HEADS = {"ctc": ("model",), "transducer": ("encoder", "decoder", "joiner")}
FORMS = ("fp32", "int8")
# Their names, --kd-int8-from, and whether the channels are equalized first.
WAYS = (
    ("trained in fp32", "", False),
    ("trained int8-aware", "0", False),
    ("equalized, int8-aware", "0", True),
)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="A student with both heads.")
    add("--epoch", type=int, default=10)
    add("--recipe", type=Path, default="egs/digits/ASR/zipformer")
    add("--bpe-model", required=True, help="Its tokens.")
    add("--cuts", type=Path, required=True, help="To train on.")
    add("--test-cuts", type=Path, required=True, help="Transcribed cuts.")
    add("--num-cuts", type=int, default=200, help="Of these.")
    add("--factor", type=float, default=96.0, help="Of the outliers; 1 for none.")
    add("--steps", type=int, default=150)
    add("--max-duration", type=float, default=40.0, help="Seconds in a batch.")
    add("--lr", type=float, default=0.0005, help="ScaledAdam's.")
    add("--seeds", default="1 2 3")
    add("--scales", choices=SCALES, default=TENSOR, help="Of a weight in int8.")
    add("--num-threads", type=int, default=1)
    add("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


@torch.no_grad()
def add_outliers(model: nn.Module, factor: float) -> int:
    """Scale pairs of channels in place, and return how many there are."""
    pairs = 0

    def scale(layer: nn.Module, row: int, by: float) -> None:
        layer.weight[row] *= by
        if layer.bias is not None:
            layer.bias[row] *= by

    for module in model.encoder.modules():
        name = type(module).__name__
        if name == "SelfAttention":  # a value, which attention only averages
            scale(module.in_proj, 0, factor)
            module.out_proj.weight[:, 0] /= factor
        elif name == "NonlinAttention":  # the gate behind its attention
            scale(module.in_proj, 2 * module.hidden_channels, factor)
            module.out_proj.weight[:, 0] /= factor
        elif name == "ConvolutionModule" and not module.causal:
            scale(module.in_proj, 0, factor)
            module.depthwise_conv.weight[0] /= factor
        elif name == "RelPositionMultiheadAttentionWeights":  # query and key
            scale(module.in_proj, 0, factor)
            first_key = module.num_heads * module.query_head_dim
            scale(module.in_proj, first_key, 1 / factor)
        else:
            continue
        pairs += 1
    return pairs


class Measure:
    """Error rates of a model's exported files on some cuts, and its outliers."""

    def __init__(self, args: argparse.Namespace, settings: Dict, tokenizer) -> None:
        cuts = CutSet.from_file(args.test_cuts).subset(first=args.num_cuts)
        self.utterances = [
            (cut.load_features()[None], cut.supervisions[0].text.split())
            for cut in cuts
        ]
        self.settings, self.tokenizer = settings, tokenizer
        self.scales = args.scales
        cuts_and_few = args.test_cuts, min(16, args.num_cuts)
        self.batches = read_batches(*cuts_and_few, settings, tokenizer)

    def __call__(self, name: str, seed: Optional[int], model: nn.Module) -> Dict:
        """Print and return the WER in % of each head in each form, and the account."""
        accounts = account_of_outliers(model.eval(), self.batches)
        row = {"model": name, "seed": seed, **self._rates(exportable(model))}
        show(row)
        return {**row, "outliers": table(accounts, len(accounts))}

    def _rates(self, model: nn.Module) -> Dict[str, Dict[str, float]]:
        rates: Dict[str, Dict[str, float]] = {head: {} for head in HEADS}
        with tempfile.TemporaryDirectory() as folder:
            for head, parts in HEADS.items():
                files = {part: Path(folder) / f"{part}.onnx" for part in parts}
                small = {part: Path(folder) / f"{part}.int8.onnx" for part in parts}
                for part in parts:
                    options = {"takes_mean": False, "opset": 13}
                    write_offline(model, self.settings, part, files[part], **options)
                    write_int8(files[part], small[part], self.scales)
                for form, those in zip(FORMS, (files, small)):
                    side = onnx_side(form, those)
                    rates[head][form] = self._rate(side, head, model)
        return rates

    def _rate(self, side: Side, head: str, model: nn.Module) -> float:
        blank_id, errors, words = self.settings["blank_id"], 0, 0
        for features, reference in self.utterances:
            if head == "ctc":
                tokens = ctc_tokens(side.log_probs(features), blank_id)
            else:
                context_size = int(model.decoder.context_size)
                tokens = greedy(side, side.encode(features), context_size, blank_id)
            found = self.tokenizer.decode(tokens).split()
            errors += kaldialign.edit_distance(reference, found)["total"]
            words += len(reference)
        return 100 * errors / words


def train(
    model: nn.Module, settings: Dict[str, Any], args: argparse.Namespace, **changes: Any
) -> None:
    """Train a model for some steps, with the checkpoint's as its teacher."""
    recipe = import_train(args.recipe)
    zipformer_model.k2 = get_engine()
    params = recipe.get_params()
    params.update(settings)
    params.update({option.dest: option.default for option in all_options()})
    params.update(
        kd_ctc_weight=1.0,
        kd_rnnt_weight=1.0,
        kd_hard_weight=0.0,
        kd_teacher_exp_dir=str(args.exp_dir),
        kd_teacher_epoch=args.epoch,
        kd_teacher_use_averaged_model=False,
        kd_teacher_recipe=str(args.recipe),
        kd_config="",
        exp_dir="",
        enable_spec_aug=False,
        batch_idx_train=10**4,  # after the recipe's warm-up
        **changes,
    )
    params.update(start_epoch=1, start_batch=0, num_epochs=1)
    sp = recipe.load_bpe_model(str(args.bpe_model))
    cuts = CutSet.from_file(args.cuts).to_eager()
    model.train()
    session.attach(params, model)
    groups = get_parameter_groups_with_lrs(model, lr=args.lr, include_names=True)
    # The default of 3 shrinks a parameter with outliers in the first step.
    no_limit = {"param_max_rms": 1e6}
    optimizer = ScaledAdam(groups, lr=args.lr, clipping_scale=2.0, **no_limit)
    dataset = session.wrap_dataset(K2SpeechRecognitionDataset(return_cuts=True), cuts)
    sampler = SimpleCutSampler(
        cuts, max_duration=args.max_duration, shuffle=True, seed=params["seed"]
    )
    for step, batch in zip(tqdm(range(args.steps), desc="Steps"), sampler):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        loss, _ = recipe.compute_loss(params, model, sp, dataset[batch], True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    session.detach()


def run(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Return a row of WERs for the student and for each training of it."""

    def student(equalized: bool = False) -> Tuple[nn.Module, Dict[str, Any]]:
        model, settings = load_model(args.recipe, args.exp_dir, args.epoch)
        if args.factor != 1:
            add_outliers(model, args.factor)
        if equalized:
            equalize(model)
        return model, settings

    model, settings = load_model(args.recipe, args.exp_dir, args.epoch)
    measure = Measure(
        args, settings, load_tokenizer(args.bpe_model, settings["vocab_size"])
    )
    rows = [measure("the checkpoint", None, model)]
    if args.factor != 1:
        rows.append(measure("with outliers", None, student()[0]))
    rows.append(measure("equalized", None, student(True)[0]))
    for seed in map(int, args.seeds.split()):
        for name, start, equalized in WAYS:
            torch.manual_seed(seed)
            model, settings = student(equalized)
            int8 = {"kd_int8_from": start, "kd_int8_scales": args.scales}
            train(model, dict(settings, seed=seed), args, **int8)
            rows.append(measure(name, seed, model))
    return rows


def show_outliers(row: Dict[str, Any], count: int = 3) -> None:
    """Print the accounts of the layers of the largest errors, and the mean."""
    print(f"\n{row['model']}, seed {row['seed']}:\n")
    names = list(row["outliers"][0])
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for account in (*row["outliers"][:count], row["outliers"][-1]):
        cells = [f"{account[name]:.3g}" for name in names[1:]]
        print(f"| {' | '.join([account['name'], *cells])} |")


def show(row: Dict[str, Any]) -> None:
    cells = [row["model"], "-" if row["seed"] is None else str(row["seed"])]
    for head in HEADS:
        cells += [f"{row[head][form]:.2f}" for form in FORMS]
        cells.append(f"{row[head]['int8'] / max(row[head]['fp32'], 1e-9):.2f}")
    tqdm.write(f"| {' | '.join(cells)} |")


def main() -> None:
    args = get_args()
    torch.set_num_threads(args.num_threads)
    with one_sentence():
        if args.factor < 1:
            raise KDError(f"--factor is {args.factor}: give 1 or more")
        heads = "CTC fp32 | int8 | ratio | transducer fp32 | int8 | ratio"
        print(f"| model | seed | {heads} |\n|{'---|' * 8}", flush=True)
        rows = run(args)
    for name in dict.fromkeys(row["model"] for row in rows):
        of_name = [row for row in rows if row["model"] == name]
        means = {
            head: {form: mean(row[head][form] for row in of_name) for form in FORMS}
            for head in HEADS
        }
        if len(of_name) > 1:
            show({"model": f"{name}, mean", "seed": None, **means})
    for row in rows[:6]:
        show_outliers(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
