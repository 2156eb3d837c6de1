"""Stores what a teacher says on cuts."""

import dataclasses
import gzip
import logging
import os
import shutil
import time
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterator,
    List,
    Optional,
    Set,
    Tuple,
    Union,
)

import click
import torch
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.dataset.collation import collate_features
from tqdm.auto import tqdm

from icefall_kd.cli.heap import Heap
from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.hidden import Layer, from_command_line, hidden_rows
from icefall_kd.hook import MIN_FRAMES, encoder_frames
from icefall_kd.recipe.loader import load_recipe_model
from icefall_kd.targets.fingerprint import (
    TOKENS,
    Fingerprint,
    check_vocabulary,
    hash_state_dict,
    hash_tokens,
    pieces,
)
from icefall_kd.targets.writer import LogitWriter, Record, combine, job_manifest
from icefall_kd.teacher import OnlineTeacher
from icefall_kd.types import PrunedLattice

# A stretch of the manifest, in batches: what is done again after an interruption.
WINDOW = 5


def open_cuts(path: str) -> CutSet:
    """The cuts of a manifest, or of a Shar's folder."""
    if not Path(path).exists():
        raise KDError(f"the manifest {path} does not exist: make the features first")
    try:
        is_shar = Path(path).is_dir()
        cuts = CutSet.from_shar(in_dir=path) if is_shar else CutSet.from_file(path)
    except Exception as e:  # json, gzip and lhotse raise many kinds
        raise KDError(
            f"the manifest {path} can't be read ({type(e).__name__}): make it again"
        ) from None
    if cuts is None or next(iter(cuts), None) is None:
        raise KDError(f"the manifest {path} holds no cuts: make the data again")
    return cuts


def readable(cuts: CutSet, path: str) -> Iterator[Cut]:
    """The cuts, with a sentence for a manifest that is damaged beyond its first."""
    try:
        yield from cuts
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as e:
        if isinstance(e, KDError):
            raise
        raise KDError(
            f"the manifest {path} can't be read to its end ({type(e).__name__}): make "
            "it again"
        ) from None


def checked(cuts: CutSet, path: str, num_features: int) -> Iterator[Cut]:
    """The cuts of ``path`` one by one, refused where the teacher can't hear them."""
    seen: Set[str] = set()
    for cut in readable(cuts, path):
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


def _windows(cuts: Iterator[Cut], seconds: float) -> Iterator[List[Cut]]:
    """Stretches of at most so many seconds, in file order."""
    window: List[Cut] = []
    total = 0.0
    for cut in cuts:
        if window and total + cut.duration > seconds:
            yield window
            window, total = [], 0.0
        window.append(cut)
        total += cut.duration
    if window:
        yield window


def _batches(window: List[Cut], max_duration: float) -> Iterator[List[Cut]]:
    """Batches of at most ``max_duration`` seconds, padding counted, longest first."""
    batch: List[Cut] = []
    for cut in sorted(window, key=lambda c: (-c.duration, c.id)):
        if batch and batch[0].duration * (len(batch) + 1) > max_duration:
            yield batch
            batch = []
        batch.append(cut)
    if batch:
        yield batch


@dataclass
class _Batch:
    cuts: List[Cut]
    window: Optional[List[Cut]]  # the whole stretch, with its last batch


class _Plan:
    """The batches of one job, in their order.

    They are the same whatever was done before and whichever job does them, so each
    cut's targets are the same to the last bit: a stretch of cuts goes to one job.
    """

    def __init__(self, cuts, max_duration, job, num_jobs, done) -> None:
        self.cuts, self.max_duration = cuts, max_duration
        self.job, self.num_jobs, self.done = job, num_jobs, done

    def __iter__(self) -> Iterator[_Batch]:
        windows = _windows(self.cuts, WINDOW * self.max_duration)
        for i, window in enumerate(windows):
            if i % self.num_jobs != self.job or all(c.id in self.done for c in window):
                continue
            batches = list(_batches(window, self.max_duration))
            for j, batch in enumerate(batches):
                yield _Batch(batch, window if j == len(batches) - 1 else None)


