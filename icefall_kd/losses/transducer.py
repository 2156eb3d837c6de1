"""Distillation of the transducer head on the nodes of the teacher's pruned lattice."""

from dataclasses import replace
from typing import List, Optional, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.lattice import best_path, passed_nodes
from icefall_kd.losses.kl import FLOOR, check_temperature, linear_kl, row_kl, wide
from icefall_kd.losses.student_nodes import StudentNodes, refuse_nan
from icefall_kd.types import (
    Distribution,
    LatticeTargets,
    Nodes,
    PrunedLattice,
    SparseDistribution,
    is_sparse,
)

FORMS = ("nodes", "collapsed", "mean_u", "sampled_u")
NODE_WEIGHTS = ("occupancy", "equal")


def nodes_of(lattice: PrunedLattice) -> Nodes:
    """The nodes of a batch's lattice that its teacher passes: those that a store keeps.

    See :func:`icefall_kd.lattice.passed_nodes`.
    """
    row, frame, s = passed_nodes(lattice.occupancy).nonzero(as_tuple=True)
    position = lattice.ranges[row, frame, s]
    return Nodes(
        row,
        frame,
        position,
        _labels(lattice.labels, lattice.boundary[:, 2], row, position),
        lattice.occupancy[row, frame, s],
        lattice.logits[row, frame, s],
    )


def path_nodes(lattice: PrunedLattice, blank_id: int) -> Nodes:
    """The nodes of each utterance's best alignment alone, each with an occupancy of 1.

    (Kurata and Saon, arXiv:2110.03334.)
    """
    occupancy = best_path(lattice, blank_id).to(lattice.occupancy.dtype)
    return nodes_of(replace(lattice, occupancy=occupancy))


def stored_nodes(lattices: List[Optional[LatticeTargets]]) -> Optional[Nodes]:
    """The nodes of stored lattices, row by row; None where no row has one."""
    parts = []
    for row, lattice in enumerate(lattices):
        if lattice is None:
            continue
        frame, s = passed_nodes(lattice.occupancy).nonzero(as_tuple=True)
        position = lattice.ranges[frame, s]
        symbols = lattice.labels.unsqueeze(0)
        lens = torch.tensor([symbols.size(1)], device=symbols.device)
        label = _labels(symbols, lens, torch.zeros_like(frame), position)
        which = torch.full_like(frame, row)
        occupancy = lattice.occupancy[frame, s]
        parts.append(Nodes(which, frame, position, label, occupancy, lattice.nodes))
    if not parts:
        return None
    columns = {k: [vars(p)[k] for p in parts] for k in vars(parts[0])}
    teacher = _joined(columns.pop("teacher"))
    return Nodes(**{k: torch.cat(v) for k, v in columns.items()}, teacher=teacher)


def _labels(symbols, lens, row, position) -> torch.Tensor:
    """(R,): the label behind each position; -1 behind the last."""
    if symbols.size(1) == 0:
        return torch.full_like(position, -1)
    label = symbols[row, position.clamp(max=symbols.size(1) - 1)]
    return label.masked_fill(position >= lens[row], -1)


def _joined(parts: List[Distribution]) -> Distribution:
    if not is_sparse(parts[0]):
        return torch.cat(parts)
    width = max(p.indices.size(1) for p in parts)

    def padded(x: torch.Tensor, value: float) -> torch.Tensor:
        return nn.functional.pad(x, (0, width - x.size(1)), value=value)

    return SparseDistribution(
        torch.cat([padded(p.indices, 0) for p in parts]),
        torch.cat([padded(p.log_probs, -torch.inf) for p in parts]),
        torch.cat([p.log_tail for p in parts]),
    )


