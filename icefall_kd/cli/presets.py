"""Lists the presets, with what they cost."""

import json
from itertools import groupby
from typing import Any, Dict

import click

from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds, count_parameters
from icefall_kd.student.presets import PRESETS, preset, preset_names

SECONDS = 10.0  # of the utterance that multiply-adds are counted for

# What a recipe adds to a preset: librispeech's defaults, with both heads.
_RECIPE = {
    "feature_dim": 80,
    "context_size": 2,
    "use_transducer": True,
    "use_ctc": True,
    "causal": False,
}
_COLUMNS = (
    ("preset", "<"),
    ("layers", "<"),
    ("encoder dim", "<"),
    ("feed-forward", "<"),
    ("decoder", ">"),
    ("M params", ">"),
    ("G/s", ">"),
)


def _rows(vocab_size: int) -> Dict[str, Dict[str, Any]]:
    if vocab_size < 1:
        raise KDError(f"the vocabulary size is {vocab_size}, and must be 1 or more")
    rows = {}
    for name in preset_names():
        settings = {**_RECIPE, "vocab_size": vocab_size, **preset(name)}
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

    Parameters and multiply-adds are those of a model with transducer and CTC head at
    ``vocab_size`` and 80 feature bins, as
    :func:`~icefall_kd.student.count.count_multiply_adds` counts an utterance of 10 s.

    Raises:
      KDError: an empty vocabulary.
    """
    rows = _rows(vocab_size)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [[name for name, _ in _COLUMNS]]
    for name, row in rows.items():
        s = row["settings"]
        table.append(
            [
                name,
                *(_compact(s[k]) for k in ("num_encoder_layers", "encoder_dim")),
                _compact(s["feedforward_dim"]),
                str(s["decoder_dim"]),
                f"{row['parameters']['all'] / 1e6:.2f}",
                f"{row['multiply_adds_per_second']['all'] / 1e9:.2f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        cells = zip(line, widths, (side for _, side in _COLUMNS))
        click.echo("  ".join(f"{c:{side}{w}}" for c, w, side in cells).rstrip())
    s = PRESETS["s"]
    click.echo(
        f"\nAt a vocabulary of {vocab_size}, with transducer and CTC head; G/s: 10^9 "
        "multiply-adds for a second of\naudio. Of all but xl: "
        f"query/pos/value head dims {s['query_head_dim']}/{s['pos_head_dim']}/"
        f"{s['value_head_dim']}; --json shows the rest."
    )
