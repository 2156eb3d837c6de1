#!/usr/bin/env python3
"""
Usage:

  ./zipformer/decode.py --exp-dir exp/teacher --epoch 4 --avg 1 \
    --decoding-method greedy_search

Decoding methods: ctc-greedy-search (the CTC head) and greedy_search (the transducer
head, one symbol a frame). Results go to exp-dir/<method>/: recogs-*, errs-* and
wer-summary-*.
"""

import argparse
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, TextIO, Tuple

import kaldialign
import torch
from asr_datamodule import AsrDataModule
from greedy import METHODS, Recogniser
from tqdm import tqdm
from train import load_bpe_model
from zipformer.utils import AttributeDict, setup_logger, store_transcripts, str2bool

from icefall_kd import KDError, load_model, one_sentence

# (cut id, reference words, recognised words)
Result = Tuple[str, List[str], List[str]]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--epoch", type=int, default=4, help="Use exp-dir/epoch-N.pt.")
    add("--iter", type=int, default=0, help="If positive, use checkpoint-N.pt instead.")
    add("--avg", type=int, default=1, help="How many checkpoints to average.")
    add(
        "--use-averaged-model",
        type=str2bool,
        default=True,
        help="Average over all steps from (epoch - avg), excluded, to epoch.",
    )
    add("--exp-dir", type=str, default="exp/zipformer", help="The experiment folder.")
    add("--bpe-model", type=str, default="data/lang_bpe/bpe.model", help="Tokens.")
    add(
        "--decoding-method",
        type=str,
        default="greedy_search",
        choices=METHODS,
        help="Which head and search.",
    )
    add("--test-set", type=str, default="test", help="Cut set to decode.")
    add("--num-threads", type=int, default=0, help="CPU threads; 0: all cores.")
    return parser


def decode_dataset(
    dl: torch.utils.data.DataLoader, params: AttributeDict, model: torch.nn.Module, sp
) -> List[Result]:
    """Return the reference and the recognised words of each cut that ``dl`` gives.

    ``params`` has the method, and ``sp`` decodes tokens.
    """
    method, results = params.decoding_method, []
    recognise = Recogniser(model, sp, [method])
    for batch in tqdm(dl, desc=f"Decoding {params.test_set}", unit=" batches"):
        hyps = recognise(batch)[method]
        cuts = batch["supervisions"]["cut"]
        texts = batch["supervisions"]["text"]
        for cut, text, hyp in zip(cuts, texts, hyps):
            results.append((cut.id, (text or "").split(), hyp))
    return results


def write_error_stats(f: TextIO, test_set: str, results: List[Result]) -> float:
    """Write counts of errors, the aligned utterances and the confusions to ``f``.

    ``test_set`` names the cuts of ``results``. Returns the WER in percent.
    """
    gap = "*"
    confusions: Dict[Tuple[str, str], int] = defaultdict(int)
    details = []
    for cut_id, ref, hyp in results:
        aligned = kaldialign.align(ref, hyp, gap)
        for pair in aligned:
            confusions[pair] += 1
        shown = [r if r == h else f"({r}->{h})" for r, h in aligned]
        details.append(f"{cut_id}:\t{' '.join(shown)}")
    ins = sum(n for (r, h), n in confusions.items() if r == gap)
    dels = sum(n for (r, h), n in confusions.items() if h == gap)
    subs = sum(n for (r, h), n in confusions.items() if gap not in (r, h) and r != h)
    ref_len = sum(len(ref) for _, ref, _ in results)
    if not ref_len:
        raise KDError(
            f"the cuts of {test_set} have no reference words, so "
            "they have no WER: decode a transcribed set"
        )
    wer = 100.0 * (ins + dels + subs) / ref_len
    line = (
        f"%WER {wer:.2f}% [{ins + dels + subs} / {ref_len}, {ins} ins, {dels} del, "
        f"{subs} sub ]"
    )
    logging.info(f"[{test_set}] {line}")
    print(line, file=f)
    print("\nPER-UTT DETAILS: corr or (ref->hyp)", file=f)
    print("\n".join(details), file=f)
    print("\nCONFUSIONS: count ref -> hyp", file=f)
    for (r, h), n in sorted(confusions.items(), key=lambda x: -x[1]):
        if r != h:
            print(f"{n}   {r} -> {h}", file=f)
    return wer


def save_results(params: AttributeDict, results: List[Result]) -> None:
    """Write the files of ``results`` to the folder that ``params`` name."""
    name = f"{params.test_set}-{params.suffix}.txt"
    results = sorted(results)
    store_transcripts(params.res_dir / f"recogs-{name}", results)
    with open(params.res_dir / f"errs-{name}", "w", encoding="utf8") as f:
        wer = write_error_stats(f, params.test_set, results)
    with open(params.res_dir / f"wer-summary-{name}", "w", encoding="utf8") as f:
        print("settings\tWER", file=f)
        print(f"{params.decoding_method}\t{wer:.2f}", file=f)


@one_sentence()
@torch.no_grad()
def main():
    parser = get_parser()
    AsrDataModule.add_arguments(parser)
    parser.set_defaults(max_duration=200, num_workers=0)
    args = parser.parse_args()
    params = AttributeDict(vars(args))
    torch.set_num_threads(params.num_threads or os.cpu_count() or 1)
    params.res_dir = Path(params.exp_dir) / params.decoding_method
    params.suffix = (
        f"iter-{params.iter}" if params.iter > 0 else f"epoch-{params.epoch}"
    ) + f"-avg-{params.avg}"
    if params.use_averaged_model:
        params.suffix += "-use-averaged-model"

    sp = load_bpe_model(params.bpe_model)
    model, settings = load_model(
        Path(__file__).parent,
        params.exp_dir,
        params.epoch,
        params.iter,
        params.avg,
        params.use_averaged_model,
    )
    if settings["vocab_size"] != sp.get_piece_size():
        raise KDError(
            f"the BPE model {params.bpe_model} has "
            f"{sp.get_piece_size()} symbols and the model {settings['vocab_size']}: "
            "give the bpe.model that it was trained with"
        )
    os.makedirs(params.res_dir, exist_ok=True)
    setup_logger(f"{params.res_dir}/log-decode-{params.suffix}")
    logging.info("Decoding started")
    logging.info(params)
    num_param = sum([p.numel() for p in model.parameters()])
    logging.info(f"Number of model parameters: {num_param}")
    if torch.cuda.is_available():
        model.to("cuda")

    digits = AsrDataModule(args)
    test_dl = digits.test_dataloaders(digits.cuts(params.test_set))
    save_results(params, decode_dataset(test_dl, params, model, sp))
    logging.info("Done!")


if __name__ == "__main__":
    main()