def collapse(nodes: Nodes, blank_id: int, temperature: float = 1.0) -> Nodes:
    """Nodes whose teacher tells {next label, blank, rest} apart and no more.

    A label that a sparse teacher doesn't keep stays in the rest: a coarser division,
    whose KL divergence is exact and smaller.
    """
    label = nodes.label.clamp(min=0)
    pair = torch.stack((label, torch.full_like(label, blank_id)), -1)
    if is_sparse(nodes.teacher):
        hit = nodes.teacher.indices.unsqueeze(1) == pair.unsqueeze(2)  # (R, 2, K)
        log_probs = nodes.teacher.log_probs.unsqueeze(1)
        log_pair = log_probs.masked_fill(~hit, -torch.inf).amax(-1)
        # A padding entry has index 0 and -inf, so that it can't be the maximum.
        others = ~hit.any(1)
        others = nodes.teacher.log_probs.masked_fill(~others, -torch.inf)
        rest = torch.logaddexp(nodes.teacher.log_tail, others.logsumexp(-1))
    else:
        logits = nodes.teacher.to(wide(nodes.teacher.dtype))
        log_probs = (logits / temperature).log_softmax(-1)
        log_pair = log_probs.gather(1, pair)
        ids = torch.arange(log_probs.size(1), device=label.device)
        taken = (ids == pair[:, :1]) & (nodes.label >= 0).unsqueeze(1)
        taken |= ids == blank_id
        rest = log_probs.masked_fill(taken, -torch.inf).logsumexp(-1)
    gone = nodes.label < 0
    if is_sparse(nodes.teacher):  # what the clamped label -1 has taken out goes back
        back = log_pair[:, 0].masked_fill(~gone | (pair[:, 0] == blank_id), -torch.inf)
        rest = torch.logaddexp(rest, back)
    first = log_pair[:, 0].masked_fill(gone, -torch.inf)
    log_pair = torch.stack((first, log_pair[:, 1]), -1)
    return replace(nodes, teacher=SparseDistribution(pair, log_pair, rest))


def shift(nodes: Nodes, frames: int, lengths: torch.Tensor) -> Nodes:
    """Teach a student that lags behind: what the teacher says at t, at t + frames.

    (Kurata and Saon, arXiv:2110.03334.) Nodes beyond the student's end go.
    """
    if frames < 0:
        raise KDError(
            f"the shift is {frames} frames, and a student can't hear the future: give "
            "0 or more"
        )
    moved = nodes.frame + frames
    inside = moved < lengths.to(moved.device)[nodes.row]
    return replace(nodes, frame=moved).select(inside)


def nodes_kd_loss(
    student: StudentNodes,
    *,
    temperature: float = 1.0,
    form: str = "nodes",
    node_weights: str = "occupancy",
    blank_id: int = 0,
    generator: Optional[torch.Generator] = None,
) -> torch.Tensor:
    """KL divergence of the transducer's outputs, over the nodes of a lattice.

    With w_r the teacher's occupancy of a node r = (n, t, u), or 1, and z~, z the logits
    of teacher and student there, by ``form``:

    "nodes"
        sum over nodes of w_r T^2 KL(softmax(z~_r / T) || softmax(z_r / T)).
    "collapsed"
        the same, of {next label, blank, rest} (Panchapagesan et al.,
        arXiv:2011.06110).
    "sampled_u"
        the same at one node of each frame (n, t), drawn with probability w_r / w_t,
        w_t = sum_u w_r, and weighted w_t: "nodes" in expectation, at a fraction of its
        cost.
    "mean_u"
        sum over frames (n, t) of T^2 KL(softmax(m~_t / T) || softmax(m_t / T)), m~_t
        and m_t the mean of the logits over the frame's nodes, all weighing the same.
        The mean is over the label positions that the teacher's path takes with a
        probability above 1/510; others are no nodes. Each frame counts once, whatever
        ``node_weights`` says.

    Nodes of the best path alone (arXiv:2110.03334) come from :func:`path_nodes`, or
    from a store kept as ``path:...``.

    Args:
      student: The student at R nodes, with the teacher's distributions.
      temperature: T. A sparse teacher is at this temperature already.
      form: One of ``FORMS``.
      node_weights: "occupancy": nodes count by the teacher's; "equal": by 1.
      blank_id: For "collapsed".
      generator: For "sampled_u"; None: torch's own.

    Returns:
      A scalar in nats, summed as icefall sums its losses; 0 with a zero gradient for no
      nodes.

    Raises:
      KDError: a form or temperature of no use, a sparse teacher for "mean_u", NaN in
        the student.
    """
    check_temperature(temperature)
    if form not in FORMS:
        raise KDError(f"`form` is {form!r}, and must be one of {', '.join(FORMS)}")
    if node_weights not in NODE_WEIGHTS:
        raise KDError(
            f"`node_weights` is {node_weights!r}, and must be one of "
            f"{', '.join(NODE_WEIGHTS)}"
        )
    if form == "mean_u":
        _need_dense(student.nodes.teacher, form)
        _, _, which = _frames(student.nodes)
        layer = student.joiner.output_linear  # is linear: the states' mean will do
        teacher = _means(student.nodes.teacher, which)
        return linear_kl(
            _means(student.states, which), layer, teacher, temperature=temperature
        )
    weights = student.nodes.occupancy if node_weights == "occupancy" else None
    if form == "sampled_u":
        index, weights = _draw(student.nodes, weights, generator)
        student = student.select(index)
    nodes = student.nodes
    if form == "collapsed":
        nodes = collapse(nodes, blank_id, temperature)
    return student.kl(nodes.teacher, temperature, weights)


