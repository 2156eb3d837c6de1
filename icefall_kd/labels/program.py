"""Any program as the teacher of labels: it gets audio files, and writes texts."""

import math
import os
import shlex
import shutil
import signal
import subprocess
import unicodedata
import wave
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
from lhotse.cut import Cut, MonoCut, MultiCut

from icefall_kd.decode.recording import audio_chunks
from icefall_kd.errors import KDError, require
from icefall_kd.files import temporary_name
from icefall_kd.labels.pseudo_label import PseudoLabel
from icefall_kd.targets.batches import DumpBatch

WAVS, OUT = "{wavs}", "{out}"
AT_ONCE = 60.0  # seconds of audio that are read at once
_AGAIN = "mend it, and the same command goes on where this one stopped"


class ProgramTeacher:
    """Labels what a program writes.

    For each stretch of the manifest it is started once, with two paths in place of
    ``{wavs}`` and ``{out}``. The first is a list with an id, a blank and a path to a
    wav file of 16 bits on each line. Into the second it writes a line for each id, in
    any order and in UTF-8: the id, a blank and the text. No text behind an id means
    that nothing was heard. With ``nbest`` a line is an id, the log-probability in nats
    and the text, and an id may have several.

    Args:
      command: The program and its words, as in a shell; none runs it.
      folder: Where audio files are for a while.
      time_limit: Seconds that a run may take.
      nbest: Whether lines have a log-probability.

    Raises:
      KDError: a command without the two places, or that can't be split into words.
    """

    max_duration = math.inf  # a batch is a stretch

    def __init__(
        self, command: str, folder: Path, time_limit: float, nbest: bool = False
    ) -> None:
        try:
            self.words = shlex.split(command)
        except ValueError as e:
            raise KDError(
                f"`program` is {command!r}, which can't be split into words "
                f"({str(e).lower()}): quote it as for a shell"
            ) from None
        require(
            all(any(place in w for w in self.words) for place in (WAVS, OUT)),
            f"`program` is {command!r} and lacks {WAVS} or {OUT}: give both, such as "
            f"'asr.py {WAVS} {OUT}', for the list of audio files and the file of texts",
        )
        self.name, self.settings = "command", {"command": command}
        if nbest:
            self.settings["nbest"] = True
        self.folder, self.time_limit, self.nbest = folder, time_limit, nbest

    def problem(self, cut: Cut) -> str:
        """Why a cut can't be labelled, as the rest of a sentence; "" if it can.

        Args:
          cut: The cut.
        """
        if not cut.has_recording:
            return "has no recording, and the command hears audio: give cuts with one"
        if isinstance(cut, MultiCut):
            return (
                f"has {cut.num_channels} channels, and an audio file for the command "
                "has one: choose it with lhotse's cut.to_mono()"
            )
        if cut.id.split() != [cut.id]:
            return (
                "has a blank in its id, and the lines of the command end an id there: "
                "rename it"
            )
        if self.nbest and not isinstance(cut, MonoCut):
            return (
                f"is a {type(cut).__name__}, and n-best lists are kept on MonoCuts: "
                "label it before mixing, padding or appending"
            )
        return ""

    def __call__(
        self, plan: Iterable[DumpBatch]
    ) -> Iterator[Tuple[DumpBatch, List[PseudoLabel]]]:
        """Label the cuts of batches.

        Args:
          plan: The batches.

        Yields:
          Each batch with the labels of its cuts.

        Raises:
          KDError: a program that fails or takes too long, or lines that can't be used.
        """
        for batch in plan:
            folder = temporary_name(self.folder / "audio")
            folder.mkdir()
            try:
                write_wavs(batch.cuts, folder)
                self._run(folder, batch)
                ids = [cut.id for cut in batch.cuts]
                found = read_texts(folder / "out.txt", ids, self.nbest)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            yield batch, [self._label(found[cut.id]) for cut in batch.cuts]

    def _label(self, texts: List[Tuple[str, float]]) -> PseudoLabel:
        if not self.nbest:
            return PseudoLabel(texts[0][0])
        texts = sorted(texts, key=lambda text: -text[1])
        return PseudoLabel(texts[0][0], {"score": texts[0][1]}, None, texts)

    def _run(self, folder: Path, batch: DumpBatch) -> None:
        """Run the program, and stop it where it takes too long."""
        places = {WAVS: folder / "wavs.txt", OUT: folder / "out.txt"}
        words = list(self.words)
        for place, path in places.items():
            words = [word.replace(place, str(path)) for word in words]
        with open(folder / "log.txt", "wb") as log:
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that all that it starts is stopped
                )
            except (OSError, ValueError) as e:
                raise KDError(
                    f"`program` is {words[0]!r} at its beginning, which can't be run "
                    f"({getattr(e, 'strerror', None) or e}): give the path of a program"
                ) from None
            try:
                status = process.wait(self.time_limit)
            except subprocess.TimeoutExpired:
                seconds = sum(cut.duration for cut in batch.cuts)
                raise KDError(
                    f"the command ran for longer than `time_limit` {self.time_limit:g} "
                    f"s on {len(batch.cuts)} cuts of {seconds:.1f} s and was stopped: "
                    f"give a longer limit, or {_AGAIN}"
                ) from None
            finally:
                _stop(process)
        require(
            status == 0,
            f"the command ended with status {status} on {len(batch.cuts)} cuts, and "
            f"its last words were {_last_words(folder / 'log.txt')!r}: {_AGAIN}",
        )


