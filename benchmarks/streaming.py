#!/usr/bin/env python3
"""
Whether a causal model, heard chunk by chunk, says what icefall's streaming says.

The model is decoded by icefall's streaming_decode.py and by StreamingEncoder with
greedy search, on the same features and the silence that icefall appends; then by the
encoder on the whole utterance under the chunk mask, and chunk by chunk with features
that come in parts of random sizes; and the searches go over the whole output, and over
pieces of random sizes. Counted are utterances with other tokens or frames.

It needs k2 and a checkout of icefall:

  benchmarks/streaming.py --icefall icefall --manifest data/fbank/cuts_dev.jsonl.gz \
    --exp-dir streaming/seed-1/exp-d0 --epoch 3
"""

import argparse
import json
import random
import sys
import types
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from lhotse import CutSet

from icefall_kd import BeamSearch, GreedySearch, StreamingEncoder, search_pieces
from icefall_kd.transcripts.recognizer import CAUSAL_PADDING, SILENCE

LOOK_AHEAD = 13  # feature frames that a chunk needs beyond its own


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--icefall", type=Path, help="A checkout of icefall.")
    add("--exp-dir", type=Path, help="A causal model of the digits recipe.")
    add("--epoch", type=int, default=3)
    add("--manifest", type=Path, help="Cuts with features.")
    add("--num-cuts", type=int, default=50)
    add("--seed", type=int, default=1)
    add("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


def load(args: argparse.Namespace) -> Tuple[Any, torch.nn.Module, Any]:
    """Return params, model and the module streaming_decode, all icefall's."""
    recipe = args.icefall / "egs/librispeech/ASR/zipformer"
    sys.path[:0] = [str(args.icefall), str(recipe)]
    kaldifeat = types.ModuleType("kaldifeat")  # its features are not needed
    kaldifeat.Fbank = kaldifeat.FbankOptions = object
    sys.modules.setdefault("kaldifeat", kaldifeat)
    import streaming_decode
    from train import get_model, get_params, get_parser

    path = args.exp_dir / f"epoch-{args.epoch}.pt"
    checkpoint = torch.load(path, map_location="cpu")
    params, options = get_params(), vars(get_parser().parse_args([]))
    params.update({name: checkpoint.get(name, v) for name, v in options.items()})
    params.feature_dim = checkpoint["feature_dim"]
    params.vocab_size, params.blank_id = checkpoint["vocab_size"], 0
    params.decoding_method = "greedy_search"
    model = get_model(params)
    model.load_state_dict(checkpoint["model"])
    model.device = torch.device("cpu")
    return params, model.eval(), streaming_decode


def by_icefall(params, model, module, x: torch.Tensor):
    """Return tokens, their frames, encoder output, and the features with silence."""
    stream = module.DecodeStream(params, "", module.get_init_states(model))
    stream.set_features(x, tail_pad_len=CAUSAL_PADDING)
    outs: List[torch.Tensor] = []
    frames: List[int] = []
    search = module.greedy_search

    def frame_by_frame(model, encoder_out, streams):  # it does not tell the frames
        for t in range(encoder_out.size(1)):
            before = len(stream.hyp)
            search(model=model, encoder_out=encoder_out[:, t : t + 1], streams=streams)
            if len(stream.hyp) > before:
                frames.append(sum(out.size(1) for out in outs[:-1]) + t)

    def keep(module, inputs, output):
        outs.append(inputs[0])

    module.greedy_search = frame_by_frame
    hook = model.joiner.encoder_proj.register_forward_hook(keep)
    try:
        while not stream.done:
            module.decode_one_chunk(params, model, [stream])
    finally:
        hook.remove()
        module.greedy_search = search
    more = len(outs) * 2 * int(params.chunk_size) + LOOK_AHEAD - len(stream.features)
    x = torch.nn.functional.pad(stream.features, (0, 0, 0, more), value=SILENCE)
    return stream.decoding_result(), frames, outs, x


def parts(x: torch.Tensor, most: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """Yield the rows of ``x``, from 1 to ``most`` at a time."""
    begin = 0
    while begin < len(x):
        end = begin + rng.randint(1, most)
        yield x[begin:end]
        begin = end


def found(search: Any, pieces) -> Tuple[List[int], List[int]]:
    """Return tokens and frames in encoder output that comes piece by piece."""
    *_, result = search_pieces(search, pieces)
    return result.hypotheses[0].tokens, result.hypotheses[0].frames


@torch.no_grad()
def main() -> None:
    args = get_args()
    if not (args.icefall and args.exp_dir and args.manifest):
        raise SystemExit("give --icefall, --exp-dir and --manifest: see --help")
    torch.set_num_threads(1)
    params, model, module = load(args)
    encoder, rng = StreamingEncoder(model), random.Random(args.seed)
    greedy, beam = GreedySearch(model), BeamSearch(model)
    differ = {"icefall's streaming": 0, "whole": 0, "greedy": 0, "beam": 0}
    largest: Dict[str, float] = {"icefall's streaming": 0.0, "whole": 0.0}
    cuts, tokens = CutSet.from_file(args.manifest).subset(first=args.num_cuts), 0

    def compare(name: str, out: torch.Tensor, expected: torch.Tensor) -> None:
        worst = (out - expected).abs().max().item()
        largest[name] = max(largest[name], worst)

    for cut in cuts:
        x = torch.from_numpy(cut.load_features())
        y, frames, outs, padded = by_icefall(params, model, module, x)
        # What the last chunk looks ahead at is no frame of its own there.
        ours = list(encoder(padded))[: len(outs)]
        compare("icefall's streaming", torch.cat(ours, 1), torch.cat(outs, 1))
        differ["icefall's streaming"] += found(greedy, ours) != (y, frames)
        tokens += len(y)
        whole, _ = model.forward_encoder(x[None], torch.tensor([len(x)]))
        chunks = list(encoder(parts(x, 60, rng)))
        compare("whole", torch.cat(chunks, 1), whole)
        expected = found(greedy, [whole])
        differ["whole"] += found(greedy, chunks) != expected
        pieces = [piece[None] for piece in parts(whole[0], 20, rng)]
        differ["greedy"] += found(greedy, pieces) != expected
        differ["beam"] += found(beam, pieces) != found(beam, [whole])
    print(f"{len(cuts)} utterances, {tokens} tokens in them with icefall's silence")
    for name, count in differ.items():
        more = f", output by at most {largest[name]:.1e}" if name in largest else ""
        print(f"{name}: {count} differ{more}")
    if args.json:
        figures = {"differ": differ, "largest": largest, "tokens": tokens}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
