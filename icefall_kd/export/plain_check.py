"""Compares each step to the plain form with the last: recipe, plain modules, graph.

Log-probabilities are the largest numbers, and their last bits are anyone's. Of a digits
teacher after training, with log-probabilities down to -41, where two neighbours in
float32 are 3.8e-6 apart, the recipe's own modules in torch were up to 1.5e-5 from
themselves in float64, and as far from what they say of the same utterance in a batch of
three copies. The plain form was 1.5e-5 from float64 too, and from the recipe's modules.
The CTC head's product, a sum of terms up to 37, made 1.3e-5 of it, the encoder 0.7e-5;
probabilities differed by 1.4e-6. So no graph in float32 can be sure to be closer than
that to another one, and how far the recipe's own is from float64 is measured beside.
"""

import itertools
from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from icefall_kd.errors import KDError, first_line, require
from icefall_kd.export.plain_model import (
    PlainDecoder,
    PlainEncoder,
    PlainJoiner,
    WholeModel,
)
from icefall_kd.export.plain_stream import PlainChunkEncoder
from icefall_kd.export.streaming import ChunkEncoder
from icefall_kd.zipformer import MIN_FRAMES, encoder_frames

MAX_CONTEXTS = 5000  # that are compared


@dataclass
class Difference:
    """What a step changed, of one part of the model.

    Attributes:
      part: encoder_out, ctc_log_probs, decoder_out or logits; states of a stream.
      step: ``plain`` for the plain modules in torch against the recipe's, ``onnx`` for
        onnxruntime against those; ``float64`` for the recipe's own against themselves
        in float64, which is no step, and tells what float32 can do.
      num_frames: Feature frames of the utterance; 0 where there is none.
      largest: The largest absolute difference.
      magnitude: The largest absolute value.
    """

    part: str
    step: str
    num_frames: int
    largest: float
    magnitude: float

    @property
    def place(self) -> str:
        """Where it was found, for a sentence."""
        return f" at {self.num_frames} feature frames" if self.num_frames else ""


