"""Runs a model's encoder and a search on batches of features."""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.decode import BeamSearch, CtcSearch, GreedySearch, skip_blanks
from icefall_kd.decode.frames import Frames
from icefall_kd.decode.types import Hypothesis, SearchReport, SearchResult
from icefall_kd.decode.windows import OVERLAP, WindowedEncoder
from icefall_kd.errors import require
from icefall_kd.tap import ModelTap
from icefall_kd.transcripts.audio import lengths_in_batch
from icefall_kd.zipformer import MIN_FRAMES, ctc_linear, has_ctc, has_transducer

CTC, GREEDY, BEAM = "ctc-greedy-search", "greedy_search", "modified_beam_search"
METHODS = (GREEDY, BEAM, CTC)  # icefall's names
# icefall's decoding lengthens the input of a causal model by frames of silence.
CAUSAL_PADDING = 30
FRAMES_PER_SECOND = 100  # of features
SILENCE = math.log(1e-10)


@dataclass(frozen=True)
class Method:
    """A search and its options.

    Args:
      name: One of :data:`METHODS`.
      beam_size: Hypotheses that ``modified_beam_search`` keeps.
      max_sym_per_frame: The most tokens of a frame that ``greedy_search`` finds.
      draft: Where ``greedy_search`` takes its draft from; see ``GreedySearch``.
      skip_blanks: The transducer's searches leave out frames to whose blank the CTC
        head gives a probability above this, which is not exact; None: no frame.
      causal_padding: Feature frames of silence that a causal model hears behind each
        utterance; icefall's decoding has 30. They are of features without
        normalisation: to a model that hears features less the mean of each utterance
        they are no silence, and it wants 0.
      reset_context_after: Seconds without a token after which the context of
        ``greedy_search`` begins anew, rounded to frames, one at least; None: never. See
        ``GreedySearch``.

    Raises:
      KDError: options that are not for this search, or don't go together.
    """

    name: str = GREEDY
    beam_size: int = 4
    max_sym_per_frame: int = 1
    draft: str = "auto"
    skip_blanks: Optional[float] = None
    causal_padding: int = CAUSAL_PADDING
    reset_context_after: Optional[float] = None

    def __post_init__(self) -> None:
        require(
            self.skip_blanks is None or self.name != CTC,
            "`skip_blanks` is for the transducer's searches, and `decoding_method` is "
            f"{CTC}: leave it out",
        )
        require(
            self.reset_context_after is None or self.name == GREEDY,
            f"`reset_context_after` is for {GREEDY}, and `decoding_method` is "
            f"{self.name}: leave it out",
        )
        require(
            self.reset_context_after is None or self.skip_blanks is None,
            "`reset_context_after` counts frames without a token, and `skip_blanks` "
            "leaves such frames out: give one of them",
        )

    def options(self) -> Dict[str, Any]:
        """The options of this search, without those of others.

        Defaults that journals and cascades of former versions do not have are left out.
        """
        names = {
            GREEDY: ("name", "max_sym_per_frame", "draft", "skip_blanks"),
            BEAM: ("name", "beam_size", "skip_blanks"),
            CTC: ("name",),
        }
        options = {name: getattr(self, name) for name in names[self.name]}
        if self.causal_padding != CAUSAL_PADDING:
            options["causal_padding"] = self.causal_padding
        if self.reset_context_after is not None:
            options["reset_context_after"] = self.reset_context_after
        return options

    @property
    def setting(self) -> str:
        """icefall's name of the setting in a summary of error rates."""
        return f"{BEAM}_beam-size-{self.beam_size}" if self.name == BEAM else self.name

    def suffix(self, context_size: int) -> str:
        """Return what the names of result files have of the search.

        Args:
          context_size: The decoder's.
        """
        suffix = ""
        if self.name == BEAM:
            suffix = f"__{BEAM}__beam-size-{self.beam_size}"
        elif self.name == GREEDY:
            suffix = f"_context-{context_size}"
            suffix += f"_max-sym-per-frame-{self.max_sym_per_frame}"
        if self.skip_blanks is not None:
            suffix += f"_skip-blanks-{self.skip_blanks:g}"
        if self.reset_context_after is not None:
            suffix += f"_reset-context-after-{self.reset_context_after:g}"
        return suffix

    def search(self, model: nn.Module, blank_id: int) -> Any:
        """Make the search.

        Args:
          model: A recipe's model in eval mode.
          blank_id: The token id of blank.

        Raises:
          KDError: a model that lacks the head.
        """
        is_ctc = self.name == CTC
        head, use = ("CTC", "`use_ctc`") if is_ctc else ("transducer", "a transducer")
        others = [m for m in METHODS if (m == CTC) != is_ctc]
        require(
            has_ctc(model) if is_ctc else has_transducer(model),
            f"`decoding_method` is {self.name} and the model {type(model).__name__} "
            f"has no {head} head: give {' or '.join(others)}, or a model that was "
            f"trained with {use}",
        )
        if is_ctc:
            return CtcSearch(model, blank_id)
        skips = self.skip_blanks is not None
        require(
            not skips or has_ctc(model),
            f"`skip_blanks` is {self.skip_blanks} and the model {type(model).__name__} "
            "has no CTC head, by which frames are left out: leave it out",
        )
        if self.name == BEAM:
            search = BeamSearch(model, beam=self.beam_size)
        else:
            # One token a frame: icefall's decode.py calls greedy_search_batch then.
            most = None if self.max_sym_per_frame == 1 else self.max_sym_per_frame
            draft = "none" if skips else self.draft
            reset = None
            if self.reset_context_after is not None:
                frame = Frames(model).seconds(1)
                reset = max(1, round(self.reset_context_after / frame))
            search = GreedySearch(model, most, draft=draft, reset_after=reset)
        if skips:
            return SkippingSearch(model, search, self.skip_blanks, blank_id)
        return search


