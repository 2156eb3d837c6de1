"""Parameters and multiply-adds of a Zipformer, from its settings alone.

The functions add up the modules of icefall's zipformer.py, subsampling.py, decoder.py,
joiner.py and model.py. They build no model and import no torch. Models with adapters or
LoRA are refused. The multiply-adds of an attention decoder are not counted, as greedy
search doesn't run it.
"""

from typing import Any, Dict, List, NamedTuple

from icefall_kd.errors import KDError
from icefall_kd.student.presets import embed_channels, per_stack, to_ints
from icefall_kd.zipformer import encoder_frames, stack_frames

FRAMES_PER_SECOND = 100  # of features
# Of the ConvNeXt after Conv2dSubsampling: hidden channels for each channel, and the
# kernel.
_CONVNEXT_RATIO = 3
_CONVNEXT_KERNEL = 7 * 7


class StackSizes(NamedTuple):
    """The sizes of one encoder stack."""

    downsample: int
    layers: int
    dim: int
    heads: int
    query: int  # channels of a head, as the next two
    pos: int
    value: int
    feedforward: int
    kernel: int

    @property
    def feedforward_dims(self) -> List[int]:
        """Hidden channels of the three feed-forward modules."""
        return [self.feedforward * n // 4 for n in (3, 4, 5)]

    @property
    def nonlin_dim(self) -> int:
        """Hidden channels of the nonlinear attention."""
        return 3 * self.dim // 4

    @property
    def query_key_pos(self) -> int:
        """Channels of all heads' queries, keys and position queries."""
        return self.heads * (2 * self.query + self.pos)


def stacks_of(settings: Dict[str, Any]) -> List[StackSizes]:
    """The sizes of each stack, by Zipformer's width rule."""
    names = (
        "downsampling_factor",
        "num_encoder_layers",
        "encoder_dim",
        "num_heads",
        "query_head_dim",
        "pos_head_dim",
        "value_head_dim",
        "feedforward_dim",
        "cnn_module_kernel",
    )
    return [StackSizes(*row) for row in zip(*(per_stack(settings, n) for n in names))]


def _number(settings: Dict[str, Any], name: str) -> int:
    numbers = to_ints(settings, name)
    if len(numbers) != 1:
        raise KDError(
            f"the setting {name} is {settings[name]!r}, and must be one number"
        )
    return numbers[0]


def _refuse_variants(settings: Dict[str, Any]) -> None:
    added = [name for name in ("use_adapters", "lora_r") if settings.get(name)]
    if added == ["lora_r"] and not settings.get("use_lora", True):
        return
    for name in added:
        raise KDError(
            f"{name} is {settings[name]}, and what it adds to the model isn't counted: "
            "give the settings of the model without it"
        )


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _width(settings: Dict[str, Any]) -> int:
    """Frequencies that Conv2dSubsampling leaves of ``feature_dim``."""
    bins = _number(settings, "feature_dim")
    if bins < 7:
        raise KDError(f"feature_dim is {bins}, and Zipformer needs 7 or more")
    return ((bins - 1) // 2 - 1) // 2


# Parameters


def _embed_parameters(settings: Dict[str, Any], dim: int) -> int:
    channels = (1, *embed_channels(settings))
    last, hidden = channels[-1], _CONVNEXT_RATIO * channels[-1]
    convs = sum(_linear(9 * a, b) for a, b in zip(channels, channels[1:]))
    convnext = last * (_CONVNEXT_KERNEL + 1)
    convnext += _linear(last, hidden) + _linear(hidden, last)
    out = _linear(_width(settings) * last, dim)
    return convs + convnext + out + dim + 1  # BiasNorm: a bias and a scale


def _layer_parameters(s: StackSizes, pos_dim: int, causal: bool) -> int:
    d, values = s.dim, s.heads * s.value
    attention = _linear(d, s.query_key_pos) + pos_dim * s.heads * s.pos
    attention += 2 * (_linear(d, values) + _linear(values, d))
    feedforward = sum(_linear(d, h) + _linear(h, d) for h in s.feedforward_dims)
    nonlin = _linear(d, 3 * s.nonlin_dim) + _linear(s.nonlin_dim, d)
    depthwise = d * (s.kernel + 1)
    if causal:  # half a kernel to the left, and two scales at a chunk's edges
        depthwise += d * ((s.kernel + 1) // 2 + 1) + 2 * d * s.kernel
    conv = 2 * (_linear(d, 2 * d) + depthwise + _linear(d, d))
    scales = 4 * d + 1  # three bypasses, and BiasNorm
    return attention + feedforward + nonlin + conv + scales


def _encoder_parameters(settings: Dict[str, Any], stacks: List[StackSizes]) -> int:
    pos_dim, causal = _number(settings, "pos_dim"), bool(settings.get("causal"))
    total = 2  # the weights of the last downsampling
    for s in stacks:
        total += s.layers * _layer_parameters(s, pos_dim, causal)
        if s.downsample > 1:  # weights, and the bypass around the stack
            total += s.downsample + s.dim
    return total


def _attention_decoder_parameters(settings: Dict[str, Any], memory: int) -> int:
    """A Transformer decoder of icefall's attention_decoder.py."""
    vocab = _number(settings, "vocab_size")
    d, layers, a, f = (
        _number(settings, f"attention_decoder_{name}")
        for name in ("dim", "num_layers", "attention_dim", "feedforward_dim")
    )
    self_attention = 3 * _linear(d, a) + _linear(a, d)
    cross = _linear(d, a) + 2 * _linear(memory, a) + _linear(a, d)
    layer = self_attention + cross + _linear(d, f) + _linear(f, d) + 3 * 2 * d
    return vocab * d + layers * layer + _linear(d, vocab)


def count_parameters(settings: Dict[str, Any]) -> Dict[str, int]:
    """Count the parameters of the model that ``get_model(settings)`` would build.

    Each number equals the sum of ``p.numel()`` over that part.

    Args:
      settings: By the names of the recipe's params. Missing heads, ``causal`` and
        ``embed_channels`` are icefall's defaults: a transducer alone, not causal, and a
        front end of 8, 32 and 128 channels.

    Returns:
      ``encoder_embed``, ``encoder``, ``decoder``, ``joiner``, ``simple`` (both
      projections of the simple loss), ``ctc_output``, ``attention_decoder``, and their
      sum, ``all``; a head that the model lacks has 0.

    Raises:
      KDError: a setting that is missing or no number, adapters, or LoRA.
    """
    _refuse_variants(settings)
    stacks = stacks_of(settings)
    vocab = _number(settings, "vocab_size")
    widest = max(s.dim for s in stacks)
    parts = {
        "encoder_embed": _embed_parameters(settings, stacks[0].dim),
        "encoder": _encoder_parameters(settings, stacks),
        "decoder": 0,
        "joiner": 0,
        "simple": 0,
        "ctc_output": 0,
        "attention_decoder": 0,
    }
    if settings.get("use_transducer", True):
        d, j = _number(settings, "decoder_dim"), _number(settings, "joiner_dim")
        parts["decoder"] = vocab * d + _decoder_products(settings)
        parts["joiner"] = _linear(widest, j) + _linear(d, j) + _linear(j, vocab)
        parts["simple"] = _linear(widest, vocab) + _linear(d, vocab)
    if settings.get("use_ctc", False):
        parts["ctc_output"] = _linear(widest, vocab)
    if settings.get("use_attention_decoder", False):
        parts["attention_decoder"] = _attention_decoder_parameters(settings, widest)
    return {**parts, "all": sum(parts.values())}


# Multiply-adds


def _embed_products(settings: Dict[str, Any], frames: int, dim: int) -> int:
    bins = _number(settings, "feature_dim")
    times = (frames - 2, (frames - 3) // 2, (frames - 7) // 2)
    widths = (bins, (bins - 1) // 2, _width(settings))
    channels = (1, *embed_channels(settings))
    total = sum(
        t * w * 9 * a * b for t, w, a, b in zip(times, widths, channels, channels[1:])
    )
    last, points = channels[-1], times[-1] * widths[-1]
    total += points * last * (_CONVNEXT_KERNEL + 2 * _CONVNEXT_RATIO * last)
    return total + points * last * dim


def _layer_products(s: StackSizes, n: int, pos_dim: int, causal: bool) -> int:
    """Multiply-adds of a layer over ``n`` frames."""
    d, values, offsets = s.dim, s.heads * s.value, 2 * n - 1
    attention = n * d * s.query_key_pos + n * n * s.heads * s.query
    position = offsets * s.heads * s.pos * (pos_dim + n)
    self_attention = 2 * (2 * n * d * values + n * n * values)
    nonlin = 4 * n * d * s.nonlin_dim + n * n * s.nonlin_dim  # with one head's weights
    feedforward = 2 * n * d * sum(s.feedforward_dims)
    taps = s.kernel + ((s.kernel + 1) // 2 if causal else 0)
    conv = 2 * n * d * (3 * d + taps)
    return attention + position + self_attention + nonlin + feedforward + conv


def _encoder_products(
    settings: Dict[str, Any], stacks: List[StackSizes], frames: int
) -> int:
    """Multiply-adds of all stacks; ``frames`` are stack frames (50 Hz)."""
    pos_dim, causal = _number(settings, "pos_dim"), bool(settings.get("causal"))
    total = 2 * (-(-frames // 2)) * max(s.dim for s in stacks)  # the last downsampling
    for s in stacks:
        n = -(-frames // s.downsample)
        total += s.layers * _layer_products(s, n, pos_dim, causal)
        if s.downsample > 1:  # a weighted sum of frames; upsampling only repeats
            total += n * s.downsample * s.dim
    return total


def _decoder_products(settings: Dict[str, Any]) -> int:
    """Weights of the stateless decoder's convolution, in groups of four channels."""
    dim, context = _number(settings, "decoder_dim"), _number(settings, "context_size")
    return dim * 4 * context if context > 1 else 0


def count_multiply_adds(
    settings: Dict[str, Any], seconds: float = 10.0
) -> Dict[str, float]:
    """Count the multiply-adds of decoding for each second of audio.

    One utterance goes through the encoder as a whole, as in ``forward``: T feature
    frames become T50 = (T - 7) // 2 stack frames and T25 = (T50 + 1) // 2 frames. The
    n = ceil(T50 / downsampling) frames of a stack attend to one another, which costs
    n^2 (heads (query + 2 pos + 2 value) + 3/4 dim) a layer. A causal model is counted
    in the same way, as its masks save no products (streaming with caches would).

    The heads are counted as greedy search runs them. CTC: ``ctc_output`` once a frame.
    Transducer: the encoder's projection, the decoder, its projection and the joiner's
    output layer once a frame, which is the most for one token a frame (after a blank
    the decoder need not run again). ``all`` has both heads where a model has both.

    Matrix products, convolutions and the weighted sums of downsampling are counted;
    biases, norms, activations, softmax, bypasses, embeddings and other element-wise
    operations are not.

    Args:
      settings: As in :func:`count_parameters`.
      seconds: The utterance's length.

    Returns:
      ``encoder_embed``, ``encoder``, ``decoder``, ``joiner``, ``ctc_output``, and their
      sum, ``all``, per second of audio.

    Raises:
      KDError: as in :func:`count_parameters`, or an utterance of less than 9 frames.
    """
    _refuse_variants(settings)
    frames = round(seconds * FRAMES_PER_SECOND)
    if frames < 9:
        raise KDError(
            f"an utterance of {seconds} s is too short for Zipformer: give 0.09 s or "
            "more"
        )
    stacks = stacks_of(settings)
    vocab = _number(settings, "vocab_size")
    widest = max(s.dim for s in stacks)
    t50 = stack_frames(frames)
    t25 = encoder_frames(frames)
    parts = {
        "encoder_embed": _embed_products(settings, frames, stacks[0].dim),
        "encoder": _encoder_products(settings, stacks, t50),
        "decoder": 0,
        "joiner": 0,
        "ctc_output": 0,
    }
    if settings.get("use_transducer", True):
        d, j = _number(settings, "decoder_dim"), _number(settings, "joiner_dim")
        parts["decoder"] = t25 * _decoder_products(settings)
        parts["joiner"] = t25 * j * (widest + d + vocab)
    if settings.get("use_ctc", False):
        parts["ctc_output"] = t25 * widest * vocab
    total = {**parts, "all": sum(parts.values())}
    return {part: n / seconds for part, n in total.items()}
