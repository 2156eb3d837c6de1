"""Checks the files of a folder against the recipe's model, on cuts."""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from icefall_kd.errors import KDError, require
from icefall_kd.export.build import CTC_HEAD, PARTS, PLAIN, TORCHSCRIPT
from icefall_kd.export.features import FeatureSettings, comparable
from icefall_kd.export.folder import (
    FP32,
    PRECISIONS,
    TABLE,
    TOKENS,
    ExportFolder,
    hash_of_file,
    read_tokens,
    versions,
)
from icefall_kd.export.parity import (
    Account,
    Comparison,
    Reference,
    Utterance,
    judge,
    markdown_of,
    table_of,
)
from icefall_kd.export.sherpa import recognize
from icefall_kd.export.sides import Side, onnx_side, script_side, torch_side
from icefall_kd.export.streaming import ChunkEncoder, padded
from icefall_kd.files import replacing
from icefall_kd.report.exports import PARITY
from icefall_kd.teacher.spec import LoadedTeacher
from icefall_kd.zipformer import MIN_FRAMES

# sherpa-onnx 2.0.1 takes the states of a streaming CTC model's front end to be so wide,
# as those of 80 Mel bins are.
SHERPA_WIDTH = 19
BATCH = 8  # utterances that sherpa-onnx decodes at once, beside one by one


def check_files(folder: ExportFolder, names: Sequence[str]) -> None:
    """Refuse files that are not those that were written.

    Args:
      folder: With its metadata.json.
      names: The model's tokens in the order of their ids.

    Raises:
      KDError: A file is missing or has changed, or tokens are not the model's.
    """
    require(folder.metadata["files"], f"{folder.path} holds no file of a model")
    for name, values in folder.metadata["files"].items():
        path = folder.path / name
        require(path.is_file(), f"{path} is missing: export again")
        require(
            hash_of_file(path) == values.get("sha256"),
            f"{path} is not the file that was exported (metadata.json has the hash "
            f"{str(values.get('sha256'))[:8]}, and it has {hash_of_file(path)[:8]}): "
            "export again",
        )
    found = read_tokens(folder.path / TOKENS)
    for i, (was, now) in enumerate(zip(found, names)):
        require(
            was == now,
            f"{folder.path / TOKENS} is not of this model: its token {i} is {was!r} "
            f"and the model's is {now!r}: export again",
        )
    require(
        len(found) == len(names),
        f"{folder.path / TOKENS} has {len(found)} tokens and the model {len(names)}: "
        "export again",
    )


def utterances_of(
    cuts: str,
    features: FeatureSettings,
    on_the_fly: bool,
    chunks: Optional[ChunkEncoder] = None,
    num_cuts: Optional[int] = None,
) -> List[Utterance]:
    """The utterances of a manifest that both sides can be given.

    Args:
      cuts: The manifest.
      features: How features are computed.
      on_the_fly: Whether they are computed of the audio, and not stored.
      chunks: The encoder for streaming, which gets audio with silence behind it; None
        for whole utterances.
      num_cuts: How many, from the first on; None for all.

    Raises:
      KDError: A cut that can't be read, or none that is long enough.
    """
    utterances = []
    for cut in islice(comparable(cuts, on_the_fly), num_cuts):
        try:
            audio = np.asarray(cut.load_audio())[0].astype(np.float32)
            if chunks is not None:
                audio = padded(audio, features.sampling_rate, chunks.num_frames)
                array = features.of_samples(audio[None])
            elif on_the_fly:
                array = features.compute(cut)
            else:
                array = cut.load_features()
        except Exception as e:  # whatever lhotse and its backends raise
            raise KDError(
                f"the cut {cut.id} of {cuts} can't be read ({type(e).__name__}: "
                f"{' '.join(str(e).split())[:150]}): give cuts with features and audio"
            ) from None
        if len(array) < MIN_FRAMES:
            continue
        text = cut.supervisions[0].text if cut.supervisions else None
        x = np.ascontiguousarray(array, dtype=np.float32)[None]
        utterances.append(Utterance(cut.id, x, text, cut.duration, audio))
    require(
        utterances,
        f"{cuts} has no cut of one channel, with audio and features, of {MIN_FRAMES} "
        "feature frames or more: give others",
    )
    return utterances


