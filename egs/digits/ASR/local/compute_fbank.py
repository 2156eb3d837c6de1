#!/usr/bin/env python3
"""
Compute log Mel filter banks of all cuts of the digits and commands recipes.

Usage:
  ./local/compute_fbank.py --manifest-dir data/manifests --output-dir data/fbank

For each cuts_{split}.jsonl.gz in --manifest-dir it writes, in --output-dir,
the arrays under feats_{split} and then a manifest of the same name. A split that
is there already is skipped if it was made from the same cuts in the same way.
"""

import argparse
import logging
import multiprocessing
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List

import numpy as np
from audio_utils import SAMPLING_RATE
from script_utils import (
    check_range,
    read_manifest,
    replace_dir,
    run_script,
    staged_dir,
    str2bool,
    write_manifest,
)
from tqdm.auto import tqdm

from icefall_kd import KDError

Cut = Dict[str, Any]  # a cut as it stands in a manifest
Mapper = Callable[[Callable[[Cut], Cut], List[Cut]], Iterable[Cut]]


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--manifest-dir",
        type=Path,
        default=Path("data/manifests"),
        help="The folder with cuts_*.jsonl.gz",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("data/fbank"),
        help="Where features and manifests go; the manifests name the features by "
        "this path",
    )
    parser.add_argument(
        "--num-mel-bins", type=int, default=40, help="Number of Mel filters"
    )
    parser.add_argument(
        "--sampling-rate", type=int, default=SAMPLING_RATE, help="Hz of the audio"
    )
    parser.add_argument(
        "--extractor",
        type=str,
        default="auto",
        choices=["auto", "kaldifeat", "lhotse"],
        help="auto: kaldifeat where it is installed, else lhotse",
    )
    parser.add_argument(
        "--mean",
        type=str,
        default="utterance",
        choices=["utterance", "none"],
        help="Whose mean is taken off: that of each cut, as speakers and microphones "
        "differ most in it; or none, for streaming and long recordings, where an "
        "utterance's mean is not known",
    )
    parser.add_argument(
        "--num-jobs", type=int, default=1, choices=[1, 2], help="Number of processes"
    )
    parser.add_argument(
        "--overwrite",
        type=str2bool,
        default=False,
        help="Compute again what is there already",
    )
    return parser.parse_args()


def choose_extractor(extractor: str) -> str:
    """Return ``extractor``; in place of "auto" kaldifeat if installed, else lhotse."""
    if extractor == "lhotse":
        return extractor
    try:
        import kaldifeat  # noqa: F401
    except ImportError as e:
        if extractor == "auto":
            return "lhotse"
        raise KDError(
            f"--extractor is kaldifeat but it cannot be imported ({e}), run python "
            "tools/install_native.py kaldifeat or give --extractor lhotse"
        ) from e
    return "kaldifeat"


def make_extractor(extractor: str, num_mel_bins: int, rate: int):
    """Return the package ``extractor``'s extractor of ``num_mel_bins`` features.

    The audio has ``rate`` Hz.
    """
    # Both have dither 0, snip_edges False and filters from 20 Hz to 400 Hz below half
    # of the sampling rate.
    if extractor == "kaldifeat":
        from lhotse import KaldifeatFbank, KaldifeatFbankConfig
        from lhotse.features.kaldifeat import KaldifeatFrameOptions, KaldifeatMelOptions

        return KaldifeatFbank(
            KaldifeatFbankConfig(
                frame_opts=KaldifeatFrameOptions(
                    sampling_rate=rate, dither=0.0, snip_edges=False
                ),
                mel_opts=KaldifeatMelOptions(num_bins=num_mel_bins),
            )
        )
    from lhotse import Fbank, FbankConfig

    return Fbank(
        FbankConfig(
            sampling_rate=rate,
            num_mel_bins=num_mel_bins,
            dither=0.0,
            snip_edges=False,
        )
    )


def check_cuts(cuts: List[Cut], manifest: Path, rate: int) -> None:
    """Refuse ``cuts`` of ``manifest`` without audio of ``rate`` Hz."""
    for cut in cuts:
        recording = cut.get("recording")
        if recording is None:
            raise KDError(
                f"cut {cut['id']} in {manifest} has no recording, make the manifest "
                "again"
            )
        if recording["sampling_rate"] != rate:
            raise KDError(
                f"cut {cut['id']} in {manifest} has {recording['sampling_rate']} Hz "
                f"where {rate} Hz are needed, make the manifest again"
            )
        source = recording["sources"][0]
        if source["type"] == "file" and not Path(source["source"]).is_file():
            raise KDError(
                f"the audio {source['source']} of cut {cut['id']} in {manifest} does "
                "not exist, start from the folder in which the manifest was made or "
                "make it again"
            )


def whose_mean(features: Dict[str, Any], output: Path) -> str:
    """Return the --mean with which ``features`` in ``output`` were made.

    The array says it: its mean is 0 but for rounding, or that of logarithms of energy.
    The manifest can't: Lhotse mixes only cuts whose type of features it knows.
    """
    folder = output.parent / Path(features["storage_path"]).name
    path = folder / features["storage_key"]
    if not path.is_file():
        raise KDError(
            f"{output} names {path}, which does not exist, give --overwrite true to "
            "make the features again"
        )
    return "utterance" if np.abs(np.load(path).mean(axis=0)).max() < 1e-3 else "none"


