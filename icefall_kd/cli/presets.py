"""Lists the presets, with what they cost."""

import json
from itertools import groupby
from typing import Any, Dict

import click

from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds, count_parameters
from icefall_kd.student.presets import PRESETS, preset, preset_names

SECONDS = 10.0  # length of the utterance whose multiply-adds are counted

# The settings that a recipe adds to a preset: librispeech's, with both heads.
RECIPE = {
    "feature_dim": 80,
    "context_size": 2,
    "use_transducer": True,
    "use_ctc": True,
    "causal": False,
}
_HEAD = [
    "preset",
    "layers",
    "encoder dim",
    "feed-forward",
    "decoder",
    "M params",
    "G/s",
]


def _rows(vocab_size: int) -> Dict[str, Dict[str, Any]]:
    if vocab_size < 1:
        raise KDError(f"the vocabulary size is {vocab_size}, and must be 1 or more")
    rows = {}
    for name in preset_names():
        settings = {**RECIPE, "vocab_size": vocab_size, **preset(name)}
        rows[name] = {
            "settings": settings,
            "parameters": count_parameters(settings),
            "multiply_adds_per_second": count_multiply_adds(settings, SECONDS),
        }
    return rows


def _compact(value: str) -> str:
    """``"192,256,256"`` as ``192,256x2``."""
    groups = [(v, len(list(same))) for v, same in groupby(value.split(","))]
    return ",".join(v if n == 1 else f"{v}x{n}" for v, n in groups)


def list_presets(as_json: bool, vocab_size: int = 500) -> None:
    """Print every preset, as a table or as one JSON object.

    Parameters and multiply-adds are those of a model with transducer and CTC head and
    80 feature bins, as :func:`~icefall_kd.student.count.count_multiply_adds` counts an
    utterance of 10 s.

    Args:
      as_json: Whether to print JSON.
      vocab_size: The number of tokens.

    Raises:
      KDError: ``vocab_size`` is below 1.
    """
    rows = _rows(vocab_size)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [_HEAD]
    for name, row in rows.items():
        s = row["settings"]
        shape = ("num_encoder_layers", "encoder_dim", "feedforward_dim")
        parameters = f"{row['parameters']['all'] / 1e6:.2f}"
        speed = f"{row['multiply_adds_per_second']['all'] / 1e9:.2f}"
        sizes = [str(s["decoder_dim"]), parameters, speed]
        table.append([name, *(_compact(s[key]) for key in shape), *sizes])
    click.echo(text_table(table, left=4))
    s = PRESETS["s"]
    click.echo(
        f"\nAt a vocabulary of {vocab_size}, with transducer and CTC head; G/s: 10^9 "
        "multiply-adds for a second of\naudio. Of all but xl: "
        f"query/pos/value head dims {s['query_head_dim']}/{s['pos_head_dim']}/"
        f"{s['value_head_dim']}; --json shows the rest."
    )
