"""Named settings of Zipformers: icefall's own, and a ladder below its smallest.

A preset holds the shape of a model. Its vocabulary, heads, features and whether it is
causal are the recipe's.
"""

from typing import Any, Dict, List, Tuple

from icefall_kd.errors import KDError

# The defaults of icefall's parsers, which all but XL keep.
_COMMON = {
    "downsampling_factor": "1,2,4,8,4,2",
    "num_heads": "4,4,4,8,4,4",
    "query_head_dim": "32",
    "pos_head_dim": "4",
    "value_head_dim": "12",
    "pos_dim": 48,
    "cnn_module_kernel": "31,31,15,15,15,31",
    "decoder_dim": 512,
    "joiner_dim": 512,
}

#: Of each preset its name, and the options of train.py that give it its shape.
PRESETS: Dict[str, Dict[str, Any]] = {
    # egs/multi_zh-hans/ASR/RESULTS.md, zipformer-xl, which is causal
    "xl": {
        **_COMMON,
        "num_encoder_layers": "2,3,5,6,5,3",
        "feedforward_dim": "1536,2048,3072,4096,3072,1536",
        "encoder_dim": "512,768,1024,1536,1024,512",
        "encoder_unmasked_dim": "192,192,256,320,256,192",
        "query_head_dim": "48",
        "value_head_dim": "18",
        "decoder_dim": 768,
        "joiner_dim": 768,
    },
    # egs/librispeech/ASR/RESULTS.md
    "l": {
        **_COMMON,
        "num_encoder_layers": "2,2,4,5,4,2",
        "feedforward_dim": "512,768,1536,2048,1536,768",
        "encoder_dim": "192,256,512,768,512,256",
        "encoder_unmasked_dim": "192,192,256,320,256,192",
    },
    "m": {
        **_COMMON,
        "num_encoder_layers": "2,2,3,4,3,2",
        "feedforward_dim": "512,768,1024,1536,1024,768",
        "encoder_dim": "192,256,384,512,384,256",
        "encoder_unmasked_dim": "192,192,256,256,256,192",
    },
    "s": {
        **_COMMON,
        "num_encoder_layers": "2,2,2,2,2,2",
        "feedforward_dim": "512,768,768,768,768,768",
        "encoder_dim": "192,256,256,256,256,256",
        "encoder_unmasked_dim": "192,192,192,192,192,192",
    },
    # No recipe's: each is a slice of the one above, so of S, M and L too.
    "10m": {
        **_COMMON,
        "num_encoder_layers": "2,2,2,2,2,2",
        "feedforward_dim": "320,384,448,512,448,384",
        "encoder_dim": "128,160,160,192,160,160",
        "encoder_unmasked_dim": "128,128,128,128,128,128",
        "decoder_dim": 256,
        "joiner_dim": 256,
    },
    "6m": {
        **_COMMON,
        "num_encoder_layers": "2,2,2,2,2,2",
        "feedforward_dim": "192,256,320,320,320,256",
        "encoder_dim": "96,112,128,144,128,112",
        "encoder_unmasked_dim": "96,96,96,96,96,96",
        "decoder_dim": 256,
        "joiner_dim": 256,
    },
    "3m": {
        **_COMMON,
        "num_encoder_layers": "1,1,2,2,2,1",
        "feedforward_dim": "128,160,224,256,224,160",
        "encoder_dim": "64,80,96,112,96,80",
        "encoder_unmasked_dim": "64,64,64,64,64,64",
        "decoder_dim": 160,
        "joiner_dim": 160,
    },
    "1m": {
        **_COMMON,
        "num_encoder_layers": "1,1,1,1,1,1",
        "feedforward_dim": "96,96,112,112,112,96",
        "encoder_dim": "48,48,64,64,64,48",
        "encoder_unmasked_dim": "48,48,48,48,48,48",
        "decoder_dim": 64,
        "joiner_dim": 64,
    },
    # egs/gigaspeech/KWS and egs/wenetspeech/KWS, which are causal
    "kws": {
        **_COMMON,
        "num_encoder_layers": "1,1,1,1,1,1",
        "feedforward_dim": "192,192,192,192,192,192",
        "encoder_dim": "128,128,128,128,128,128",
        "encoder_unmasked_dim": "128,128,128,128,128,128",
        "decoder_dim": 320,
        "joiner_dim": 320,
    },
}

