"""The models that ``icefall-kd report`` and ``plot`` compare: logs and results."""

from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import click
from lhotse.cut import Cut

from icefall_kd.cli.options import Text
from icefall_kd.errors import need_kaldialign, require
from icefall_kd.report.comparison import Model, Run, TestAudio
from icefall_kd.report.exports import read_exports
from icefall_kd.report.intervals import Key, Statistics, measure
from icefall_kd.report.logs import read_training
from icefall_kd.report.manifests import manifests_of, speakers_of
from icefall_kd.report.results import Decoding, read_decodings, split_last
from icefall_kd.report.transcripts import Scores, read_scores
from icefall_kd.targets.cuts import ManifestCuts

models_option = click.option(
    "--model",
    "models",
    type=Text(),
    multiple=True,
    required=True,
    metavar="NAME=EXP_DIR",
    help="A model's name and its experiment folder. Give the option once for each "
    "model. The same name with other folders adds seeds of the model.",
)


def check_manifest_dir(manifest_dir: str) -> None:
    """Refuse ``--manifest-dir`` that is no folder.

    Args:
      manifest_dir: The folder; "" for none.

    Raises:
      KDError: a file, or nothing there.
    """
    require(
        not manifest_dir or Path(manifest_dir).is_dir(),
        f"--manifest-dir {manifest_dir} is not a folder: give that of the test sets' "
        "manifests, such as data/fbank",
    )


def folders_by_name(
    models: Sequence[str], option: str = "--model"
) -> Dict[str, List[Path]]:
    """The experiment folders of each model, one a seed, from ``NAME=EXP_DIR``.

    Args:
      models: What the option was given, in its order.
      option: Its name, for errors.

    Raises:
      KDError: no name or no folder, or one folder twice for a name.
    """
    folders: Dict[str, List[Path]] = {}
    for text in models:
        name, equals, exp = text.partition("=")
        name = " ".join(name.split())
        require(
            name and equals and exp,
            f"{option} {text!r} is not NAME=EXP_DIR: give a name and a folder, as in "
            f"{option} teacher=zipformer/exp",
        )
        seeds = folders.setdefault(name, [])
        same = [p for p in seeds if p.resolve() == Path(exp).resolve()]
        require(
            not same,
            f"{option} gives {name!r} the folder {exp} twice: give each seed of a "
            "model its own folder, and each model its own name",
        )
        seeds.append(Path(exp))
    return folders


def read_model(name: str, exps: Sequence[Path]) -> Model:
    """A model with the runs of its seeds.

    Args:
      name: The user's name for it.
      exps: The experiment folder of each seed.

    Raises:
      KDError: a folder without logs and results.
    """
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


def measure_all(
    models: Sequence[Model], baseline: str, audio: TestAudio, by_speaker: bool
) -> Dict[Key, Statistics]:
    """Intervals and differences, of the models that have transcripts of all seeds.

    Args:
      models: The models.
      baseline: The name of the one that the others are compared with; "" for none.
      audio: The test sets, with their speakers where ``by_speaker``.
      by_speaker: Whether intervals are computed over speakers.
    """
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


def read_audio(
    models: Sequence[Model], manifest_dir: str, by_speaker: bool
) -> TestAudio:
    """The seconds of the test sets, and who speaks.

    Args:
      models: The models, whose decodings name the sets.
      manifest_dir: The folder of their manifests; "" for none.
      by_speaker: Whether to read the speakers too.
    """
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