def _stop(process: subprocess.Popen) -> None:
    """Stop a program, with what it started, if it runs."""
    if process.poll() is None:
        if os.name == "nt":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_words(log: Path) -> str:
    lines = log.read_bytes()[-1000:].decode("utf8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[-200:]


def write_wavs(cuts: Sequence[Cut], folder: Path) -> None:
    """Write the audio of cuts as wav files of 16 bits, and their list ``wavs.txt``.

    Args:
      cuts: Cuts of one channel.
      folder: Where files are written.

    Raises:
      KDError: audio that can't be read.
    """
    with open(folder / "wavs.txt", "w", encoding="utf8") as wavs:
        for number, cut in enumerate(cuts):
            path = folder / f"{number}.wav"
            with wave.open(str(path), "wb") as out:
                out.setnchannels(1)
                out.setsampwidth(2)
                out.setframerate(cut.sampling_rate)
                for chunk in audio_chunks(cut, AT_ONCE):
                    require(
                        len(chunk) == 1,
                        f"the audio of cut {cut.id} has {len(chunk)} channels, and an "
                        "audio file for the command has one: mix them, or choose one",
                    )
                    samples = np.clip(np.rint(chunk[0] * 32768), -32768, 32767)
                    out.writeframes(samples.astype("<i2").tobytes())
            wavs.write(f"{cut.id} {path}\n")


def read_texts(
    path: Path, ids: Sequence[str], nbest: bool
) -> Dict[str, List[Tuple[str, float]]]:
    """Read what a program wrote.

    Args:
      path: The file.
      ids: Those that it was given.
      nbest: Whether a line has a log-probability between id and text.

    Returns:
      For each id its texts, with the log-probability or 0.

    Raises:
      KDError: no file, lines that are no text in UTF-8, other ids, ids that are missing
        or occur twice, a log-probability that is none, or no text at all.
    """
    require(path.is_file(), f"the command wrote no file in place of {OUT}: {_AGAIN}")
    found: Dict[str, List[Tuple[str, float]]] = {i: [] for i in ids}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        text = _decoded(line, number)
        if not text.strip():
            continue
        cut_id, _, text = text.strip().partition(" ")
        require(
            cut_id in found,
            f"line {number} that the command wrote begins with {cut_id[:40]!r}, which "
            f"is no id that it was given: {_AGAIN}",
        )
        require(
            nbest or not found[cut_id],
            f"the command wrote two lines for the id {cut_id}: {_AGAIN}, or give "
            "--nbest if its lines are an id, a log-probability and a text",
        )
        log_prob = 0.0
        if nbest:
            word, _, text = text.strip().partition(" ")
            log_prob = _log_prob(word, number)
        found[cut_id].append((" ".join(text.split()), log_prob))
    missing = [i for i in ids if not found[i]]
    require(
        not missing,
        f"the command wrote lines for {len(ids) - len(missing)} of the {len(ids)} ids "
        f"that it was given, and none for {missing[:1]}: {_AGAIN}",
    )
    require(
        len(ids) < 2 or any(text for texts in found.values() for text, _ in texts),
        f"the command wrote no text behind any of {len(ids)} ids: {_AGAIN}",
    )
    return found


def _decoded(line: bytes, number: int) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf8").replace("\t", " ")
        text = text.rstrip("\r")
    except UnicodeDecodeError:
        text = "\0"
    require(
        not any(unicodedata.category(c) in ("Cc", "Cs") for c in text),
        f"line {number} that the command wrote is no text in UTF-8, as it has "
        f"{line[:40]!r}: let it write UTF-8",
    )
    return text


def _log_prob(word: str, number: int) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    require(
        math.isfinite(value),
        f"line {number} that the command wrote has {word[:40]!r} for a "
        "log-probability, and must be an id, a finite number and a text: "
        f"{_AGAIN}, or leave out --nbest",
    )
    return value