class SkippingSearch:
    """A transducer's search without the frames that the CTC head calls blank.

    Args:
      model: The model, with a CTC head.
      search: The search.
      threshold: Frames whose probability of blank is above this are left out.
      blank_id: The token id of blank.
    """

    def __init__(
        self, model: nn.Module, search: Any, threshold: float, blank_id: int
    ) -> None:
        self.linear, self.search = ctc_linear(model), search
        self.threshold, self.blank_id = threshold, blank_id

    @torch.no_grad()
    def __call__(
        self, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor
    ) -> SearchResult:
        """Search whole utterances.

        Args:
          encoder_out: (N, T, C).
          encoder_out_lens: (N,), valid frames.

        Returns:
          The search's result; frames are counted among all.
        """
        logits = self.linear(encoder_out)
        kept = skip_blanks(
            encoder_out, encoder_out_lens, logits, self.threshold, self.blank_id
        )
        result = self.search(kept.encoder_out, kept.encoder_out_lens)
        return replace(result, hypotheses=kept.restore(result.hypotheses))


@dataclass
class Recognized:
    """What was found in an utterance."""

    tokens: List[int] = field(default_factory=list)
    frames: List[int] = field(default_factory=list)  # of each token
    log_probs: List[float] = field(default_factory=list)  # of each token, in nats
    num_frames: int = 0  # of encoder output
    # Of the CTC head, if there is one: its tokens, and the mean over frames of the
    # log-probability of the best.
    ctc_tokens: List[int] = field(default_factory=list)
    ctc_log_prob: float = 0.0


@dataclass
class BatchCost:
    """Seconds that a batch took, by part, and the search's own counts."""

    encoder: float = 0.0
    search: float = 0.0
    confidence: float = 0.0  # what the CTC head says beside a transducer's search
    report: SearchReport = field(default_factory=lambda: SearchReport(""))


