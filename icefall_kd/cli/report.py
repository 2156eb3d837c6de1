"""Compares models by icefall's logs and results."""

from contextlib import ExitStack
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import click
from lhotse.cut import Cut

from icefall_kd import __version__
from icefall_kd.cli.options import Number, Place, Text, command
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError, need_kaldialign, require
from icefall_kd.files import replacing
from icefall_kd.report.comparison import Comparison, Model, Run, TestAudio
from icefall_kd.report.exports import read_exports
from icefall_kd.report.intervals import Key, Statistics, measure, need_interval
from icefall_kd.report.logs import read_training
from icefall_kd.report.manifests import manifests_of, measure_targets, speakers_of
from icefall_kd.report.page import Heading, Table, to_html, to_markdown
from icefall_kd.report.plots import need_matplotlib
from icefall_kd.report.rates import rate_blocks
from icefall_kd.report.results import Decoding, read_decodings, split_last
from icefall_kd.report.tables import blocks_of
from icefall_kd.report.transcripts import Scores, read_scores
from icefall_kd.report.words import words_of
from icefall_kd.targets.cuts import ManifestCuts


@command()
@click.argument("out_dir", type=Place())
@click.option(
    "--model",
    "models",
    type=Text(),
    multiple=True,
    required=True,
    metavar="NAME=EXP_DIR",
    help="A model's name and its experiment folder. Give the option once for each "
    "model. The same name with other folders adds seeds of the model.",
)
@click.option(
    "--teacher",
    type=Text(),
    default="",
    metavar="NAME",
    help="The teacher's name. Default: the first model.",
)
@click.option(
    "--baseline",
    type=Text(),
    default="",
    metavar="NAME",
    help="The student that the others are compared with. Default: the second model.",
)
@click.option(
    "--manifest-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The folder of the test sets' manifests, such as data/fbank: for the RTF "
    "(real-time factor), and for the speakers.",
)
@click.option(
    "--by-speaker",
    is_flag=True,
    help="Compute the intervals over speakers, as the utterances of one speaker depend "
    "on each other. Needs --manifest-dir.",
)
@click.option(
    "--interval",
    type=Number(0, 100),
    default=None,
    metavar="POINTS",
    help="Refuse a test set that has too few words for 95 % intervals of this half "
    "width, in percentage points.",
)
@click.option(
    "--targets",
    type=Place(),
    multiple=True,
    metavar="MANIFEST",
    help="A manifest that `icefall-kd dump` wrote. The option may be given more than "
    "once.",
)
@click.option(
    "--unit",
    type=click.Choice(["WER", "CER"]),
    default="WER",
    help="The unit of the recipe's error rates. Give CER where it scores characters, "
    "as in Chinese.",
)
@click.option(
    "--lang",
    type=click.Choice(["en", "zh"]),
    default="en",
    help="The language of the report: English or Chinese.",
)
@click.option(
    "--title",
    type=Text(),
    default="",
    metavar="TEXT",
    help="The report's title. Default: one for what is compared.",
)
def report(
    out_dir: str,
    models: Sequence[str],
    teacher: str = "",
    baseline: str = "",
    manifest_dir: str = "",
    by_speaker: bool = False,
    interval: Optional[float] = None,
    targets: Sequence[str] = (),
    unit: str = "WER",
    lang: str = "en",
    title: str = "",
) -> None:
    """Compare teacher and students in OUT_DIR/report.md and OUT_DIR/report.html.

    The report has error rates with confidence intervals, p values of the differences,
    parameters, RTF, bytes of targets, losses and weights. They are read from the logs
    and results that train.py and decode.py left in the experiment folders, and from
    what `icefall-kd export --check` found of the files in EXP_DIR/export:

    \b
      icefall-kd report --model teacher=zipformer/exp \\
        --model "no KD=zipformer_kd/exp/student" \\
        --model "KD=zipformer_kd/exp/student-kd" \\
        --manifest-dir data/fbank report

    Give one name several times for several seeds: --model KD=exp/kd-1 --model
    KD=exp/kd-2. The report then has their mean.

    The Markdown is for icefall's RESULTS.md, the HTML has the curves too.
    """
    need_matplotlib()
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise KDError(f"{out} is a file, and OUT_DIR must be a folder: give another")
    if manifest_dir and not Path(manifest_dir).is_dir():
        raise KDError(
            f"--manifest-dir {manifest_dir} is not a folder: give that of the test "
            "sets' manifests, such as data/fbank"
        )
    require(
        manifest_dir or not by_speaker,
        "--by-speaker is given without --manifest-dir, whose manifests name the "
        "speakers: give the folder of the test sets' manifests, such as data/fbank",
    )
    folders = _folders_by_name(models)
    teacher, baseline = _roles(list(folders), teacher, baseline)
    loaded = [_read_model(name, exps) for name, exps in folders.items()]
    audio = _read_audio(loaded, manifest_dir, by_speaker)
    statistics = _measure_all(loaded, baseline, audio, by_speaker)
    if interval is not None:
        _need_transcripts(loaded)
        need_interval(statistics, interval)
    sizes = {path: measure_targets(_cuts(path)) for path in dict.fromkeys(targets)}
    words = words_of(lang)
    data = Comparison(loaded, teacher, baseline, unit, audio, sizes, words, statistics)
    blocks = blocks_of(data)
    title = " ".join(title.split()) or words["title"]
    footer = data.text("footer", version=__version__)
    ending = "" if lang == "en" else f".{words['lang']}"
    pages = {
        out / f"report{ending}.md": to_markdown(title, blocks, footer),
        out / f"report{ending}.html": to_html(title, blocks, footer, words["lang"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path, text in pages.items():
            temporary = stack.enter_context(replacing(path))
            temporary.write_text(_utf8(text), encoding="utf8")
    for block in rate_blocks(data):
        if isinstance(block, Heading):
            click.echo(_utf8(block.text))
        elif isinstance(block, Table):
            click.echo(_utf8(text_table([block.head, *block.rows], block.left)) + "\n")
    for path in pages:
        click.echo(path)


def _folders_by_name(models: Sequence[str]) -> Dict[str, List[Path]]:
    """The experiment folders of each model, one a seed, from ``NAME=EXP_DIR``."""
    folders: Dict[str, List[Path]] = {}
    for text in models:
        name, equals, exp = text.partition("=")
        name = " ".join(name.split())
        require(
            name and equals and exp,
            f"--model {text!r} is not NAME=EXP_DIR: give a name and a folder, as in "
            "--model teacher=zipformer/exp",
        )
        seeds = folders.setdefault(name, [])
        same = [p for p in seeds if p.resolve() == Path(exp).resolve()]
        require(
            not same,
            f"--model gives {name!r} the folder {exp} twice: give each seed of a model "
            "its own folder, and each model its own name",
        )
        seeds.append(Path(exp))
    return folders


def _roles(names: List[str], teacher: str, baseline: str) -> Tuple[str, str]:
    """The names of the teacher and of the baseline, with defaults for missing ones."""
    for option, name in (("teacher", teacher), ("baseline", baseline)):
        require(
            not name or name in names,
            f"--{option} is {name!r}, and the models are {', '.join(names)}: give one "
            "of these",
        )
    require(
        not teacher or teacher != baseline,
        f"--teacher and --baseline are both {teacher!r}: give the student without KD "
        "as --baseline",
    )
    if len(names) < 2:
        return "", ""
    teacher = teacher or next(n for n in names if n != baseline)
    return teacher, baseline or next(n for n in names if n != teacher)


def _read_model(name: str, exps: Sequence[Path]) -> Model:
    """A model with the runs of its seeds."""
    if len(exps) == 1:
        return Model(name, [_read_run(name, exps[0])])
    runs = [_read_run(f"{name} ({i})", exp) for i, exp in enumerate(exps, start=1)]
    return Model(name, runs)


def _read_run(name: str, exp: Path) -> Run:
    require(
        exp.is_dir(),
        f"the experiment folder {exp} of {name!r} does not exist: mend --model",
    )
    training = read_training(exp)
    last, earlier = split_last(read_decodings(exp))
    require(
        training is not None or last,
        f"the experiment folder {exp} of {name!r} has neither log/log-train-* nor "
        "METHOD/wer-summary-*: give the --exp-dir of train.py and decode.py",
    )
    scores = _read_all_scores(last)
    return Run(name, exp, training, last, earlier, scores, read_exports(exp))


def _read_all_scores(decodings: Sequence[Decoding]) -> Dict[Key, Scores]:
    """The errors of each utterance, of the results that have transcripts."""
    scores = {}
    for d in decodings:
        for test_set, rate in d.rates.items():
            path = d.transcripts(test_set)
            if path is not None:
                need_kaldialign()
                scores[d.kind, d.method, test_set] = read_scores(path, rate.percent)
    return scores


def _measure_all(
    models: Sequence[Model], baseline: str, audio: TestAudio, by_speaker: bool
) -> Dict[Key, Statistics]:
    """Intervals and differences, of the models that have transcripts of all seeds."""
    statistics = {}
    for key in sorted({key for m in models for run in m.runs for key in run.scores}):
        scores = {
            m.name: [run.scores[key] for run in m.runs]
            for m in models
            if all(key in run.scores for run in m.runs)
        }
        if scores:
            speakers = None
            if by_speaker:
                _need_speakers(audio, key[2])
                speakers = audio.speakers[key[2]]
            statistics[key] = measure(scores, baseline, speakers)
    return statistics


def _need_speakers(audio: TestAudio, test_set: str) -> None:
    """Refuse ``--by-speaker`` without the one manifest of a test set."""
    if test_set in audio.ambiguous:
        names = ", ".join(audio.ambiguous[test_set])
        manifests = f"several manifests of {test_set}, {names}"
    else:
        manifests = f"no manifest cuts_{test_set}.jsonl.gz"
    require(
        test_set in audio.speakers,
        f"--by-speaker is given, and {audio.folder} has {manifests}: give a folder "
        "with one, or leave --by-speaker out",
    )


def _need_transcripts(models: Sequence[Model]) -> None:
    """Refuse ``--interval`` where a result has no interval."""
    runs = [run for m in models for run in m.runs]
    require(
        any(run.decodings for run in runs),
        "--interval is given, and no model has decoding results: run decode.py, or "
        "leave --interval out",
    )
    for run in runs:
        for d, test_set in run.without_scores:
            raise KDError(
                f"--interval is given, and {run.exp} has no transcripts of "
                f"{d.rates[test_set].setting} on {test_set}, {d.method}/recogs-"
                f"{test_set}-*{d.suffix}.txt, to compute one: decode again with this "
                "setting, or leave --interval out"
            )


def _read_audio(
    models: Sequence[Model], manifest_dir: str, by_speaker: bool
) -> TestAudio:
    audio = TestAudio(manifest_dir)
    if not manifest_dir:
        return audio
    decodings = [d for m in models for run in m.runs for d in run.decodings]
    for test_set in sorted({s for d in decodings for s in d.rates}):
        paths = manifests_of(Path(manifest_dir), test_set)
        if len(paths) > 1:
            audio.ambiguous[test_set] = [path.name for path in paths]
        elif paths:
            cuts = _cuts(str(paths[0]))
            audio.seconds[test_set] = sum(cut.duration for cut in cuts)
            if by_speaker:
                audio.speakers[test_set] = speakers_of(_cuts(str(paths[0])))
    return audio


def _cuts(path: str) -> Iterator[Cut]:
    return iter(ManifestCuts(path))


def _utf8(text: str) -> str:
    """``text`` with ``?`` for what is not UTF-8, such as in the name of a file."""
    return text.encode("utf8", "replace").decode()
