"""Times the presets on this machine, and chooses a student by such times."""

import json
import os
import platform
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import click
from tqdm.auto import tqdm

from icefall_kd.cli.presets import RECIPE
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError, naming_flags, require
from icefall_kd.files import check_new_file
from icefall_kd.memory import enough_memory, free_memory
from icefall_kd.student.count import count_parameters
from icefall_kd.student.presets import STREAMING, preset, preset_names
from icefall_kd.student.search import nearest
from icefall_kd.student.times import (
    PARTS,
    SIDES,
    PresetTimes,
    multiply_adds,
    rank_correlation,
    read_times,
    write_times,
)

TIMES = "preset_times.json"
MEASURE = "icefall-kd student --list --measure --recipe FOLDER"
# Of a streaming preset, in stack frames: what icefall's streaming models run with.
CHUNK_SIZE, LEFT_CONTEXT = 16, 128
_STACK_FRAMES = 50  # a second
_COPIES = 3  # of a model's parameters that are in memory at once while it is timed
_SLOWER = 0.95  # of the promised speed-up: below it a preset is called slower


def this_machine() -> Dict[str, str]:
    """What times depend on: the CPU's name, and versions."""
    import onnxruntime
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text("utf8", errors="replace").splitlines()
        named = [line.split(":")[1].strip() for line in lines if "model name" in line]
        cpu = named[0] if named else cpu
    return {
        "cpu": cpu,
        "threads": "1",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Let torch compile nothing, which would be timed with what it speeds up."""
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@_nothing_compiled()
def measure_presets(
    recipe: str, path: str, vocab_size: int, as_json: bool = False
) -> None:
    """Time the presets, write the times, and print them.

    Args:
      recipe: The folder of a recipe, whose model is timed.
      path: The file of times.
      vocab_size: The number of tokens.
      as_json: Whether the file's content is printed in place of tables.

    Raises:
      KDError: a package is missing, a recipe whose model can't be exported, or a file
        that holds something else.
    """
    from icefall_kd.export.packages import need
    from icefall_kd.export.timing import ROUNDS, TOKENS_A_FRAME, UTTERANCE, measure
    from icefall_kd.teacher.recipe import (
        call_recipe,
        import_train,
        model_maker,
        recipe_defaults,
        recipe_params,
    )

    check_new_file(path, "--times")
    if Path(path).exists():
        read_times(Path(path))  # anything else is not written over
    for package in ("onnx", "onnxruntime", "onnxruntime.quantization"):
        need(package, "--measure")
    train = import_train(recipe)
    base = {**RECIPE, "use_attention_decoder": False, "use_ctc": False}
    base.update(blank_id=0, sos_id=0, eos_id=0, vocab_size=vocab_size)

    def make(name: str) -> Tuple[Any, Dict[str, Any]]:
        params = recipe_params(train)
        params.update({**recipe_defaults(train), **base, **preset(name)})
        if name.endswith(STREAMING):
            sizes = {"chunk_size": CHUNK_SIZE, "left_context_frames": LEFT_CONTEXT}
            params.update({key: str(size) for key, size in sizes.items()})
        return call_recipe(model_maker(train), params), params

    names, too_large = [], []
    for name in preset_names():
        size = 4 * count_parameters({**base, **preset(name)})["all"]
        (names if _COPIES * size < free_memory() else too_large).append(name)
    remedy = "close other programs, or measure on a larger machine"
    with enough_memory("timing the presets", remedy):
        with tqdm(desc="Timing", unit=" models", total=ROUNDS * len(names)) as bar:
            rtf = measure(names, make, bar.update)
    products = {name: multiply_adds({**base, **preset(name)}) for name in names}
    conditions = {
        "utterance_seconds": UTTERANCE,
        "tokens_a_frame": TOKENS_A_FRAME,
        "vocab_size": vocab_size,
        "chunk_size": CHUNK_SIZE,
        "left_context_frames": LEFT_CONTEXT,
    }
    times = PresetTimes(this_machine(), conditions, products, rtf)
    write_times(times, Path(path))
    click.echo(json.dumps(asdict(times), indent=2) if as_json else report(times))
    if too_large:
        click.echo(
            f"\nNot timed, as memory for {_COPIES} copies of the parameters is not "
            f"free: {', '.join(too_large)}",
            err=as_json,
        )
    click.echo(f"\nThe times are in {path}; --rtf chooses by them.", err=as_json)


def report(times: PresetTimes) -> str:
    """Tables of times, and how far multiply-adds foretell them.

    Args:
      times: The times.
    """
    streams = [name for name in times.rtf if name.endswith(STREAMING)]
    whole = [name for name in times.rtf if name not in streams]
    conditions = times.conditions
    machine = ", ".join(f"{k} {v}" for k, v in times.machine.items())
    lines = [
        f"({machine};",
        f"vocabulary of {conditions['vocab_size']:g}, a search of "
        f"{conditions['tokens_a_frame']:g} tokens a frame, random weights)\n",
    ]
    if whole:
        of = f"a second of audio, utterances of {conditions['utterance_seconds']:g} s"
        lines += _tables(times, whole, of, 1.0)
    if streams:
        frames = conditions["chunk_size"], conditions["left_context_frames"]
        chunk, left = (number / _STACK_FRAMES for number in frames)
        of = f"a chunk of {chunk:g} s of a stream, left context {left:g} s"
        lines += [*([""] if whole else []), *_tables(times, streams, of, chunk)]
    return "\n".join(lines)


def _tables(
    times: PresetTimes, names: Sequence[str], of: str, seconds: float
) -> List[str]:
    """The tables of presets of one kind.

    Args:
      times: The times.
      names: The presets.
      of: What the times in milliseconds are of.
      seconds: How much audio that is.
    """
    names = sorted(names, key=times.multiply_adds.get)
    largest = names[-1]
    head = [side.replace("onnxruntime", "onnx") for side in SIDES]
    rows = [["preset", "G/s", *head]]
    ratios = [["preset", "by multiply-adds", *head]]
    slower: Dict[str, List[str]] = {side: [] for side in SIDES}
    for name in names:
        promised = times.multiply_adds[largest] / times.multiply_adds[name]
        sides = [times.rtf[name][side] for side in SIDES]
        cells = [
            " + ".join(f"{1000 * seconds * rtf[p]:.2f}" for p in PARTS) for rtf in sides
        ]
        rows.append([name, f"{times.multiply_adds[name] / 1e9:.2f}", *cells])
        found = {s: times.of(largest, s) / times.of(name, s) for s in SIDES}
        ratios.append(
            [name, f"{promised:.1f}x", *(f"{x:.1f}x" for x in found.values())]
        )
        for side, ratio in found.items():
            if ratio < _SLOWER * promised:
                slower[side].append(f"{name} ({ratio / promised:.2f})")
    lines = [
        f"Milliseconds for {of}, {' + '.join(PARTS)}:\n",
        text_table(rows),
        f"\nTimes faster than {largest}:\n",
        text_table(ratios),
        "\nMultiply-adds and time, rank correlation, and presets that are slower than "
        f"their\nmultiply-adds promise (their share of the promised speed-up over "
        f"{largest}):\n",
    ]
    products = [times.multiply_adds[name] for name in names]
    for side in SIDES:
        correlation = rank_correlation(products, [times.of(n, side) for n in names])
        shown = ", ".join(slower[side]) or "none"
        lines.append(f"  {side}: {correlation:.3f}; {shown}")
    return lines


def check_rtf(rtf: float, others: Sequence[str], path: str) -> PresetTimes:
    """The times by which --rtf chooses.

    Args:
      rtf: Of --rtf.
      others: The options that choose a size too, and are given.
      path: Of --times.

    Raises:
      KDError: such an option, or no file of times.
    """
    words = " and ".join([f"--rtf {rtf:g}", *others])
    require(not others, f"{words} are given: give one of them")
    require(
        Path(path).is_file(),
        f"--rtf {rtf:g} goes by measured times, and there is no file {path}: run "
        f"`{MEASURE}` on the machine that decodes, or give --times its file",
    )
    return read_times(Path(path))


@naming_flags({"rtf": "--rtf"})
def changes_for_rtf(
    rtf: float, times: PresetTimes, settings: Dict[str, Any]
) -> Dict[str, Any]:
    """The settings of the student of a teacher that has an RTF by the times.

    Args:
      rtf: Of --rtf.
      times: The times.
      settings: The teacher's.

    Raises:
      KDError: no student is that fast or slow, or a model of another kind than those
        that were timed.
    """
    _check_kind(settings)
    speed = multiply_adds(settings) / times.products_for(rtf)
    require(
        speed >= 1,
        f"--rtf {rtf:g} is more than the teacher takes by the measured times: it has "
        f"{1 / speed:.2f} times fewer multiply-adds than a model of that time; give "
        "less",
    )
    try:
        return nearest(f"{speed:.4f}x", settings, settings)
    except KDError as e:
        raise KDError(
            f"--rtf {rtf:g} means {speed:.2f} times fewer multiply-adds than the "
            f"teacher's, which can't be had ({e.sentence.split(';')[0]}): give another"
        ) from None


def _check_kind(settings: Dict[str, Any]) -> None:
    require(
        not settings.get("causal"),
        "--rtf goes by the times of models that hear whole utterances, and the teacher "
        "is causal: give --speed or --params",
    )
    require(
        settings.get("use_transducer", True),
        "--rtf goes by the times of a transducer's search, and the teacher has a CTC "
        "head alone: give --speed or --params",
    )


def rtf_account(
    rtf: float, times: PresetTimes, teacher: Dict[str, Any], student: Dict[str, Any]
) -> str:
    """What the times say of a student, and how far multiply-adds disagree.

    Args:
      rtf: Of --rtf.
      times: The times.
      teacher: The teacher's settings.
      student: The student's, after --set.
    """
    products = [multiply_adds(settings) for settings in (teacher, student)]
    slow, fast = (times.of_model(number) for number in products)
    promised = products[0] / products[1]
    edge = "an unknown time, outside of the presets measured"
    text = (
        f"--rtf {rtf:g}: by measured times ({SIDES[0]}, one thread) a second of audio"
    )
    text += f" takes\nthe student {f'{fast:.4f} s' if fast else edge}"
    text += f", its teacher {f'{slow:.4f} s' if slow else edge}.\n"
    if fast and slow:
        measured = slow / fast
        text += f"That is {measured:.2f} times faster, "
    text += f"by multiply-adds it would be {promised:.2f} times"
    if fast and slow:
        text += f" ({100 * (promised / measured - 1):+.0f} %)"
    text += "."
    here = this_machine_or_none()
    differing = [
        f"{name} {value} there, {here.get(name)} here"
        for name, value in times.machine.items()
        if here and here.get(name) != value
    ]
    if differing:
        text += f"\nThe times were measured elsewhere: {'; '.join(differing)}."
    return text


def this_machine_or_none() -> Dict[str, str]:
    """As :func:`this_machine`; nothing where onnxruntime is not installed."""
    try:
        return this_machine()
    except ImportError:
        return {}
