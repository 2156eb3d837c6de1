#!/usr/bin/env python3
"""
Give cuts the teacher's n-best lists, found by a beam search of its transducer.

Usage:
  ./local/nbest_cuts.py --exp-dir exp/teacher --epoch 4 --num-paths 4 \
    --bpe-model data/lang_bpe_54/bpe.model IN_CUTS OUT_CUTS

Each list goes to the cut's custom field kd_nbest (icefall_kd.kinds.nbest); the
transcript stays as it is. Scores are log-probabilities of the texts, over all their
alignments in the beam. A cut that the teacher can't run on, such as
one too short for its encoder, gets no list.
"""

import argparse
import math
from typing import Dict, List, Tuple

import sentencepiece as spm
import torch
from lhotse import CutSet
from script_utils import check_range, run_script, staged_dir
from teacher_utils import batches, load_teacher, memory_words, teacher_parser

from icefall_kd import ModelTap, write_nbest
from icefall_kd.memory import enough_memory


def get_args() -> argparse.Namespace:
    parser = teacher_parser(__doc__)
    parser.add_argument(
        "--num-paths", type=int, default=4, help="texts of a cut, at most"
    )
    parser.add_argument(
        "--beam-size", type=int, default=8, help="token sequences at a frame"
    )
    return parser.parse_args()


def add(scores: Dict, key, score: float) -> None:
    """Make ``scores[key]`` the logarithm of the sum of exp(it) and exp(``score``).

    ``scores`` and ``key`` are a dictionary and any key of it, there already or not.
    """
    old = scores.get(key)
    if old is not None:
        low, high = sorted((old, score))
        score = high + math.log1p(math.exp(low - high))
    scores[key] = score


def best_first(scores: Dict) -> List[Tuple]:
    """Return the items of ``scores``, the highest score first."""
    return sorted(scores.items(), key=lambda item: -item[1])


@torch.no_grad()
def nbest_search(
    model: torch.nn.Module, encoder_out: torch.Tensor, lens: List[int], beam_size: int
) -> List[List[Tuple[List[int], float]]]:
    """Modified beam search, as icefall's: a frame emits one token at most, and the
    alignments of equal token sequences add up.

    Args:
      encoder_out: (N, T, C).
      lens: Valid frames.

    Returns:
      Token sequences of each utterance with their log-probabilities, best first.
    """
    decoder, joiner = model.decoder, model.joiner
    unk_id = getattr(model, "unk_id", decoder.blank_id)
    silent = (decoder.blank_id, unk_id)
    size = decoder.context_size
    start = (-1,) * (size - 1) + (decoder.blank_id,)
    am = joiner.encoder_proj(encoder_out)
    beams = [{start: 0.0} for _ in lens]
    for t in range(max(lens)):
        active = [i for i, n in enumerate(lens) if t < n]
        hyps = [list(beams[i].items()) for i in active]
        flat = [(i, y, score) for i, b in zip(active, hyps) for y, score in b]
        index = torch.tensor([i for i, _, _ in flat])
        contexts = torch.tensor([y[-size:] for _, y, _ in flat])
        lm = joiner.decoder_proj(decoder(contexts, need_pad=False)).squeeze(1)
        log_probs = joiner(am[index, t], lm, project_input=False).log_softmax(-1)
        log_probs = log_probs.double() + torch.tensor([[x] for _, _, x in flat])
        # One utterance has so many hypotheses, another fewer.
        parts = log_probs.split([len(b) for b in hyps])
        vocab_size = log_probs.size(1)
        scores = torch.nn.utils.rnn.pad_sequence(
            [part.flatten() for part in parts], True, -math.inf
        )
        top, arcs = scores.topk(min(beam_size, scores.size(1)))
        for i, b, values, row in zip(active, hyps, top.tolist(), arcs.tolist()):
            beams[i] = {}
            for value, arc in zip(values, row):
                if value > -math.inf:
                    hyp, token = divmod(arc, vocab_size)
                    y = b[hyp][0]
                    add(beams[i], y if token in silent else (*y, token), value)
    return [[(list(y[size:]), x) for y, x in best_first(beam)] for beam in beams]


def texts_of(
    sp: spm.SentencePieceProcessor, hyps: List[Tuple[List[int], float]], num_paths: int
) -> List[Tuple[str, float]]:
    """Return the ``num_paths`` best texts of ``hyps``, which ``sp`` decodes.

    The scores of token sequences that give one text add up.
    """
    texts: Dict[str, float] = {}
    for tokens, score in hyps:
        add(texts, sp.decode(tokens).strip(), score)
    return best_first(texts)[:num_paths]


def main() -> None:
    args = get_args()
    check_range(args.num_paths, 1, "--num-paths", 1000)
    check_range(args.beam_size, args.num_paths, "--beam-size", 1000)
    model, sp, cuts, usable = load_teacher(args)
    decoded = {}
    with ModelTap(model, with_ctc=False) as tap:
        for batch, x, x_lens in batches(usable, "Decoding"):
            with enough_memory(*memory_words(batch)):
                out = tap.encode(x, x_lens)
                lens = out.encoder_out_lens.tolist()
                hyps = nbest_search(model, out.encoder_out, lens, args.beam_size)
            for cut, paths in zip(batch, hyps):
                decoded[cut.id] = write_nbest(cut, texts_of(sp, paths, args.num_paths))
    with staged_dir(args.out_cuts.parent) as scratch:
        target = scratch / args.out_cuts.name
        CutSet.from_cuts(decoded.get(cut.id, cut) for cut in cuts).to_file(target)
        target.replace(args.out_cuts)
    bare = len(cuts) - len(decoded)
    print(f"{args.out_cuts}: {len(decoded)} cuts with n-best lists, {bare} without")


if __name__ == "__main__":
    run_script(main)
