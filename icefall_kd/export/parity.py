"""Whether the forms of a model say the same of the same utterances."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from icefall_kd.export.sides import Side, contexts, ctc_tokens, greedy
from icefall_kd.export.streaming import ChunkEncoder, torch_step
from icefall_kd.tap import ModelTap
from icefall_kd.transcripts.recognizer import CTC as CTC_SEARCH
from icefall_kd.transcripts.recognizer import GREEDY, Method
from icefall_kd.transcripts.scores import Result, count_errors

FP32_BOUND = 1e-4  # the largest difference of an output in fp32
WER_BOUND = 0.2  # percentage points by which a smaller form's error rate may be higher
EXACT = ("torchscript", "fp32")  # forms with the first bound; others have the second
TRANSDUCER, CTC = "transducer", "ctc"


@dataclass(frozen=True)
class Utterance:
    """What is given to both sides.

    Args:
      id: The cut's.
      features: (1, T, F), those of the recipe.
      text: The transcript; None for none.
      seconds: Of audio.
      audio: Samples (T,) in [-1, 1].
    """

    id: str
    features: np.ndarray
    text: Optional[str]
    seconds: float
    audio: np.ndarray


@dataclass
class Account:
    """What a form said, against torch.

    Args:
      form: Its name.
      head: transducer or ctc.
      encoder: The largest difference of the encoder's output, of a CTC head of its
        log-probabilities; None where it isn't seen. So are the next two.
      decoder: Of the decoder's.
      joiner: Of the joiner's, of torch's own outputs of encoder and decoder.
      cuts: Utterances.
      same: Utterances with the same tokens.
      wer: Percent; None without transcripts.
      bytes: Of its files.
      rtf: Seconds for a second of audio, one thread.
    """

    form: str
    head: str
    encoder: Optional[float] = None
    decoder: Optional[float] = None
    joiner: Optional[float] = None
    cuts: int = 0
    same: int = 0
    wer: Optional[float] = None
    bytes: int = 0
    rtf: float = 0.0
    differ: List[str] = field(default_factory=list)  # cut ids
    broken: List[str] = field(default_factory=list)  # what is wrong, a sentence each

    def as_dict(self) -> Dict[str, Any]:
        """As parity.json has it."""
        return asdict(self)


class Reference:
    """The recipe's own model, with the searches of this package, batch 1.

    Args:
      model: In eval mode, on the CPU.
      settings: The recipe's params.
      head: transducer or ctc.
      chunks: The encoder for streaming; None for whole utterances.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Dict[str, Any],
        head: str,
        chunks: Optional[ChunkEncoder] = None,
    ) -> None:
        self.model, self.head, self.chunks = model, head, chunks
        self.blank_id = int(settings.get("blank_id", 0))
        name = CTC_SEARCH if head == CTC else GREEDY
        self.search = Method(name, draft="none").search(model, self.blank_id)
        self.tap = ModelTap(model, with_ctc=False)

    def close(self) -> None:
        """Remove the hooks from the model."""
        self.tap.close()

    @torch.no_grad()
    def __call__(self, features: np.ndarray) -> Tuple[np.ndarray, List[int]]:
        """What a form's encoder should give, and the tokens.

        Args:
          features: (1, T, F).
        """
        encoder_out = self._encode(features)
        lens = torch.tensor([encoder_out.size(1)])
        (found,) = self.search(encoder_out, lens).hypotheses
        if self.head == CTC:
            rows = self.model.ctc_output(encoder_out)
        else:
            rows = self.model.joiner.encoder_proj(encoder_out)
        return rows.squeeze(0).numpy(), list(found.tokens)

    def _encode(self, features: np.ndarray) -> torch.Tensor:
        """The encoder output (1, T', C)."""
        if self.chunks is not None:
            rows = self.chunks.encode(torch_step(self.chunks), features)
            return torch.from_numpy(rows).unsqueeze(0)
        x = torch.from_numpy(features)
        return self.tap.encode(x, torch.tensor([x.size(1)])).encoder_out