class _Reader(torch.utils.data.Dataset):
    def __getitem__(self, batch: _Batch):
        try:
            x, x_lens = collate_features(CutSet.from_cuts(batch.cuts))
        except Exception:  # the storage behind lhotse raises what it likes
            _name_unreadable(batch.cuts)
            raise
        return batch, x, x_lens


@dataclass
class Said:
    """What the teacher said on a batch, on the CPU and without gradient."""

    lens: List[int]
    ctc: Optional[torch.Tensor] = None  # (N, T, V)
    lattices: Optional[List[PrunedLattice]] = None  # of each utterance
    hidden: Dict[Layer, torch.Tensor] = field(default_factory=dict)  # (N, T, R, C)

    def of(self, i: int) -> Tuple:
        """What :meth:`LogitWriter.encode` takes of utterance ``i``."""
        n = self.lens[i]
        return (
            None if self.ctc is None else self.ctc[i, :n],
            self.lattices and self.lattices[i],
            {layer: x[i, :n] for layer, x in self.hidden.items()},
        )


class _Sink:
    """Encodes and writes behind the teacher's back, in the order of the manifest."""

    def __init__(self, writer: LogitWriter) -> None:
        self.writer = writer
        self.records: Dict[str, Record] = {}
        self.pool = ThreadPoolExecutor(1)
        self.pending: Deque[Future] = deque()

    def put(self, batch: _Batch, said: Said) -> None:
        while len(self.pending) > 2:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._do, batch, said))

    def _do(self, batch: _Batch, said: Said) -> None:
        for i, cut in enumerate(batch.cuts):
            if cut.id not in self.writer:
                self.records[cut.id] = self.writer.encode(cut, *said.of(i))
        for cut in batch.window or []:
            if cut.id in self.records:
                self.writer.append(cut, self.records.pop(cut.id))

    def close(self, failed: bool) -> None:
        if failed:
            self.pool.shutdown(wait=True, cancel_futures=True)
            return
        while self.pending:
            self.pending.popleft().result()
        self.pool.shutdown()


def _labels(cuts: List[Cut], sp) -> List[List[int]]:
    for cut in cuts:
        if len(cut.supervisions) != 1 or not (cut.supervisions[0].text or "").strip():
            raise KDError(
                f"the cut {cut.id} has no transcript, and a lattice needs one: leave "
                "it out, label it first, or dump without --keep-lattice"
            )
    y = sp.encode([c.supervisions[0].text for c in cuts], out_type=int)
    for cut, labels in zip(cuts, y):
        frames = encoder_frames(cut.num_frames)
        if len(labels) > frames:
            raise KDError(
                f"the cut {cut.id} has {len(labels)} labels and the teacher gives "
                f"{frames} frames, and a lattice needs as many frames: leave it out, "
                "as icefall's training does"
            )
    return y


