"""How far a student is from its teacher, term by term and by kinds of frames."""

from contextlib import ExitStack
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.forecast.measures import BLANKS, SPIKES, TermMeasures
from icefall_kd.lattice import decode_labels
from icefall_kd.losses.hidden import hidden_kd_loss
from icefall_kd.losses.kl import FLOOR
from icefall_kd.losses.nodes import nodes_of
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.model_state import restoring_state
from icefall_kd.student.importance import FeatureBatch
from icefall_kd.tap import ModelTap
from icefall_kd.types import EncoderOut
from icefall_kd.zipformer import has_ctc, has_transducer

MOST_FRAMES = 20_000  # of the encoder output, for the linear map between widths


class SplitKL(NamedTuple):
    """Of R rows, (R,) each, in nats."""

    blank: torch.Tensor  # KL of blank against all other tokens
    tokens: torch.Tensor  # (1 - b) KL among the other tokens
    entropy: torch.Tensor  # the teacher's
    is_spike: torch.Tensor  # bool: the teacher's best token is not blank


def split_kl(teacher: torch.Tensor, student: torch.Tensor, blank_id: int) -> SplitKL:
    """Split the KL divergence of rows into that of blank and that of the tokens.

    With b the teacher's probability of blank, KL(p || q) = KL((b, 1 - b) || (b', 1 -
    b')) + (1 - b) KL(p of the others || q of the others), exactly: the chain rule of
    the divergence. (Zhao et al., arXiv:2203.08679, split it so at the true class.)

    Args:
      teacher: (R, V), logits.
      student: (R, V), logits.
      blank_id: The token id of blank.
    """
    log_p, log_q = (
        x.double().log_softmax(-1).clamp(min=FLOOR) for x in (teacher, student)
    )
    others = torch.arange(log_p.size(1), device=log_p.device) != blank_id
    rest_p, rest_q = (x[:, others].logsumexp(-1) for x in (log_p, log_q))
    p = log_p.exp()
    blank = p[:, blank_id] * (log_p - log_q)[:, blank_id]
    blank += rest_p.exp() * (rest_p - rest_q)
    tokens = (p * (log_p - log_q))[:, others].sum(-1)
    tokens -= rest_p.exp() * (rest_p - rest_q)
    entropy = -(p * log_p).sum(-1)
    return SplitKL(blank, tokens, entropy, log_p.argmax(-1) != blank_id)


class _Sums:
    """Weighted sums of :class:`SplitKL` by kind of rows."""

    def __init__(self, term: str) -> None:
        self.term = term
        self.sums = {where: [0.0] * 4 for where in (BLANKS, SPIKES)}

    def add(self, rows: SplitKL, weights: Optional[torch.Tensor] = None) -> None:
        weights = torch.ones_like(rows.blank) if weights is None else weights.double()
        for where, kind in ((BLANKS, ~rows.is_spike), (SPIKES, rows.is_spike)):
            w = weights * kind
            columns = (torch.ones_like(w), rows.blank, rows.tokens, rows.entropy)
            for i, column in enumerate(columns):
                self.sums[where][i] += float((w * column).sum())

    def measures(self) -> List[TermMeasures]:
        measured = []
        for where, (count, *sums) in self.sums.items():
            if count:
                blank, tokens, entropy = (x / count for x in sums)
                value = blank + tokens
                measured.append(
                    TermMeasures(self.term, where, count, value, blank, tokens, entropy)
                )
        return measured


class _Hidden:
    """The encoder outputs of both, up to MOST_FRAMES frames."""

    def __init__(self) -> None:
        self.rows: List[Tuple[torch.Tensor, torch.Tensor]] = []  # of each utterance
        self.frames = 0

    def add(self, teacher: EncoderOut, student: EncoderOut) -> None:
        outs = zip(
            teacher.encoder_out, student.encoder_out, teacher.encoder_out_lens.tolist()
        )
        for y, x, n in outs:
            if self.frames < MOST_FRAMES:
                self.rows.append((x[:n].double(), y[:n].double()))
                self.frames += n

    def measures(self) -> List[TermMeasures]:
        """The cosine distance, after the linear map that fits best.

        The map is fitted on every other utterance and measured on the others, as the
        training fits a projector; of equal widths there is no map.
        """
        if not self.rows:
            return []
        fitted, measured = self.rows[::2], self.rows[1::2] or self.rows
        x, y = (torch.cat(rows) for rows in zip(*measured))
        if x.size(1) != y.size(1):
            a, b = (torch.cat(rows) for rows in zip(*fitted))
            matrix = torch.linalg.lstsq(_with_one(a), b, driver="gelsd").solution
            x = _with_one(x) @ matrix
        lengths = torch.tensor([len(x)])
        rows = (z[None, :, None] for z in (x, y))  # (1, F, 1, C)
        value = hidden_kd_loss(*rows, lengths, distance="cosine")
        mean = float(value) / len(x)
        return [TermMeasures("hidden", "encoder output", float(len(x)), mean)]


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, torch.ones_like(x[:, :1])), 1)


@torch.no_grad()
def divergences(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[FeatureBatch],
    blank_id: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> Tuple[TermMeasures, ...]:
    """Measure how far a student is from its teacher in each term.

    "ctc" has the frames of the CTC head, and "rnnt" the nodes of the teacher's lattice
    weighted by their occupancy, each where the teacher's best token is blank and where
    it is not. "hidden" has the cosine distance of the encoder outputs.

    Args:
      teacher: An icefall AsrModel.
      student: Another, of the same tokens and frame rate.
      batches: Features (N, T, F), lengths (N,) in feature frames, and token ids.
      blank_id: The token id of blank.
      advance: A function that is called after each batch.
    """
    models = (teacher, student)
    with_ctc = all(map(has_ctc, models))
    with_lattice = all(map(has_transducer, models))
    ctc, nodes, hidden = _Sums("ctc"), _Sums("rnnt"), _Hidden()
    taps = [ModelTap(model, with_ctc=with_ctc) for model in models]
    with ExitStack() as stack:
        for tap in taps:
            stack.enter_context(tap)
        stack.enter_context(restoring_state(student))
        student.eval()
        for x, x_lens, y in batches:
            outs = [tap.encode(x, x_lens) for tap in taps]
            hidden.add(*outs)
            if with_ctc:
                ctc.add(split_kl(*map(_valid_logits, outs), blank_id))
            if with_lattice:
                nodes.add(*_node_rows(taps, outs, y, blank_id))
            advance()
    return tuple(ctc.measures() + nodes.measures() + hidden.measures())


def _valid_logits(out: EncoderOut) -> torch.Tensor:
    """(R, V), of all valid frames."""
    frames = torch.arange(out.ctc_logits.size(1))
    return out.ctc_logits[frames < out.encoder_out_lens.unsqueeze(1)]


def _node_rows(
    taps: Sequence[ModelTap],
    outs: Sequence[EncoderOut],
    y: Sequence[Sequence[int]],
    blank_id: int,
) -> Tuple[SplitKL, torch.Tensor]:
    """The nodes of the teacher's lattice, and their occupancy."""
    student = taps[1].model
    lattice = taps[0].lattice(outs[0], y)
    nodes = nodes_of(lattice)
    decoder_out = decode_labels(student.decoder, lattice.labels, blank_id)
    at_nodes = StudentNodes(
        student.joiner,
        outs[1].encoder_out,
        decoder_out,
        nodes,
        outs[1].encoder_out_lens,
    )
    return split_kl(nodes.teacher, at_nodes.logits(), blank_id), nodes.occupancy
