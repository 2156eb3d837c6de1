"""What a store holds, as a table."""

from typing import Dict, Iterable

import click
from lhotse.cut import Cut

from icefall_kd.cli.text_table import text_table
from icefall_kd.kinds.distribution import DistributionKind
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import read_fingerprint, tracks_with_targets
from icefall_kd.types import index_rows


def print_stats(cuts: Iterable[Cut]) -> None:
    """Print bytes a frame, entropy, share of blanks, stored tokens and mean tail.

    Args:
      cuts: The cuts of a dump.
    """
    frames = cut_count = without_targets = 0
    sizes: Dict[str, float] = {}  # bytes by part
    sums: Dict[str, float] = {}  # over frames
    formats: Dict[str, str] = {}
    fingerprint = None
    for cut in cuts:
        tracks = tracks_with_targets(cut)
        without_targets += not tracks
        for _, inner, pointer in tracks:
            fingerprint = read_fingerprint(pointer.store)
            described = {
                name: kind
                for name, kind in fingerprint.kinds.items()
                if isinstance(kind, DistributionKind)
            }
            targets = collate_targets([inner], kinds=list(described))
            n = int(targets.lens[0])
            cut_count += 1
            frames += n
            for name, size in pointer.sizes.items():
                sizes[name] = sizes.get(name, 0) + size * n / pointer.frames
            for kind_name, kind in described.items():
                rows = index_rows(targets.parts[kind_name], 0)
                for name, (value, formats[name]) in kind.describe(rows).items():
                    sums[name] = sums.get(name, 0) + value
    if not frames:
        click.echo("no cut has targets")
        return
    rows = [("cuts", f"{cut_count:,}"), ("frames", f"{frames:,}")]
    if without_targets:
        rows.insert(1, ("cuts without targets", f"{without_targets:,}"))
    rows += [(f"bytes a frame, {n}", f"{s / frames:.2f}") for n, s in sizes.items()]
    rows.append(("forms", ", ".join(fingerprint.forms.values())))
    rows += [(n, formats[n].format(s / frames)) for n, s in sums.items()]
    click.echo(text_table(rows))