# From the smallest to the largest; no setting is less than the one's before.
LADDER = ("1m", "3m", "6m", "10m", "s", "m", "l", "xl")

STREAMING = "-streaming"

# Channels of the front end's three convolutions, icefall's Conv2dSubsampling. A recipe
# may have an option for them, embed_channels; no recipe of icefall's has.
EMBED_CHANNELS = (8, 32, 128)


def streaming(settings: Dict[str, Any]) -> Dict[str, Any]:
    """The same settings for a causal model, with icefall's usual chunks.

    ``chunk_size`` and ``left_context_frames`` count stack frames (50 Hz); training
    draws one of them for each batch, and -1 is the whole utterance.

    Args:
      settings: By the names of the recipe's params.
    """
    chunks = {"chunk_size": "16,32,64,-1", "left_context_frames": "64,128,256,-1"}
    return {**settings, "causal": True, **chunks}


def preset_names() -> List[str]:
    """All names that :func:`preset` takes, each with its streaming form."""
    return [name + suffix for name in PRESETS for suffix in ("", STREAMING)]


def preset(name: str) -> Dict[str, Any]:
    """The settings of a preset, by the names of the recipe's params.

    Args:
      name: One of :data:`PRESETS`, or such a name followed by ``-streaming``.

    Raises:
      KDError: ``name`` is none of them.
    """
    base = name[: -len(STREAMING)] if name.endswith(STREAMING) else name
    if base not in PRESETS:
        raise KDError(
            f"there is no preset {name!r}: choose of {', '.join(PRESETS)}, or one of "
            f"them with {STREAMING} after it"
        )
    settings = dict(PRESETS[base])
    return settings if base == name else streaming(settings)


def to_ints(settings: Dict[str, Any], name: str) -> Tuple[int, ...]:
    """A setting as a tuple; its value may be ``"2,2,4"``, 2 or (2, 2, 4).

    Args:
      settings: By the names of the recipe's params.
      name: One of them.

    Raises:
      KDError: it is missing, or no list of positive whole numbers.
    """
    value = settings.get(name)
    try:
        values = value.split(",") if isinstance(value, str) else value
        values = values if isinstance(values, (tuple, list)) else [values]
        numbers = tuple(int(v) for v in values)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise KDError(
            f"the setting {name} is {value!r}, and must be a positive whole number or "
            'such numbers with commas, as "2,2,4"'
        )
    return numbers


def per_stack(settings: Dict[str, Any], name: str) -> Tuple[int, ...]:
    """A setting for each stack; a single number is repeated for all of them.

    Args:
      settings: By the names of the recipe's params.
      name: One of them.

    Raises:
      KDError: there are neither one nor as many numbers as stacks.
    """
    numbers = to_ints(settings, name)
    n = len(to_ints(settings, "downsampling_factor"))
    if len(numbers) not in (1, n):
        raise KDError(
            f"the setting {name} has {len(numbers)} numbers ({settings[name]}) and "
            f"downsampling_factor {n}: give each stack one number"
        )
    return numbers * n if len(numbers) == 1 else numbers


def embed_channels(settings: Dict[str, Any]) -> Tuple[int, ...]:
    """Channels of the front end's three convolutions.

    Args:
      settings: By the names of the recipe's params. Without ``embed_channels`` they are
        icefall's, 8, 32 and 128.

    Raises:
      KDError: ``embed_channels`` is not three positive whole numbers.
    """
    if settings.get("embed_channels") is None:
        return EMBED_CHANNELS
    numbers = to_ints(settings, "embed_channels")
    if len(numbers) != len(EMBED_CHANNELS):
        raise KDError(
            f"the setting embed_channels is {settings['embed_channels']!r}, and must "
            'be three numbers, one for each convolution of the front end, as "8,32,128"'
        )
    return numbers
