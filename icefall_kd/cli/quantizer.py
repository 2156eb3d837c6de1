"""Trains the quantizer of a hidden layer."""

import random
from pathlib import Path
from typing import Iterable, Iterator, List

import click
import torch
from lhotse.cut import Cut
from tqdm.auto import tqdm

from icefall_kd.cli.amounts import begin
from icefall_kd.cli.combine import check_not_overwritten
from icefall_kd.cli.options import (
    MODEL_FLAGS,
    MOST_SEED,
    Count,
    Place,
    Text,
    command,
    teacher_options,
)
from icefall_kd.errors import KDError, require
from icefall_kd.files import check_new_file
from icefall_kd.kinds.hidden import (
    HiddenCodec,
    Layer,
    hidden_rows,
    import_quantization,
    load_quantizer,
    save_quantizer,
)
from icefall_kd.memory import enough_memory
from icefall_kd.targets.batches import read_features
from icefall_kd.targets.cuts import ManifestCuts, survey
from icefall_kd.targets.model_input import why_unusable
from icefall_kd.teacher.spec import TeacherSpec
from icefall_kd.teacher.teacher import Teacher

BATCH = 600  # vectors in a step of training


EXAMPLE = """
icefall-kd quantizer \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --layer 3 data/fbank/librispeech_cuts_train-clean-100.jsonl.gz q.pt
"""


@command(context_settings=MODEL_FLAGS, example=EXAMPLE)
@click.argument("in_cuts", type=Place())
@click.argument("out", type=Place())
@teacher_options()
@click.option(
    "--layer",
    type=Text(),
    required=True,
    metavar="LAYER",
    help="The layer: a stack's index, such as 3, or out for the encoder output.",
)
@click.option(
    "--num-codebooks",
    type=Count(1, 32),
    default=8,
    metavar="N",
    help="Codebooks: a vector is stored in as many bytes. 1, 2, 4, 8, 16 or 32.",
)
@click.option(
    "--num-vectors",
    type=Count(1, 10**8),
    default=100_000,
    metavar="N",
    help="Vectors to train on, from the first cuts on.",
)
@click.option(
    "--iters",
    type=Count(1, 10**7),
    default=10_000,
    metavar="N",
    help="Training steps in each of the quantizer's two phases.",
)
@click.option(
    "--seed",
    type=Count(0, MOST_SEED),
    default=42,
    metavar="N",
    help="The seed of the training's random numbers.",
)
def quantizer(
    in_cuts: str,
    out: str,
    teacher: TeacherSpec,
    layer: str,
    num_codebooks: int,
    num_vectors: int,
    iters: int,
    seed: int,
) -> None:
    """Train the vector quantizer of a teacher's hidden layer on IN_CUTS; write OUT.

    `icefall-kd dump --keep-hidden LAYER:OUT` stores that layer as its codes.
    """
    layer = HiddenCodec.parse(f"{layer}:half").layer
    require(
        num_codebooks in (1, 2, 4, 8, 16, 32),
        f"--num-codebooks is {num_codebooks}: give 1, 2, 4, 8, 16 or 32",
    )
    require(
        num_vectors >= BATCH,
        f"--iters is {iters} and --num-vectors {num_vectors}: give 1 or more, and "
        f"{BATCH} or more",
    )
    cuts = ManifestCuts(in_cuts)
    check_new_file(out, "OUT")
    check_not_overwritten(in_cuts, out, "OUT")
    teacher.one_folder("quantizer")
    _check_place(Path(out))
    package = import_quantization()
    loaded = teacher.load_one("quantizer")
    teacher.tokenizer(loaded.settings)
    survey(in_cuts, int(loaded.settings["feature_dim"])).warn()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    running = Teacher([loaded.model], layers=[layer], with_ctc=False).to(device)
    remedy = f"give --num-vectors less than {num_vectors}"
    begin(
        f"{num_vectors:,} vectors of layer {layer} are gathered, and then "
        f"{num_codebooks} codebooks are trained in {2 * iters:,} steps, for {out}."
    )
    with enough_memory(f"gathering {num_vectors} vectors", remedy):
        data = _gather(_vectors(running, cuts, layer, device), num_vectors)
    torch.manual_seed(seed)
    random.seed(seed)  # the trainer draws from both
    trainer = package.QuantizerTrainer(
        dim=data.size(1),
        bytes_per_frame=num_codebooks,
        device=device,
        phase_one_iters=iters,
        phase_two_iters=iters,
    )
    work = f"training on {len(data)} vectors of {data.size(1)}"
    with (
        enough_memory(work, remedy),
        tqdm(desc="Quantizer", unit=" steps", total=2 * iters) as bar,
    ):
        while not trainer.done():
            trainer.step(data[torch.randint(len(data), (BATCH,), device=device)])
            bar.update()
    save_quantizer(trainer.get_quantizer().cpu(), Path(out))
    lost = _lost_variance(load_quantizer(out), data[:5000].cpu())
    click.echo(
        f"{out}: {num_codebooks} codes a vector of {data.size(1)}, from {len(data)} "
        f"vectors of layer {layer}; {100 * lost:.1f} % of their variance is lost"
    )
    click.echo(f"Next: icefall-kd dump --keep-hidden {layer}:{out}")


def _vectors(
    teacher: Teacher, cuts: Iterable[Cut], layer: Layer, device: torch.device
) -> Iterator[torch.Tensor]:
    """A layer's vectors, (M, C), cut by cut."""
    for cut in cuts:
        if why_unusable(cut):
            continue
        work = f"the teacher's pass over the cut {cut.id} of {cut.duration:g} s"
        with enough_memory(work, "leave it out, or free memory"):
            x, x_lens = read_features([cut])
            (out,) = teacher.run(x.to(device), x_lens.to(device))
            rows = hidden_rows(out, layer)[0].flatten(0, 1)
        yield rows


def _gather(vectors: Iterator[torch.Tensor], count: int) -> torch.Tensor:
    """The first ``count`` vectors, and the others of the last one's cut."""
    parts: List[torch.Tensor] = []
    with tqdm(desc="Teacher's vectors", unit=" vectors", total=count) as bar:
        for part in vectors:
            parts.append(part)
            bar.update(len(part))
            if sum(map(len, parts)) >= count:
                break
    return torch.cat(parts)


@torch.no_grad()
def _lost_variance(quantizer, x: torch.Tensor) -> float:
    """The share of the variance of ``x`` that its codes lose."""
    decoded = quantizer.decode(quantizer.encode(x, as_bytes=False))
    error = (decoded - x).square().sum()
    return float(error / (x - x.mean(0)).square().sum())


def _check_place(out: Path) -> None:
    """Refuse to write over anything but a quantizer."""
    if not out.exists():
        return
    try:
        load_quantizer(out)
    except KDError:
        raise KDError(
            f"{out} is there and is no quantizer: give OUT another name"
        ) from None
