"""Stores what a teacher says on cuts."""

import logging
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import click
import torch
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.dataset.collation import collate_features
from tqdm.auto import tqdm

from icefall_kd.cli.student import check_vocabulary
from icefall_kd.errors import KDError
from icefall_kd.hook import MIN_FRAMES, TeacherHook
from icefall_kd.recipe.loader import load_recipe_model
from icefall_kd.targets.fingerprint import Fingerprint, hash_state_dict, hash_tokens
from icefall_kd.targets.writer import LogitWriter


def open_cuts(path: str) -> CutSet:
    if not Path(path).is_file():
        raise KDError(f"the manifest {path} does not exist: make the features first")
    try:
        cuts = CutSet.from_file(path)
    except Exception as e:  # json, gzip and lhotse raise many kinds
        raise KDError(
            f"the manifest {path} can't be read ({type(e).__name__}): make it again"
        ) from None
    if cuts is None or next(iter(cuts), None) is None:
        raise KDError(f"the manifest {path} holds no cuts: make the data again")
    return cuts


def fingerprint_of(
    model: torch.nn.Module, settings: Dict[str, Any], cut: Cut, bpe_model: str
) -> Fingerprint:
    features = cut.features
    factor = int(settings.get("subsampling_factor", 4))
    return Fingerprint(
        teacher=hash_state_dict(model.state_dict()),
        tokens=hash_tokens(bpe_model) if bpe_model else "",
        vocab_size=int(settings["vocab_size"]),
        blank_id=int(settings["blank_id"]),
        subsampling_factor=factor,
        frame_shift=factor * features.frame_shift,
        sampling_rate=features.sampling_rate,
        num_features=features.num_features,
        feature_type=features.type,
    )


def _checked(cuts: CutSet, path: str, num_features: int) -> Iterator[Cut]:
    """The cuts of ``path`` one by one, refused where the teacher can't hear them."""
    seen: Set[str] = set()
    for cut in cuts:
        problem = ""
        if not isinstance(cut, MonoCut):
            problem = (
                f"is a {type(cut).__name__} and must be a MonoCut: dump the teacher "
                "before mixing, padding or appending"
            )
        elif not cut.has_features:
            problem = "has no features: compute them first"
        elif cut.num_features != num_features:
            problem = (
                f"has {cut.num_features} features a frame and the teacher takes "
                f"{num_features}: give the features that it was trained on"
            )
        elif cut.num_frames < MIN_FRAMES:
            problem = (
                f"has {cut.num_frames} feature frames and the teacher needs "
                f"{MIN_FRAMES}: leave it out"
            )
        elif cut.id in seen:
            raise KDError(
                f"the cut id {cut.id} occurs twice in {path}: make cut ids unique"
            )
        if problem:
            raise KDError(f"the cut {cut.id} of {path} {problem}")
        seen.add(cut.id)
        yield cut


def _batches(cuts: Iterator[Cut], max_duration: float) -> Iterator[List[Cut]]:
    """Batches of at most ``max_duration`` seconds, padding counted, in file order."""
    batch: List[Cut] = []
    longest = 0.0
    for cut in cuts:
        longest = max(longest, cut.duration)
        if batch and longest * (len(batch) + 1) > max_duration:
            yield batch
            batch, longest = [], cut.duration
        batch.append(cut)
    if batch:
        yield batch


def dump(
    in_cuts: str,
    out_cuts: str,
    recipe: str,
    exp_dir: str,
    epoch: int,
    iteration: int,
    avg: int,
    use_averaged_model: bool,
    bpe_model: str,
    storage_dir: str,
    max_duration: float,
    num_threads: int,
    overwrite: bool,
) -> None:
    if max_duration <= 0:
        raise KDError(f"--max-duration is {max_duration}, and must be above 0")
    if Path(in_cuts).resolve() == Path(out_cuts).resolve():
        raise KDError(f"{in_cuts} is both read and written: give OUT_CUTS another name")
    cuts = open_cuts(in_cuts)
    model, settings = load_recipe_model(
        recipe, exp_dir, epoch, iteration, avg, use_averaged_model
    )
    if bpe_model:
        check_vocabulary(bpe_model, settings)
    num_features = int(settings["feature_dim"])
    first = next(_checked(cuts, in_cuts, num_features))
    torch.set_num_threads(num_threads or os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    fingerprint = fingerprint_of(model, settings, first, bpe_model)
    out = Path(out_cuts)
    storage_dir = storage_dir or str(out.with_name(out.name.split(".jsonl")[0] + "_kd"))
    with TeacherHook(model) as hook:
        with LogitWriter(out, storage_dir, fingerprint, overwrite) as writer:
            if len(writer):
                logging.warning("%d cuts have their targets already", len(writer))
            checked = _checked(cuts, in_cuts, num_features)
            todo = (c for c in checked if c.id not in writer)
            frames = 0
            with tqdm(
                desc="Teacher's targets", unit=" cuts", total=_count(cuts)
            ) as bar:
                bar.update(len(writer))
                for batch in _batches(todo, max_duration):
                    frames += _write(batch, hook, writer, device)
                    bar.update(len(batch))
                    bar.set_postfix(frames=frames, MB=writer.bytes_written / 1e6)
    click.echo(f"{out}: {len(writer)} cuts with targets, arrays in {storage_dir}")


def _name_unreadable(batch: List[Cut]) -> None:
    for cut in batch:
        try:
            cut.load_features()
        except Exception as e:
            f = cut.features
            raise KDError(
                f"the features of cut {cut.id} can't be read from "
                f"{f.storage_path}/{f.storage_key} ({type(e).__name__}): compute them "
                "again"
            ) from None


def _count(cuts: CutSet) -> int:
    return sum(1 for _ in cuts)


def _write(
    batch: List[Cut], hook: TeacherHook, writer: LogitWriter, device: torch.device
) -> int:
    try:
        x, x_lens = collate_features(CutSet.from_cuts(batch))
    except Exception:  # the storage behind lhotse raises what it likes
        _name_unreadable(batch)
        raise
    out = hook.encode(x.to(device), x_lens.to(device))
    for cut, logits, n in zip(batch, out.ctc_logits, out.encoder_out_lens.tolist()):
        writer.write(cut, logits[:n])
    return int(out.encoder_out_lens.sum())