class Teacher:
    """The teacher or teachers of a dump, and what is to be taken of them."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        models: List[torch.nn.Module],
        weights: Optional[List[float]],
        choose: Optional[Callable[[Cut], int]],
        sp: Optional[Any],
    ) -> None:
        self.layers = [codec.layer for codec in fingerprint.hidden_codecs()]
        self.with_ctc = bool(fingerprint.ctc)
        self.s_range = fingerprint.s_range
        self.sp = sp
        self.group = OnlineTeacher(models, weights, choose, self.layers, self.with_ctc)

    def __call__(self, x: torch.Tensor, x_lens: torch.Tensor, cuts: List[Cut]) -> Said:
        outs = self.group.encode(x, x_lens)
        said = Said(outs[0].encoder_out_lens.tolist())
        if self.with_ctc:
            said.ctc = self.group.ctc(outs, cuts).cpu()
        if self.s_range:
            y = _labels(cuts, self.sp)
            said.lattices = _split(self.group.lattice(outs, y, self.s_range, cuts))
        for layer in self.layers:
            said.hidden[layer] = hidden_rows(outs[0], layer).cpu()
        return said


def chooser(name: str) -> Callable[[Cut], int]:
    """Reads the number of a cut's teacher from its field, or its supervision's."""

    def choose(cut: Cut) -> int:
        for owner in (cut, *cut.supervisions):
            value = (owner.custom or {}).get(name)
            if value is not None:
                break
        if not isinstance(value, int) or isinstance(value, bool):
            raise KDError(
                f"the field {name!r} of cut {cut.id} is {value!r}, and must be the "
                "number of its teacher among --exp-dir, from 0 on: write it into the "
                "cut's custom fields"
            )
        return value

    return choose


def _load(
    recipe: str, folders: List[str], *options: Any
) -> Tuple[List[torch.nn.Module], Dict[str, Any]]:
    """The teachers' models, and the settings that they share."""
    models, settings = [], None
    for folder in folders:
        model, found = load_recipe_model(recipe, folder, *options)
        settings = settings or found
        for name in ("vocab_size", "blank_id", "feature_dim", "subsampling_factor"):
            if found.get(name) != settings.get(name):
                raise KDError(
                    f"the teacher in {folders[0]} has {name} {settings.get(name)} and "
                    f"that in {folder} has {found.get(name)}: teachers of one student "
                    "must agree"
                )
        models.append(model)
    return models, settings


def _numbers(text: str) -> Optional[List[float]]:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise KDError(
            f"--weights is {text!r}: give a number for each teacher, with commas"
        ) from None


def _named(models, weights: Optional[List[float]], teacher_field: str) -> str:
    """What the fingerprint calls the teachers."""
    hashes = [hash_state_dict(model.state_dict()) for model in models]
    if len(hashes) == 1:
        return hashes[0]
    if teacher_field:
        return ",".join(hashes) + f" by {teacher_field}"
    return ",".join(f"{h}*{w:g}" for h, w in zip(hashes, weights or [1] * len(hashes)))


def _split(lattice: PrunedLattice) -> List[PrunedLattice]:
    """One lattice for each utterance."""
    return [
        PrunedLattice(
            *(
                getattr(lattice, f.name)[i : i + 1].cpu()
                for f in dataclasses.fields(lattice)
            )
        )
        for i in range(len(lattice.boundary))
    ]