def compare_encoder(
    whole: WholeModel,
    plain: PlainEncoder,
    graph: onnx.ModelProto,
    inputs: Mapping[str, Tensor],
) -> List[Difference]:
    """Compare encoder and heads at several lengths; without a mask at the only one.

    Args:
      whole: The recipe's model.
      plain: Its encoder for one length.
      graph: The graph of that.
      inputs: Any inputs of the graph, by name.
    """
    num_frames, feature_dim = inputs["features"].shape[1:]
    lengths = {num_frames}
    if "mask" in inputs:  # lengths that fill the last frames of stacks, and do not
        lengths |= {num_frames - 1, num_frames - 3, num_frames // 2, MIN_FRAMES}
    session, differences = _session(graph), []
    in_float64 = whole.double()
    generator = torch.Generator().manual_seed(0)
    for length in sorted(n for n in lengths if n >= MIN_FRAMES):
        x = torch.randn(1, length, feature_dim, generator=generator)
        behind = num_frames - length
        given = {"features": nn.functional.pad(x, (0, 0, 0, behind), value=9.0)}
        if "mask" in inputs:
            given["mask"] = nn.functional.pad(torch.ones(1, length), (0, behind))
        sides = (whole.encode(x), plain(*given.values()), _run(session, given))
        exact = in_float64.encode(x.double())
        for part, *values in zip(plain.heads.names, exact, *sides):
            values = [v[:, : encoder_frames(length)] for v in values]
            differences += _differences(part, length, *values[1:])
            error, magnitude = _largest(*values[:2]), _largest(values[1])
            differences.append(Difference(part, "float64", length, error, magnitude))
    return differences


def compare_chunks(
    recipe: ChunkEncoder,
    plain: PlainChunkEncoder,
    graph: onnx.ModelProto,
    inputs: Mapping[str, Tensor],
) -> List[Difference]:
    """Compare encoder, heads and states of a stream, until its left context is full.

    Args:
      recipe: The recipe's encoder of a chunk.
      plain: The same in the plain form.
      graph: The graph of that.
      inputs: Any inputs of the graph, by name.
    """
    session, differences = _session(graph), []
    names, states = list(inputs)[2:], list(plain.states().values())
    sides: List[List[Tensor]] = [recipe.initial_states(), states, states]
    chunk, left = recipe.chunk_size, recipe.left_context
    generator = torch.Generator().manual_seed(0)
    shape = inputs["features"].shape
    for i in range(left // chunk + 2):
        x = torch.randn(shape, generator=generator)
        mask = (torch.arange(left) >= left - i * chunk).float().unsqueeze(0)
        whole, sides[0] = recipe(x, sides[0])
        given = dict(zip(inputs, (x, mask, *sides[2])))
        outputs = [whole + sides[0][:-1], plain(x, mask, *sides[1])]
        outputs.append(_run(session, given))
        heads = len(whole)
        sides[1:] = [values[heads:] for values in outputs[1:]]
        for part, *values in zip([*plain.heads.names, *names], *outputs):
            part = part if part in plain.heads.names else "states"
            differences += _differences(part, shape[1], *values)
    return differences


def compare_decoder(
    whole: WholeModel, plain: PlainDecoder, graph: onnx.ModelProto
) -> List[Difference]:
    """Compare the decoder after all contexts, or many.

    Args:
      whole: The recipe's model.
      plain: Its decoder without the embedding.
      graph: The graph of that.
    """
    contexts, session = some_contexts(whole.model, False), _session(graph)
    table = whole.model.decoder.embedding.weight
    embeddings = table[contexts.clamp(min=0)] * (contexts >= 0).unsqueeze(-1)
    outputs = [_run(session, {"embeddings": row[None]})[0] for row in embeddings]
    sides = whole.decode(contexts), plain(embeddings), torch.cat(outputs)
    return _differences("decoder_out", 0, *sides)


def compare_joiner(
    whole: WholeModel, plain: PlainJoiner, graph: onnx.ModelProto
) -> List[Difference]:
    """Compare the joiner after all contexts, or many, with random frames.

    Args:
      whole: The recipe's model.
      plain: Its joiner of projected outputs.
      graph: The graph of that.
    """
    decoder_out = whole.decode(some_contexts(whole.model, False))
    generator = torch.Generator().manual_seed(0)
    encoder_out = 3 * torch.randn(decoder_out.shape, generator=generator)
    session = _session(graph)
    outputs = [
        _run(session, {"encoder_out": frame[None], "decoder_out": row[None]})[0]
        for frame, row in zip(encoder_out, decoder_out)
    ]
    logits = whole.model.joiner(encoder_out, decoder_out, project_input=False)
    sides = logits, plain(encoder_out, decoder_out), torch.cat(outputs)
    return _differences("logits", 0, *sides)


def require_close(differences: Sequence[Difference], bound: float) -> None:
    """Refuse a step that changes too much.

    Args:
      differences: What the steps changed.
      bound: The largest difference, for values between -1 and 1; for larger ones it
        grows as they do.

    Raises:
      KDError: A larger one.
    """
    for d in differences:
        if d.step == "float64":
            continue
        limit = bound * max(1.0, d.magnitude)
        require(
            d.largest <= limit,  # not for nan
            f"the step {d.step} to the plain form changes {d.part} by {d.largest:.2g}"
            f"{d.place}, of values up to {d.magnitude:.3g}, "
            f"and `bound` allows {limit:.2g}: give a larger one if that is little "
            "enough",
        )


def some_contexts(model: nn.Module, everything: bool) -> Tensor:
    """Return contexts of a stateless decoder.

    Args:
      model: A recipe's model with a transducer head.
      everything: Whether all of them are asked for, however many.

    Returns:
      (N, context size), token ids and -1 for none; in the order of the table of all
      contexts where they are all.
    """
    size, vocab_size = (
        model.decoder.context_size,
        model.decoder.embedding.num_embeddings,
    )
    ids = range(-1, vocab_size)
    if everything or (vocab_size + 1) ** size <= MAX_CONTEXTS:
        return torch.tensor(list(itertools.product(ids, repeat=size)))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, vocab_size, (MAX_CONTEXTS, size), generator=generator)


def _session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Load a graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's classes share no other
        opset = graph.opset_import[0].version
        raise KDError(
            f"onnxruntime {onnxruntime.__version__} can't load the graph in `opset` "
            f"{opset} ({first_line(error)}): give a lower one"
        ) from error


def _run(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]
) -> List[Tensor]:
    """Run a graph."""
    outputs = session.run(None, {n: value.numpy() for n, value in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]


def _differences(
    part: str, num_frames: int, whole: Tensor, plain: Tensor, onnx_out: Tensor
) -> List[Difference]:
    """What both steps changed."""
    return [
        Difference(part, step, num_frames, _largest(a, b), _largest(whole))
        for step, a, b in (("plain", whole, plain), ("onnx", plain, onnx_out))
    ]


def _largest(a: Tensor, b: Optional[Tensor] = None) -> float:
    """The largest absolute difference of ``a`` and ``b``; of 0 where it is None."""
    return (a if b is None else a - b).abs().max().item()
