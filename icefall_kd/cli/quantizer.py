"""Trains the quantizer of a hidden layer."""

import random
from pathlib import Path
from typing import Iterator, List, Tuple

import click
import torch
from tqdm.auto import tqdm

from icefall_kd.cli.batches import read_features
from icefall_kd.cli.cuts import open_cuts, readable, survey
from icefall_kd.cli.memory import enough_memory
from icefall_kd.errors import KDError
from icefall_kd.files import check_new_file
from icefall_kd.kinds.hidden import (
    HiddenCodec,
    hidden_rows,
    import_quantization,
    load_quantizer,
    save_quantizer,
)
from icefall_kd.targets.heard import why_unheard
from icefall_kd.teacher import OnlineTeacher
from icefall_kd.teacher.loader import load_recipe_model, one_teacher_folder
from icefall_kd.tokens import load_tokenizer

BATCH = 600  # vectors in a step of training


def vectors(teacher: OnlineTeacher, cuts, layer, device) -> Iterator[torch.Tensor]:
    """A layer's vectors, (M, C), cut by cut."""
    for cut in cuts:
        if why_unheard(cut):
            continue
        work = f"the teacher's pass over the cut {cut.id} of {cut.duration:g} s"
        with enough_memory(work, "leave it out, or free memory"):
            x, x_lens = read_features([cut])
            (out,) = teacher.encode(x.to(device), x_lens.to(device))
            rows = hidden_rows(out, layer)[0].flatten(0, 1)
        yield rows


def gather(found: Iterator[torch.Tensor], wanted: int) -> torch.Tensor:
    parts: List[torch.Tensor] = []
    with tqdm(desc="Teacher's vectors", unit=" vectors", total=wanted) as bar:
        for part in found:
            parts.append(part)
            bar.update(len(part))
            if sum(map(len, parts)) >= wanted:
                break
    return torch.cat(parts)


def _check_place(out: Path) -> None:
    """Refuse to write over anything but a quantizer."""
    if out.exists():
        try:
            load_quantizer(out)
        except KDError:
            raise KDError(
                f"{out} is there and is no quantizer: give OUT another name"
            ) from None


def quantizer(
    in_cuts: str,
    out: str,
    recipe: str,
    exp_dir: str,
    epoch: int,
    iteration: int,
    avg: int,
    use_averaged_model: bool,
    flags: Tuple[str, ...],
    bpe_model: str,
    layer: str,
    codes: int,
    num_vectors: int,
    iters: int,
    seed: int,
) -> None:
    layer = HiddenCodec.parse(f"{layer}:half").layer
    if codes not in (1, 2, 4, 8, 16, 32):
        raise KDError(f"--codes is {codes}: give 1, 2, 4, 8, 16 or 32")
    if iters < 1 or num_vectors < BATCH:
        raise KDError(
            f"--iters is {iters} and --num-vectors {num_vectors}: give 1 or more, and "
            f"{BATCH} or more"
        )
    cuts = open_cuts(in_cuts)
    check_new_file(out, "OUT")
    if Path(in_cuts).resolve() == Path(out).resolve():
        raise KDError(f"{in_cuts} is both read and written: give OUT another name")
    exp_dir = one_teacher_folder(exp_dir, "quantizer")
    _check_place(Path(out))
    package = import_quantization()
    model, settings = load_recipe_model(
        recipe, exp_dir, epoch, iteration, avg, use_averaged_model, flags, bpe_model
    )
    if bpe_model:
        load_tokenizer(bpe_model, settings["vocab_size"])
    survey(in_cuts, int(settings["feature_dim"])).warn()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = OnlineTeacher([model], hidden=[layer], ctc=False).to(device)
    heard = vectors(teacher, readable(cuts, in_cuts), layer, device)
    fewer = f"give --num-vectors less than {num_vectors}"
    with enough_memory(f"gathering {num_vectors} vectors", fewer):
        data = gather(heard, num_vectors)
    torch.manual_seed(seed)
    random.seed(seed)  # the trainer draws from both
    trainer = package.QuantizerTrainer(
        dim=data.size(1),
        bytes_per_frame=codes,
        device=device,
        phase_one_iters=iters,
        phase_two_iters=iters,
    )
    training = f"training on {len(data)} vectors of {data.size(1)}"
    with (
        enough_memory(training, fewer),
        tqdm(desc="Quantizer", unit=" steps", total=2 * iters) as bar,
    ):
        while not trainer.done():
            trainer.step(data[torch.randint(len(data), (BATCH,), device=device)])
            bar.update()
    trained = trainer.get_quantizer()
    save_quantizer(trained.cpu(), Path(out))
    read = load_quantizer(out)
    x = data[:5000].cpu()
    with torch.no_grad():
        error = (read.decode(read.encode(x, as_bytes=False)) - x).square().sum()
    share = error / (x - x.mean(0)).square().sum()
    click.echo(
        f"{out}: {codes} codes a vector of {data.size(1)}, from {len(data)} vectors of "
        f"layer {layer}; {100 * share:.1f} % of their variance is lost"
    )
