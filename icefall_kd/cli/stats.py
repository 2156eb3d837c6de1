"""What a store holds, as a table."""

import math
from typing import Iterable, List, Tuple

import click
import torch
from lhotse.cut import Cut

from icefall_kd.targets.dataset import kept_frames, read_ctc
from icefall_kd.targets.store import read_fingerprint, tracks_with_targets
from icefall_kd.types import is_sparse


def print_stats(cuts: Iterable[Cut]) -> None:
    """Print bytes a frame, entropy, share of blanks, kept symbols and mean tail."""
    frames = cut_count = bare = blanks = 0
    entropy = tail = kept = 0.0
    sizes = {}
    found = None
    for cut in cuts:
        tracks = tracks_with_targets(cut)
        bare += not tracks
        for _, inner, pointer in tracks:
            found = read_fingerprint(pointer.store)
            rows = read_ctc(inner, pointer)
            cut_count += 1
            n = kept_frames(inner, pointer)
            frames += n
            for name, size in pointer.sizes.items():
                share = size * n / pointer.frames
                sizes[name] = sizes.get(name, 0) + share
            if rows is None:
                continue
            if is_sparse(rows):
                p, p_tail = rows.log_probs.exp(), rows.log_tail.exp()
                entropy -= float((p * rows.log_probs.clamp(min=-1e4)).sum())
                entropy -= float((p_tail * rows.log_tail.clamp(min=-1e4)).sum())
                tail += float(p_tail.sum())
                kept += float((rows.log_probs > -math.inf).sum())
                best = rows.indices.gather(1, rows.log_probs.argmax(1, keepdim=True))
            else:
                p = rows.exp()
                entropy -= float((p * rows.clamp(min=-1e4)).sum())
                kept += rows.numel()
                best = rows.argmax(1)
            blanks += int(torch.sum(best == found.blank_id))
    if not frames:
        click.echo("no cut has targets")
        return
    rows = [("cuts", f"{cut_count:,}"), ("frames", f"{frames:,}")]
    if bare:
        rows.insert(1, ("cuts without targets", f"{bare:,}"))
    rows += [(f"bytes a frame, {n}", f"{s / frames:.2f}") for n, s in sizes.items()]
    kept_as = filter(None, (found.ctc, found.lattice, found.hidden))
    rows.append(("kept as", ", ".join(kept_as)))
    if not found.ctc:
        _print_table(rows)
        return
    rows += [
        ("symbols kept in a frame, ctc", f"{kept / frames:.2f}"),
        ("mean tail, ctc", f"{tail / frames:.2e}"),
        ("entropy, ctc (nats a frame)", f"{entropy / frames:.4f}"),
        ("frames whose best is blank", f"{100 * blanks / frames:.1f} %"),
    ]
    _print_table(rows)


def _print_table(rows: List[Tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value:>14}")