def transducer_kd_loss(
    joiner: nn.Module,
    encoder_out: torch.Tensor,
    decoder_out: torch.Tensor,
    nodes: Nodes,
    lengths: torch.Tensor,
    *,
    temperature: float = 1.0,
    form: str = "nodes",
    node_weights: str = "occupancy",
    blank_id: int = 0,
    generator: Optional[torch.Generator] = None,
) -> torch.Tensor:
    """:func:`nodes_kd_loss` of a student that is asked for nothing else.

    The student's joiner is asked at these nodes alone, and its logits never exist
    whole. Of the first five arguments see
    :class:`icefall_kd.losses.student_nodes.StudentNodes`, of the others
    :func:`nodes_kd_loss`.
    """
    student = StudentNodes(joiner, encoder_out, decoder_out, nodes, lengths)
    return nodes_kd_loss(
        student,
        temperature=temperature,
        form=form,
        node_weights=node_weights,
        blank_id=blank_id,
        generator=generator,
    )


def total_kd_loss(
    student: StudentNodes,
    ctc_logits: torch.Tensor,
    teacher_ctc: Distribution,
    *,
    temperature: float = 1.0,
    ctc_share: float = 0.5,
) -> torch.Tensor:
    """KL divergence of both heads' outputs, mixed frame by frame.

    sum over frames (n, t) of T^2 KL(softmax(z~_t / T) || softmax(z_t / T)),
    z = a z_ctc + (1 - a) m, m the mean over the frame's nodes as in "mean_u" of
    :func:`nodes_kd_loss`; for teacher and student alike. Frames without a node don't
    count.

    Args:
      student: The student at R nodes, with a dense teacher.
      ctc_logits: (N, T, V), the student's, before LogSoftmax.
      teacher_ctc: (N, T', V), the teacher's, before or after LogSoftmax; its frames
        are those of the nodes.
      temperature: T.
      ctc_share: a, 0 to 1.

    Raises:
      KDError: a sparse teacher, another vocabulary, frames beyond either CTC head's.
    """
    check_temperature(temperature)
    if not 0 <= ctc_share <= 1:
        raise KDError(f"the CTC share is {ctc_share!r}, and must be from 0 to 1")
    nodes, layer = student.nodes, student.joiner.output_linear
    _need_dense(nodes.teacher, "total")
    if is_sparse(teacher_ctc):
        raise KDError(
            f"the form total mixes logits of all {layer.out_features} symbols, and the "
            f"CTC targets keep {teacher_ctc.indices.size(-1)} a frame: dump with "
            "--keep dense, or ask the teacher online"
        )
    row, frame, which = _frames(nodes)
    for name, x in (("student's", ctc_logits), ("teacher's", teacher_ctc)):
        _check_ctc(x, name, row, frame, layer.out_features)
    teacher_ctc = teacher_ctc.detach().to(row.device)[row, frame]
    ctc = ctc_logits[row, frame]
    refuse_nan(ctc, "CTC logits at the lattice's frames")
    with torch.autocast(ctc.device.type, enabled=False):
        means = _means(student.states, which)
        weight, bias = (
            p if p is None else p.to(means.dtype) for p in (layer.weight, layer.bias)
        )
        means = nn.functional.linear(means, weight, bias)
        taught = _mix(teacher_ctc, _means(nodes.teacher, which), ctc_share)
        return row_kl(_mix(ctc, means, ctc_share), taught, temperature=temperature)