def job_of(num_jobs: int, job: int) -> Tuple[int, int]:
    """This process's job and the number of jobs: as told, or as torchrun says."""
    if num_jobs == 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= job < num_jobs:
        raise KDError(
            f"--job is {job} and --num-jobs {num_jobs}: give --job 0 to {num_jobs - 1}"
        )
    return job, num_jobs


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
    keep: str,
    keep_lattice: str,
    keep_hidden: str,
    s_range: int,
    weights: str,
    teacher_field: str,
    max_duration: float,
    num_jobs: int,
    job: int,
    num_workers: int,
    num_threads: int,
    overwrite: bool,
    stats: bool,
) -> None:
    if max_duration <= 0:
        raise KDError(f"--max-duration is {max_duration}, and must be above 0")
    if Path(in_cuts).resolve() == Path(out_cuts).resolve():
        raise KDError(f"{in_cuts} is both read and written: give OUT_CUTS another name")
    if keep_lattice and not bpe_model:
        raise KDError(
            "--keep-lattice needs the labels of the transcripts: give --bpe-model"
        )
    job, num_jobs = job_of(num_jobs, job)
    cuts = open_cuts(in_cuts)
    shares = _numbers(weights)
    codecs, quantizers = from_command_line(keep_hidden)
    models, settings = _load(
        recipe, exp_dir.split(","), epoch, iteration, avg, use_averaged_model
    )
    sp = check_vocabulary(bpe_model, settings) if bpe_model else None
    num_features = int(settings["feature_dim"])
    first = next(checked(cuts, in_cuts, num_features))
    torch.set_num_threads(num_threads or os.cpu_count() or 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    fingerprint = Fingerprint.of(
        _named(models, shares, teacher_field),
        settings,
        first.features,
        hash_tokens(pieces(sp)) if sp is not None else None,
        ctc="" if keep == "none" else keep,
        lattice=keep_lattice,
        s_range=s_range if keep_lattice else 0,
        hidden=",".join(map(str, codecs)),
    )
    choose = chooser(teacher_field) if teacher_field else None
    teacher = Teacher(fingerprint, models, shares, choose, sp)
    teacher.group.to(device)
    out = Path(out_cuts)
    storage_dir = storage_dir or str(out.with_name(out.name.split(".jsonl")[0] + "_kd"))
    with ExitStack() as stack:
        stack.callback(teacher.group.close)
        writer = stack.enter_context(
            LogitWriter(out, storage_dir, fingerprint, overwrite, job, num_jobs)
        )
        if sp is not None:
            names = "".join(piece + "\n" for piece in pieces(sp))
            (Path(storage_dir) / TOKENS).write_text(names, "utf8")
        for codec in codecs:
            if codec.layer in quantizers:
                target = codec.quantizer_file(storage_dir)
                with replacing(target, shared=True) as temporary:
                    shutil.copyfile(quantizers[codec.layer], temporary)
        if len(writer):
            logging.warning("%d cuts have their targets already", len(writer))
        total = _count(cuts, in_cuts)
        plan = _Plan(
            checked(cuts, in_cuts, num_features), max_duration, job, num_jobs, writer
        )
        loader = torch.utils.data.DataLoader(
            _Reader(), sampler=plan, batch_size=None, num_workers=num_workers
        )
        sink, heap = _Sink(writer), Heap(WINDOW)
        stack.push(lambda kind, *exc: sink.close(failed=kind is not None))
        frames, begun = 0, time.perf_counter()
        bar = stack.enter_context(
            tqdm(desc="Teacher's targets", unit=" cuts", total=-(-total // num_jobs))
        )
        bar.update(len(writer))
        for batch, x, x_lens in loader:
            said = teacher(x.to(device), x_lens.to(device), batch.cuts)
            sink.put(batch, said)
            heap.after_batch()
            frames += sum(said.lens)
            bar.update(len(said.lens))
            rate = frames / (time.perf_counter() - begun)
            bar.set_postfix_str(
                f"{rate:.0f} frames/s, {writer.bytes_written / 1e6:.1f} MB"
            )
    size = f"{writer.bytes_written / 1e6:.1f} MB"
    told = f"{len(writer)} cuts with targets, {size} written, records in {storage_dir}"
    _tell(in_cuts, out, told, num_jobs, overwrite)
    if stats and out.is_file():
        from icefall_kd.targets.stats import print_stats

        print_stats(CutSet.from_file(out))


def _tell(in_cuts, out, told: str, num_jobs: int, overwrite: bool) -> None:
    if num_jobs == 1:
        click.echo(f"{out}: {told}")
        return
    click.echo(f"this job: {told}")
    jobs = [job_manifest(out, j, num_jobs) for j in range(num_jobs)]
    if not overwrite and all(path.is_file() for path in jobs):
        combine_jobs(in_cuts, out, num_jobs)
    else:
        click.echo(
            "when all jobs are done: icefall-kd combine --num-jobs "
            f"{num_jobs} {in_cuts} {out}"
        )


def combine_jobs(in_cuts: str, out_cuts: Union[str, Path], num_jobs: int) -> None:
    """Join the manifests of all jobs, in the order of ``in_cuts``."""
    counts = combine(
        out_cuts, num_jobs, (c.id for c in readable(open_cuts(in_cuts), in_cuts))
    )
    click.echo(
        f"{out_cuts}: {sum(counts.values())} cuts with targets of {num_jobs} jobs"
    )


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


def _count(cuts: CutSet, path: str) -> int:
    try:
        return len(cuts)  # counts lines, where Lhotse can
    except (TypeError, NotImplementedError, EOFError, zlib.error):
        return sum(1 for _ in readable(cuts, path))