def check_lengths(utterances: Sequence[Utterance], num_frames: int) -> None:
    """Refuse utterances that a plain form can't take.

    Args:
      utterances: None or more.
      num_frames: Feature frames of the plain form.

    Raises:
      KDError: One is longer.
    """
    for utterance in utterances:
        length = utterance.features.shape[1]
        require(
            length <= num_frames,
            f"`num_frames` is {num_frames}, and the cut {utterance.id} to check with "
            f"has {length} feature frames: give as many at least, or shorter cuts",
        )


def check(
    loaded: LoadedTeacher,
    folder: ExportFolder,
    utterances: List[Utterance],
    tokenizer: Any,
    names: Sequence[str],
    sherpa: bool,
    chunks: Optional[ChunkEncoder] = None,
) -> List[Account]:
    """Give the utterances of cuts to all forms of a model.

    Args:
      loaded: The model.
      folder: With its files.
      utterances: One or more.
      tokenizer: Makes text of tokens.
      names: The tokens in the order of their ids.
      sherpa: Whether sherpa-onnx gets the audio too.
      chunks: The encoder for streaming; None for whole utterances.

    Returns:
      An account of each form, by head, torch's first.

    Raises:
      KDError: Files or packages with which nothing can be compared.
    """
    model = loaded.model.cpu().eval()
    accounts: List[Account] = []
    for head, sides in _sides(folder, chunks).items():
        reference = Reference(model, loaded.settings, head, chunks)
        try:
            comparison = Comparison(reference, torch_side(model), sides, tokenizer)
            comparison.run(utterances)
        finally:
            reference.close()
        of_head = comparison.accounts()
        if sherpa and sherpa_can(head, chunks):
            audio = [utterance.audio for utterance in utterances]
            of_head += _of_sherpa(folder, head, comparison, audio, names)
        judge(of_head)
        accounts += of_head
    return accounts


def write_findings(
    folder: ExportFolder, accounts: Sequence[Account], cuts: str
) -> Tuple[List[str], List[str]]:
    """Write what was found, and rename the files of forms that are wrong.

    Args:
      folder: With the files that were checked.
      accounts: Of :func:`check`.
      cuts: The manifest of the utterances.

    Returns:
      What is wrong, a sentence each, and the names that wrong files had.
    """
    sentences = [sentence for row in accounts for sentence in row.broken]
    findings = {
        "cuts": cuts,
        "versions": versions(),
        "broken": sentences,
        "forms": [row.as_dict() for row in accounts],
    }
    as_json = json.dumps(findings, indent=1, ensure_ascii=False) + "\n"
    for name, text in ((PARITY, as_json), (TABLE, markdown_of(table_of(accounts)))):
        with replacing(folder.path / name, shared=True) as temporary:
            temporary.write_text(text, "utf8")
    folder.metadata["checked"] = {
        "file": PARITY,
        "utterances": accounts[0].cuts,
        "broken": len(sentences),
    }
    withdrawn = withdraw(folder, accounts)
    folder.finish()
    return sentences, withdrawn


def withdraw(folder: ExportFolder, accounts: Sequence[Account]) -> List[str]:
    """Rename the files of forms that are wrong.

    Where fp32 is wrong, so are the smaller files of the head, which are made of it.

    Args:
      folder: With the files that were checked.
      accounts: Of :func:`check`.

    Returns:
      The names that the files had.
    """
    withdrawn: Dict[str, str] = {}
    for row in (row for row in accounts if row.broken):
        form = row.form.replace("sherpa-onnx ", "").split(",")[0]
        form, _, part = form.partition(" ")
        parts = (part.replace(" alone", ""),) if part else PARTS[row.head]
        precisions = PRECISIONS if form == FP32 else (form,)
        for name, values in folder.metadata["files"].items():
            of_form = values["precision"] in precisions or name.startswith(f"{form}/")
            # Both heads share the file of TorchScript, and the folder of a plain form.
            shared = values["precision"] in (TORCHSCRIPT, PLAIN)
            if of_form and (shared or values["part"] in parts):
                withdrawn.setdefault(name, row.broken[0])
    for name, sentence in withdrawn.items():
        folder.fail(name, sentence)
    return list(withdrawn)