def is_done(
    cuts: List[Cut], output: Path, extractor: str, num_mel_bins: int, mean: str
) -> bool:
    """Return whether ``output`` holds the features of just these ``cuts``.

    It is refused if it holds those of other cuts, or others than ``num_mel_bins`` by
    ``extractor`` less this ``mean``.
    """
    if not output.exists():
        return False
    old = read_manifest(output)
    features = [cut.pop("features", {}) for cut in old]
    name = {"kaldifeat": "kaldifeat-fbank", "lhotse": "kaldi-fbank"}[extractor]
    wanted = f"{num_mel_bins} bins by {name}"
    present = f"{features[0].get('num_features')} bins by {features[0].get('type')}"
    if present != wanted:
        difference = f"{present} where {wanted} are asked for"
    elif (was := whose_mean(features[0], output)) != mean:
        difference = f"features of --mean {was} where {mean} is asked for"
    elif len(old) != len(cuts):
        difference = f"{len(old)} cuts where there are now {len(cuts)}"
    elif old != cuts:
        first = next(
            new["id"] for was, new in zip(old, cuts, strict=True) if was != new
        )
        difference = f"another cut than the present {first}"
    else:
        return True
    raise KDError(f"{output} has {difference}, give --overwrite true to replace it")


_extractor = None  # one for each process
_mean = "utterance"


def init_process(extractor: str, num_mel_bins: int, rate: int, mean: str) -> None:
    """Make the process's own ``extractor``, as :func:`make_extractor` does.

    It is to take off this ``mean``.
    """
    import torch

    global _extractor, _mean
    torch.set_num_threads(1)
    _mean = mean
    _extractor = make_extractor(extractor, num_mel_bins, rate)


def compute_features(cut: Cut, scratch: str, final: str) -> Cut:
    """Store the features under `scratch`; the returned cut says they are in `final`."""
    from lhotse import Features, NumpyFilesWriter
    from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
    from lhotse.serialization import deserialize_item

    item = deserialize_item(deepcopy(cut))  # it takes its argument apart
    try:
        samples = item.load_audio()
    except (AudioLoadingError, DurationMismatchError) as e:
        raise KDError(
            f"the audio of cut {cut['id']} cannot be read ({e}), make the corpus again"
        ) from e
    array = np.asarray(_extractor.extract(samples, item.sampling_rate))
    if _mean == "utterance":
        array -= array.mean(axis=0)
    with NumpyFilesWriter(scratch) as writer:
        # Lhotse's own way would draw a random key.
        key = writer.write(cut["id"], array)
    features = Features(
        type=_extractor.name,
        num_frames=array.shape[0],
        num_features=array.shape[1],
        frame_shift=_extractor.frame_shift,
        sampling_rate=item.sampling_rate,
        start=item.start,
        duration=item.duration,
        storage_type=writer.name,
        storage_path=final,
        storage_key=key,
        recording_id=item.recording_id,
        channels=item.channel,
    )
    return {**cut, "features": features.to_dict()}


@contextmanager
def open_mapper(
    num_jobs: int, extractor: str, num_mel_bins: int, rate: int, mean: str
) -> Iterator[Mapper]:
    """Yield a lazy, ordered map over ``num_jobs`` processes.

    Each has an ``extractor`` of ``num_mel_bins`` features of audio at ``rate``, less
    a ``mean``.
    """
    if num_jobs == 1:
        init_process(extractor, num_mel_bins, rate, mean)
        yield map
        return
    # spawn: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    settings = (extractor, num_mel_bins, rate, mean)
    with context.Pool(num_jobs, init_process, settings) as pool:
        yield partial(pool.imap, chunksize=16)


def compute_split(mapper: Mapper, cuts: List[Cut], split: str, output: Path) -> None:
    """Write ``cuts`` of a ``split`` to ``output`` with features made by ``mapper``."""
    output_dir = output.parent
    feats_dir = output_dir / f"feats_{split}"
    with staged_dir(output_dir) as scratch:
        compute = partial(
            compute_features,
            scratch=str(scratch / feats_dir.name),
            final=str(feats_dir),
        )
        done = list(tqdm(mapper(compute, cuts), f"fbank {split}", total=len(cuts)))
        write_manifest(scratch / output.name, done)
        if output.exists():
            output.unlink()
        replace_dir(scratch / feats_dir.name, feats_dir)
        (scratch / output.name).rename(output)


def main() -> None:
    args = get_args()
    check_range(args.num_mel_bins, 1, "--num-mel-bins", 1000)
    check_range(args.sampling_rate, 1000, "--sampling-rate")
    args.extractor = choose_extractor(args.extractor)
    prefix, suffix = "cuts_", ".jsonl.gz"
    manifests = sorted(args.manifest_dir.glob(f"{prefix}*{suffix}"))
    if not manifests:
        raise KDError(
            f"--manifest-dir {args.manifest_dir} holds 0 files cuts_*.jsonl.gz, "
            "run the stage that prepares the corpus first"
        )
    if args.manifest_dir.resolve() == args.output_dir.resolve():
        raise KDError(
            f"--manifest-dir {args.manifest_dir} and --output-dir {args.output_dir} "
            "are one folder, name another --output-dir"
        )
    todo = []
    for manifest in manifests:
        cuts = read_manifest(manifest)
        output = args.output_dir / manifest.name
        split = manifest.name[len(prefix) : -len(suffix)]
        if not args.overwrite and is_done(
            cuts, output, args.extractor, args.num_mel_bins, args.mean
        ):
            logging.info(f"{output} exists - skipping")
            continue
        check_cuts(cuts, manifest, args.sampling_rate)
        todo.append((cuts, split, output))
    if not todo:
        return
    settings = args.extractor, args.num_mel_bins, args.sampling_rate, args.mean
    with open_mapper(args.num_jobs, *settings) as mapper:
        for cuts, split, output in todo:
            compute_split(mapper, cuts, split, output)
            logging.info(f"{split}: {len(cuts)} cuts in {output}, {args.extractor}")


if __name__ == "__main__":
    run_script(main)