class Recognizer:
    """A model with a search.

    Each utterance's encoder output is what it would be without the others of a batch
    (:meth:`icefall_kd.tap.ModelTap.encode`).

    Args:
      model: A recipe's model.
      settings: Its recipe's params.
      method: The search.
      device: Where it runs.
      window: Seconds; longer utterances are encoded in windows of this length that
        overlap, which is not exact. None: all are encoded as a whole.

    Raises:
      KDError: a model that lacks the head of the search, or a window that it can't
        take.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Dict[str, Any],
        method: Method,
        device: torch.device,
        window: Optional[float] = None,
    ) -> None:
        self.model = model.eval().to(device).requires_grad_(False)
        self.device, self.method = device, method
        self.padding = method.causal_padding if settings.get("causal") else 0
        blank_id = int(settings.get("blank_id", 0))
        self.search = method.search(self.model, blank_id)
        self.ctc = None
        if method.name != CTC and has_ctc(model):
            self.ctc = CtcSearch(self.model, blank_id)
        self.windows, self.longest = None, math.inf
        if window is not None:
            overlap = min(OVERLAP, window)
            self.windows = WindowedEncoder(self.model, window, overlap)
            self.longest = window * FRAMES_PER_SECOND
        self.tap = ModelTap(self.model, with_ctc=False)

    def close(self) -> None:
        """Remove the hooks from the model."""
        self.tap.close()

    def __call__(
        self, x: torch.Tensor, x_lens: torch.Tensor
    ) -> Tuple[List[Recognized], BatchCost]:
        """Recognize the utterances of a batch; one that is too short has no tokens.

        Args:
          x: (N, T, F), features.
          x_lens: (N,), valid feature frames.

        Returns:
          What was found in each, and what it cost.
        """
        recognized = [Recognized() for _ in x]
        cost = BatchCost()
        rows = lengths_in_batch(x_lens, MIN_FRAMES)
        if not rows:
            return recognized, cost
        x, x_lens = self._padded(x[rows], x_lens[rows])
        begin = self._now()
        encoder_out, lens = self._encode(x, x_lens)
        cost.encoder = -(begin - (begin := self._now()))
        result = self.search(encoder_out, lens)
        cost.search = -(begin - (begin := self._now()))
        cost.report = result.report
        by_ctc: Sequence[Hypothesis] = result.hypotheses
        if self.ctc is not None:
            by_ctc = self.ctc(encoder_out, lens).hypotheses
            cost.confidence = self._now() - begin
        has_head = self.ctc is not None or self.method.name == CTC
        for i, hypothesis, heard, n in zip(
            rows, result.hypotheses, by_ctc, lens.tolist()
        ):
            recognized[i] = Recognized(
                list(hypothesis.tokens),
                list(hypothesis.frames),
                [round(value, 4) for value in hypothesis.log_probs],
                n,
            )
            if has_head:
                recognized[i].ctc_tokens = list(heard.tokens)
                recognized[i].ctc_log_prob = round(heard.score / n, 5)
        return recognized, cost

    def _encode(
        self, x: torch.Tensor, x_lens: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Encoder output (N, T, C) and lengths; in windows if an utterance is long."""
        if x.size(1) <= self.longest:
            out = self.tap.encode(x, x_lens)
            return out.encoder_out, out.encoder_out_lens
        rows = []
        for features, n in zip(x, x_lens.tolist()):
            rows.append(torch.cat(list(self.windows(features[:n])), 1).squeeze(0))
        lens = torch.tensor([len(row) for row in rows], device=x.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lens

    def _padded(
        self, x: torch.Tensor, x_lens: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The batch on the device, with silence behind each utterance if causal."""
        x, x_lens = x.to(self.device), x_lens.to(self.device)
        x = x[:, : int(x_lens.max())]
        if self.padding:
            x = nn.functional.pad(x, (0, 0, 0, self.padding), value=SILENCE)
            frames = torch.arange(x.size(1), device=x.device)
            behind = frames >= x_lens.unsqueeze(1)
            x = x.masked_fill(behind.unsqueeze(-1), SILENCE)
            x_lens = x_lens + self.padding
        return x, x_lens

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