def _mix(ctc: torch.Tensor, means: torch.Tensor, share: float) -> torch.Tensor:
    ctc = ctc.to(means.dtype).clamp(min=FLOOR)  # 0 * -inf is NaN
    return share * ctc + (1 - share) * means.clamp(min=FLOOR)


def _check_ctc(x: torch.Tensor, name: str, row, frame, v: int) -> None:
    if x.size(-1) != v:
        raise KDError(
            f"the {name} CTC head has {x.size(-1)} symbols and the student's joiner "
            f"{v}: both need the same BPE model"
        )
    if len(row) and not (int(row.max()) < x.size(0) and int(frame.max()) < x.size(1)):
        raise KDError(
            f"the teacher's lattice has row {int(row.max())} and frame "
            f"{int(frame.max())}, and the {name} CTC output is of shape "
            f"{tuple(x.shape)}: the targets are of other cuts, or the frame rates "
            "differ"
        )


def _need_dense(teacher: Distribution, form: str) -> None:
    if is_sparse(teacher):
        raise KDError(
            f"the form {form} needs the teacher's logits of all symbols, and its "
            f"lattice keeps {teacher.indices.size(-1)} a node: dump with "
            "--keep-lattice dense, or ask the teacher online"
        )


def _frames(nodes: Nodes) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row and frame of each of G frames that have nodes, and each node's frame in them.

    Returns:
      Of shapes (G,), (G,) and (R,).
    """
    width = int(nodes.frame.max()) + 1 if len(nodes) else 1
    keys, which = (nodes.row * width + nodes.frame).unique(return_inverse=True)
    return torch.div(keys, width, rounding_mode="floor"), keys % width, which


def _means(x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """(G, D): the mean of the rows of ``x``, (R, D), that each frame has."""
    x = x.to(wide(x.dtype))
    counts = which.bincount()
    sums = x.new_zeros(len(counts), x.size(1)).index_add(0, which, x)
    return sums / counts.unsqueeze(1)


def _draw(
    nodes: Nodes, weights: Optional[torch.Tensor], generator: Optional[torch.Generator]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """A node of each frame, drawn by weight, and the frame's weight: (G,) each."""
    _, _, which = _frames(nodes)
    order = which.argsort(stable=True)
    if weights is None:
        weights = torch.ones_like(nodes.occupancy)
    mass = weights[order].double().cumsum(0)
    last = which.bincount().cumsum(0) - 1
    end = mass[last]
    begin = nn.functional.pad(end, (1, 0))[: len(end)]
    device = mass.device if generator is None else generator.device
    x = torch.rand(len(end), dtype=mass.dtype, device=device, generator=generator)
    x = begin + x.to(mass.device) * (end - begin)
    # Rounding may bring x up to the frame's end, where the next frame begins.
    drawn = torch.minimum(torch.searchsorted(mass, x, right=True), last)
    return order[drawn], (end - begin).to(weights.dtype)
