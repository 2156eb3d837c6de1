"""Students, teachers and nodes of transducer KD, and the naive twin of each form."""

import math
from dataclasses import dataclass, replace

import torch

from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.losses.transducer import FORMS, nodes_kd_loss, total_kd_loss
from icefall_kd.types import Nodes

# Forms in which whether a node emits has a weight of its own.
BLANK_WEIGHTS = {
    "nodes without blank": ("nodes", 0.0),
    "nodes, blank 3 times": ("nodes", 3.0),
    "sampled_u without blank": ("sampled_u", 0.0),
    "sampled_u, blank 0.3 times": ("sampled_u", 0.3),
}
ALL = (*FORMS, "total", *BLANK_WEIGHTS)
ROWWISE = ("nodes", "collapsed", "sampled_u", *BLANK_WEIGHTS)  # take a sparse teacher
SHARE = 0.3
INF, NAN = math.inf, math.nan


class Joiner(torch.nn.Module):
    def __init__(self, v):
        super().__init__()
        self.encoder_proj = torch.nn.Linear(3, 4)
        self.decoder_proj = torch.nn.Linear(2, 4)
        self.output_linear = torch.nn.Linear(4, v)


@dataclass
class Case:
    joiner: Joiner
    encoder_out: torch.Tensor
    lens: torch.Tensor
    decoder_out: torch.Tensor
    nodes: Nodes
    ctc: torch.Tensor
    teacher_ctc: torch.Tensor

    @property
    def inputs(self):
        return [self.encoder_out, self.decoder_out, *self.joiner.parameters(), self.ctc]

    def student(self):
        return StudentNodes(
            self.joiner, self.encoder_out, self.decoder_out, self.nodes, self.lens
        )

    def loss(self, form, temperature=1.0, occupancy=True, seed=5, student=None):
        student = student or self.student()
        if form == "total":
            ctc = self.ctc, self.teacher_ctc
            return total_kd_loss(
                student, *ctc, temperature=temperature, ctc_share=SHARE
            )
        g = torch.Generator().manual_seed(seed)
        form, blank_weight = BLANK_WEIGHTS.get(form, (form, 1.0))
        return nodes_kd_loss(
            student,
            temperature=temperature,
            form=form,
            blank_weight=blank_weight,
            generator=g,
            node_weighting="occupancy" if occupancy else "equal",
        )


def case(seed=0, n=3, t=5, u=3, v=6, dtype=torch.float64, kept=0.7):
    """Utterances of up to t frames and u labels; some of all (t, u) are nodes."""
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, t + 1, (n,), generator=g)
    labels = torch.randint(0, u + 1, (n,), generator=g)
    symbols = torch.randint(1, v, (n, u + 1), generator=g)
    there = torch.rand(n, t, u + 1, generator=g) < kept
    there &= torch.arange(t)[:, None] < lens[:, None, None]
    there &= torch.arange(u + 1) <= labels[:, None, None]
    row, frame, position = there.nonzero(as_tuple=True)
    nodes = Nodes(
        row,
        frame,
        position,
        symbols[row, position].masked_fill(position == labels[row], -1),
        torch.rand(len(row), generator=g, dtype=torch.float64).to(dtype),
        2 * torch.randn(len(row), v, generator=g, dtype=torch.float64).to(dtype),
    )
    torch.manual_seed(seed)
    joiner = Joiner(v).to(dtype)
    shapes = ((n, t, 3), (n, u + 1, 2), (n, t, v), (n, t, v))
    x, y, ctc, teacher_ctc = (
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes
    )
    leaves = (x.requires_grad_(), lens, y.requires_grad_(), nodes)
    return Case(joiner, *leaves, ctc.requires_grad_(), teacher_ctc)


def in_dtype(given, dtype):
    """The same student in another type; the teacher stays."""
    torch.manual_seed(0)
    joiner = Joiner(given.joiner.output_linear.out_features)
    joiner.load_state_dict(given.joiner.state_dict())
    leaves = {
        f: getattr(given, f).detach().to(dtype).requires_grad_()
        for f in ("encoder_out", "decoder_out", "ctc")
    }
    return replace(given, joiner=joiner.to(dtype), **leaves)


def value_and_grads(value, inputs):
    # An input that a form doesn't read has no gradient.
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    none = [torch.zeros_like(x) for x in inputs]
    return value.detach(), [z if g is None else g for g, z in zip(grads, none)]


def kl(teacher, student, temperature, classes=None, blank_weight=1.0):
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    if blank_weight != 1:
        parts = [torch.stack((x[0], x[1:].sum())) for x in (p, q)]
        of_blank = (parts[0] * (parts[0] / parts[1]).log()).sum()
        r, s = (x[1:] / x[1:].sum() for x in (q, p))
        of_symbols = p[1:].sum() * (s * (s / r).log()).sum()
        return temperature**2 * (blank_weight * of_blank + of_symbols)
    if classes is not None:
        rest = [i for i in range(len(p)) if i not in classes]
        p, q = (
            torch.stack([*x[classes], *[x[rest].sum()] * bool(rest)]) for x in (p, q)
        )
    return temperature**2 * (p * (p / q).log()).sum()


def naive(c, form, temperature=1.0, occupancy=True, seed=5):
    """Node by node, frame by frame."""
    form, blank_weight = BLANK_WEIGHTS.get(form, (form, 1.0))
    h = [
        c.joiner.encoder_proj(c.encoder_out[n, t])
        + c.joiner.decoder_proj(c.decoder_out[n, u])
        for n, t, u in zip(c.nodes.row, c.nodes.frame, c.nodes.position)
    ]
    logits = [c.joiner.output_linear(x.tanh()) for x in h]
    taught, total = c.nodes.teacher, 0.0
    weights = c.nodes.occupancy if occupancy else torch.ones(len(h))
    frames = {}
    for r, where in enumerate(zip(c.nodes.row.tolist(), c.nodes.frame.tolist())):
        frames.setdefault(where, []).append(r)
    chance = torch.rand(
        len(frames),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    for i, ((n, t), mine) in enumerate(sorted(frames.items())):
        if form in ("mean_u", "total"):
            p = taught[mine].mean(0)
            q = torch.stack([logits[r] for r in mine]).mean(0)
            if form == "total":
                p = SHARE * c.teacher_ctc[n, t] + (1 - SHARE) * p
                q = SHARE * c.ctc[n, t] + (1 - SHARE) * q
            total = total + kl(p, q, temperature)
        elif form == "sampled_u":
            mass = weights[mine].double().cumsum(0)
            k = int((mass <= chance[i] * mass[-1]).sum())
            total = total + mass[-1] * kl(
                taught[mine[k]],
                logits[mine[k]],
                temperature,
                blank_weight=blank_weight,
            )
        else:
            for r in mine:
                label = int(c.nodes.label[r])
                classes = None if form == "nodes" else [0] + [label] * (label >= 0)
                total = total + weights[r] * kl(
                    taught[r], logits[r], temperature, classes, blank_weight
                )
    return total