def sherpa_can(head: str, chunks: Optional[ChunkEncoder]) -> bool:
    """Whether sherpa-onnx has a reader for such files.

    Args:
      head: transducer or ctc.
      chunks: The encoder for streaming; None for whole utterances.
    """
    if head != CTC_HEAD or chunks is None:
        return True
    return int(chunks.encoder_embed.out_width) == SHERPA_WIDTH


def _sides(
    folder: ExportFolder, chunks: Optional[ChunkEncoder]
) -> Dict[str, List[Side]]:
    """The forms in a folder, by head."""
    heads: Dict[str, List[Side]] = {}
    scripts = list(folder.files(TORCHSCRIPT).values())
    for head, parts in PARTS.items():
        sides = []
        for path in scripts:
            side = script_side(path, chunks)
            if (side.log_probs if head == CTC_HEAD else side.encode) is not None:
                sides.append(side)
        for name, files in forms_of(folder, parts):
            sides.append(onnx_side(name, files, chunks))
        if folder.files(PLAIN):
            from icefall_kd.export.plain_folder import plain_sides  # it needs onnx

            sides += plain_sides(folder, head)
        if sides:
            heads[head] = sides
    return heads


def forms_of(
    folder: ExportFolder, parts: Sequence[str]
) -> List[Tuple[str, Dict[str, Path]]]:
    """The files of each precision, with those of fp32 for parts that have no other.

    Args:
      folder: The folder.
      parts: Of a head.

    Returns:
      The names of forms, and their files by part. Where several parts are in int8, each
      is there alone too, to see which of them pays.
    """
    whole = {p: f for p, f in folder.files(FP32).items() if p in parts}
    if set(whole) != set(parts):
        return []
    forms = [(FP32, whole)]
    for precision in PRECISIONS[1:]:
        smaller = {p: f for p, f in folder.files(precision).items() if p in parts}
        if smaller:
            forms.append((precision, {**whole, **smaller}))
        if len(smaller) > 1 and precision == "int8":
            for part, path in smaller.items():
                forms.append((f"{precision} {part} alone", {**whole, part: path}))
    return forms


def _of_sherpa(
    folder: ExportFolder,
    head: str,
    comparison: Comparison,
    audio: List[np.ndarray],
    names: Sequence[str],
) -> List[Account]:
    """The accounts of sherpa-onnx, from the audio, utterance by utterance and not."""
    # It writes the mark of a word's beginning as a space.
    ids = {name.replace("▁", " "): i for i, name in enumerate(names)}
    accounts = []
    features = folder.metadata["features"]
    for form, files in forms_of(folder, PARTS[head]):
        if " " in form:  # the parts of a form
            continue
        streams = comparison.reference.chunks is not None
        for batch in (1,) if streams else (1, BATCH):
            name = f"sherpa-onnx {form}" + (f", batch {batch}" if batch > 1 else "")
            tokens = folder.path / TOKENS
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch)
                try:
                    found = recognize(
                        files, tokens, features, audio, place, batch, streams
                    )
                except KDError as e:
                    accounts.append(Account(name, head, broken=[str(e)]))
                    break
            texts = found["tokens"]
            rows = [[ids.get(t.replace("▁", " "), -1) for t in row] for row in texts]
            account = comparison.add(name, rows, found["seconds"])
            account.bytes = sum(path.stat().st_size for path in files.values())
            accounts.append(account)
    return accounts
