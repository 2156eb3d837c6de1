"""What is installed, and how to get what is missing."""

from importlib import import_module, metadata
from typing import List, Tuple

import click

# name of the module, of its distribution, whether it is needed, how to get it
_PARTS: List[Tuple[str, str, str, str]] = [
    ("torch", "torch", "needed", "pip install torch"),
    ("lhotse", "lhotse", "needed", "pip install lhotse urllib3"),
    ("k2", "k2", "one of these", "k2's wheel for your torch"),
    ("fast_rnnt", "fast_rnnt", "one of these", "tools/install_native.py fast_rnnt"),
    ("sentencepiece", "sentencepiece", "recipe", "pip install sentencepiece"),
    ("torchaudio", "torchaudio", "recipe", "pip install torchaudio"),
    ("kaldialign", "kaldialign", "recipe", "pip install kaldialign"),
    ("zipformer.modules", "zipformer", "egs/digits", "pip install zipformer==0.1.3"),
    ("icefall", "icefall", "egs/librispeech", "put icefall on PYTHONPATH"),
    ("kaldifeat", "kaldifeat", "optional", "tools/install_native.py kaldifeat"),
]


def _version(module: str, distribution: str) -> str:
    """The version, or "" where the module can't be imported."""
    try:
        imported = import_module(module)
    except Exception:  # a broken binary raises whatever it likes
        return ""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(imported, "__version__", "found"))


def doctor() -> None:
    rows = []
    for module, distribution, need, install in _PARTS:
        rows.append((distribution, _version(module, distribution), need, install))
    found = {name for name, version, *_ in rows if version}
    click.echo(f"{'part':<15}{'version':<22}{'for':<17}to install")
    for name, version, need, install in rows:
        shown = "" if version else install
        click.echo(f"{name:<15}{version or 'missing':<22}{need:<17}{shown}".rstrip())
    engine = next((e for e in ("k2", "fast_rnnt") if e in found), None)
    click.echo(f"transducer engine: {engine or 'none'}")
    missing = [n for n, v, need, _ in rows if need == "needed" and not v]
    if missing or engine is None:
        what = ", ".join(missing) or "k2 and fast_rnnt"
        click.echo(f"icefall_kd: error: missing {what}: see the last column", err=True)
        raise SystemExit(1)