class Comparison:
    """Compares forms with torch, utterance by utterance.

    Args:
      reference: The recipe's own model.
      torch_side: The same by its parts, for decoder and joiner.
      sides: The forms.
      tokenizer: Makes text of tokens.
    """

    def __init__(
        self, reference: Reference, torch_side: Side, sides: List[Side], tokenizer: Any
    ) -> None:
        self.reference, self.torch_side, self.sides = reference, torch_side, sides
        self.tokenizer, self.head = tokenizer, reference.head
        self.seconds = {side.name: 0.0 for side in [torch_side, *sides]}
        self.tokens: Dict[str, List[List[int]]] = {name: [] for name in self.seconds}
        self.encoder = {side.name: 0.0 for side in sides}
        self.audio = 0.0
        self.utterances: List[Tuple[str, Optional[str]]] = []

    def run(self, utterances: Iterable[Utterance]) -> None:
        """Give utterances to all sides.

        Args:
          utterances: They are read once.
        """
        for utterance in utterances:
            begin = time.perf_counter()
            expected, tokens = self.reference(utterance.features)
            self._note(self.torch_side.name, tokens, begin)
            for side in self.sides:
                begin = time.perf_counter()
                found, tokens = self._recognize(side, utterance.features)
                self._note(side.name, tokens, begin)
                difference = largest(found, expected)
                self.encoder[side.name] = max(self.encoder[side.name], difference)
            if not self.utterances:
                self.first = expected
            self.utterances.append((utterance.id, utterance.text))
            self.audio += utterance.seconds

    def _note(self, name: str, tokens: List[int], begin: float) -> None:
        self.seconds[name] += time.perf_counter() - begin
        self.tokens[name].append(tokens)

    def _recognize(self, side: Side, x: np.ndarray) -> Tuple[np.ndarray, List[int]]:
        blank_id = self.reference.blank_id
        if self.head == CTC:
            rows = side.log_probs(x)
            return rows, ctc_tokens(rows, blank_id)
        rows = side.encode(x)
        context_size = int(self.reference.model.decoder.context_size)
        return rows, greedy(side, rows, context_size, blank_id)

    def accounts(self) -> List[Account]:
        """Torch's, and that of each form."""
        rows = [self.account(self.torch_side.name)]
        for side in self.sides:
            row = self.account(side.name)
            row.encoder, row.bytes = self.encoder[side.name], side.bytes
            if self.head == TRANSDUCER:
                row.decoder, row.joiner = self._of_parts(side)
            rows.append(row)
        return rows

    def _of_parts(self, side: Side) -> Tuple[float, float]:
        """The largest differences of decoder and joiner, each with torch's inputs."""
        decoder = self.reference.model.decoder
        size = decoder.embedding.num_embeddings
        y = contexts(size, int(decoder.context_size), self.reference.blank_id)
        rows = self.torch_side.decode(y)
        frames = np.resize(self.first, rows.shape).astype(np.float32)
        logits = self.torch_side.join(frames, rows)
        decoded = largest(side.decode(y), rows)
        return decoded, largest(side.join(frames, rows), logits)

    def add(self, name: str, tokens: List[List[int]], seconds: float) -> Account:
        """The account of a form that gives tokens alone.

        Args:
          name: The form.
          tokens: Of each utterance.
          seconds: For all of them.
        """
        self.tokens[name], self.seconds[name] = tokens, seconds
        return self.account(name)

    def account(self, name: str) -> Account:
        """The account of tokens and time of a form.

        Args:
          name: The form.
        """
        found, expected = self.tokens[name], self.tokens[self.torch_side.name]
        ids = [cut_id for cut_id, _ in self.utterances]
        differ = [i for i, a, b in zip(ids, found, expected) if a != b]
        return Account(
            name,
            self.head,
            cuts=len(ids),
            same=len(ids) - len(differ),
            wer=self._wer(found),
            rtf=self.seconds[name] / max(self.audio, 1e-9),
            differ=differ,
        )

    def _wer(self, tokens: List[List[int]]) -> Optional[float]:
        results = [
            Result(cut_id, text.split(), self.tokenizer.decode(found).split())
            for (cut_id, text), found in zip(self.utterances, tokens)
            if text
        ]
        return round(count_errors(results).percent, 4) if results else None


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two arrays; infinite where shapes differ or for NaN.

    Args:
      found: The one.
      expected: The other.
    """
    if found.shape != expected.shape:
        return float("inf")
    difference = float(np.abs(found - expected).max()) if found.size else 0.0
    return difference if difference == difference else float("inf")


def judge(accounts: Sequence[Account]) -> None:
    """Note in each account what is wrong with its form.

    Args:
      accounts: Of a head, torch's first.
    """
    for row in accounts[1:]:
        if ", batch" in row.form:  # for information
            continue
        form = f"the form {row.form} ({row.head})"
        if row.form in EXACT or row.form.startswith("plain-"):
            for part in ("encoder", "decoder", "joiner"):
                value = getattr(row, part)
                if value is not None and not value <= FP32_BOUND:
                    row.broken.append(
                        f"{form} is not the model: its {part} differs by {value:.2g} "
                        f"from torch, and {FP32_BOUND:g} is the bound: export again"
                    )
        elif row.form == "sherpa-onnx fp32":
            if row.differ:
                row.broken.append(
                    f"{form} has other tokens than torch in {len(row.differ)} of "
                    f"{row.cuts} utterances, first in {row.differ[0]}: compare the "
                    "features of metadata.json with the recipe's"
                )
        elif row.wer is not None and accounts[0].wer is not None:
            if row.wer > accounts[0].wer + WER_BOUND:
                row.broken.append(
                    f"{form} has a WER of {row.wer:.2f} %, torch "
                    f"{accounts[0].wer:.2f} %, and {WER_BOUND} points are the bound: "
                    "keep the part that pays in fp32, or train with int8 in view"
                )


def markdown_of(rows: Sequence[Sequence[str]]) -> str:
    """A table for a document.

    Args:
      rows: Of :func:`table_of`.
    """
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def table_of(accounts: Sequence[Account]) -> List[Tuple[str, ...]]:
    """The rows of the table that a user sees.

    Args:
      accounts: Of all heads and forms.
    """
    head = ("form", "head", "encoder", "decoder", "joiner")
    rows: List[Tuple[str, ...]] = [(*head, "same tokens", "WER %", "MB", "RTF")]
    for row in accounts:
        differences = [
            "" if value is None else f"{value:.1e}"
            for value in (row.encoder, row.decoder, row.joiner)
        ]
        rows.append(
            (
                *(row.form, row.head, *differences, f"{row.same} of {row.cuts}"),
                "" if row.wer is None else f"{row.wer:.2f}",
                f"{row.bytes / 1e6:.2f}" if row.bytes else "",
                f"{row.rtf:.4f}",
            )
        )
    return rows
