"""Distillation of the transducer head on the nodes of the teacher's pruned lattice."""

import math
from functools import partial
from typing import NamedTuple, Optional, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError, require
from icefall_kd.losses.checks import check_temperature, refuse_nan
from icefall_kd.losses.factorised import factorised_kl
from icefall_kd.losses.kl import FLOOR, compute_dtype, linear_kl, plain_kl, row_kl
from icefall_kd.losses.nodes import collapse
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.rounding import factors
from icefall_kd.types import Distribution, Nodes, is_sparse

FORMS = ("nodes", "collapsed", "mean_u", "sampled_u")
NODE_WEIGHTINGS = ("occupancy", "equal")


def nodes_kd_loss(
    student: StudentNodes,
    *,
    temperature: float = 1.0,
    form: str = "nodes",
    node_weighting: str = "occupancy",
    blank_weight: float = 1.0,
    blank_id: int = 0,
    generator: Optional[torch.Generator] = None,
) -> torch.Tensor:
    """Return the KL divergence of the transducers' outputs over the nodes of a lattice.

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
        ``node_weighting`` is.

    With ``blank_weight`` B the divergence of a node of "nodes" and "sampled_u" is B
    KL_blank + (1 - b) KL_symbols: whether a node emits counts B, and which symbol it
    emits counts as in the plain divergence, which is that of B = 1
    (:func:`icefall_kd.losses.factorised.factorised_kl`).

    Nodes of the best path alone (arXiv:2110.03334) come from
    :func:`icefall_kd.losses.nodes.path_nodes`, or from a store of a form ``path:...``.

    Args:
      student: The student at R nodes, with the teacher's distributions.
      temperature: T, above 0. A sparse teacher is at this temperature already.
      form: One of FORMS.
      node_weighting: One of NODE_WEIGHTINGS, for w: "occupancy", or "equal", 1.
      blank_weight: B, 0 or more; 1 for the other forms.
      blank_id: The token id of blank, for "collapsed" and B.
      generator: Draws the nodes of "sampled_u"; None: torch's own.

    Returns:
      A scalar in nats, summed as icefall sums its losses; 0 with a zero gradient for no
      nodes.

    Raises:
      KDError: A bad form, weighting, weight or temperature, a sparse teacher for
        "mean_u", NaN in the student.
    """
    check_temperature(temperature)
    require(form in FORMS, f"`form` is {form!r}, and must be one of {', '.join(FORMS)}")
    require(
        node_weighting in NODE_WEIGHTINGS,
        f"`node_weighting` is {node_weighting!r}, and must be one of "
        f"{', '.join(NODE_WEIGHTINGS)}",
    )
    check_blank_weight(blank_weight, form)
    if form == "mean_u":
        _require_dense(student.nodes.teacher, form)
        groups = _group_by_frame(student.nodes)
        return linear_kl(  # the layer is linear: the mean of its inputs will do
            _means(student.states, groups),
            student.joiner.output_linear,
            _means(student.nodes.teacher, groups),
            temperature=temperature,
        )
    weights = student.nodes.occupancy if node_weighting == "occupancy" else None
    if form == "sampled_u":
        index, weights = _sample(student.nodes, weights, generator)
        student = student.select(index)
    nodes = student.nodes
    if form == "collapsed":
        nodes = collapse(nodes, blank_id, temperature)
    chunk_kl = plain_kl
    if blank_weight != 1:
        chunk_kl = partial(
            factorised_kl, blank_weight=float(blank_weight), blank_id=blank_id
        )
    return student.kl(
        nodes.teacher, temperature=temperature, weights=weights, chunk_kl=chunk_kl
    )


def transducer_kd_loss(
    joiner: nn.Module,
    encoder_out: torch.Tensor,
    decoder_out: torch.Tensor,
    nodes: Nodes,
    lengths: torch.Tensor,
    *,
    temperature: float = 1.0,
    form: str = "nodes",
    node_weighting: str = "occupancy",
    blank_weight: float = 1.0,
    blank_id: int = 0,
    generator: Optional[torch.Generator] = None,
) -> torch.Tensor:
    """Return :func:`nodes_kd_loss` of a student that no other loss needs.

    Its joiner is evaluated at these nodes alone, in chunks.

    Args:
      joiner: The student's, with ``encoder_proj``, ``decoder_proj``, ``output_linear``.
      encoder_out: (N, T, C), the student's, with its graph.
      decoder_out: (N, U + 1, D), of the labels after a leading blank.
      nodes: R nodes with the teacher's distributions, of a function of
        :mod:`icefall_kd.losses.nodes`.
      lengths: (N,), valid frames of ``encoder_out``.
      temperature: T, above 0. A sparse teacher is at this temperature already.
      form: One of FORMS.
      node_weighting: One of NODE_WEIGHTINGS.
      blank_weight: B.
      blank_id: The token id of blank.
      generator: Draws the nodes of "sampled_u"; None: torch's own.

    Returns:
      A scalar in nats; 0 with a zero gradient for no nodes.

    Raises:
      KDError: As :func:`nodes_kd_loss`, and for nodes beyond the student's frames or
        labels, or another vocabulary.
    """
    student = StudentNodes(joiner, encoder_out, decoder_out, nodes, lengths)
    return nodes_kd_loss(
        student,
        temperature=temperature,
        form=form,
        node_weighting=node_weighting,
        blank_weight=blank_weight,
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
    """Return the KL divergence of both heads' outputs, mixed frame by frame.

    sum over frames (n, t) of T^2 KL(softmax(z~_t / T) || softmax(z_t / T)),
    z = a z_ctc + (1 - a) m, m the mean over the frame's nodes as in "mean_u" of
    :func:`nodes_kd_loss`; for teacher and student alike. Frames without a node don't
    count.

    Args:
      student: The student at R nodes, with a dense teacher.
      ctc_logits: (N, T, V), the student's, before LogSoftmax.
      teacher_ctc: (N, T', V), the teacher's, before or after LogSoftmax; its frames
        are those of the nodes.
      temperature: T, above 0.
      ctc_share: a, 0 to 1.

    Returns:
      A scalar in nats; 0 with a zero gradient for no nodes.

    Raises:
      KDError: A sparse teacher, another vocabulary, frames beyond either CTC head's.
    """
    check_temperature(temperature)
    require(
        0 <= ctc_share <= 1, f"`ctc_share` is {ctc_share!r}, and must be from 0 to 1"
    )
    nodes, layer = student.nodes, student.joiner.output_linear
    _require_dense(nodes.teacher, "total")
    if is_sparse(teacher_ctc):
        raise KDError(
            f"the form total mixes logits of all {layer.out_features} tokens, and the "
            f"CTC targets have {teacher_ctc.indices.size(-1)} a frame: store them as "
            "dense, or run the teacher online"
        )
    groups = _group_by_frame(nodes)
    for name, x in (("student's", ctc_logits), ("teacher's", teacher_ctc)):
        _check_ctc(x, name, groups, layer.out_features)
    teacher_ctc = teacher_ctc.detach().to(groups.row.device)[groups.row, groups.frame]
    student_ctc = ctc_logits[groups.row, groups.frame]  # (G, V)
    refuse_nan(student_ctc, "CTC logits at the lattice's frames")
    with torch.autocast(student_ctc.device.type, enabled=False):
        states, weight = factors(layer, _means(student.states, groups))  # (G, J)
        bias = None if layer.bias is None else layer.bias.to(states.dtype)
        means = nn.functional.linear(states, weight.to(states.dtype), bias)
        return row_kl(
            _mix(student_ctc, means, ctc_share),
            _mix(teacher_ctc, _means(nodes.teacher, groups), ctc_share),
            temperature=temperature,
        )


def _mix(ctc: torch.Tensor, means: torch.Tensor, share: float) -> torch.Tensor:
    ctc = ctc.to(means.dtype).clamp(min=FLOOR)  # 0 * -inf is NaN
    return share * ctc + (1 - share) * means.clamp(min=FLOOR)


# Frames that have nodes


class _Groups(NamedTuple):
    """R nodes, grouped by utterance and frame."""

    row: torch.Tensor  # (G,), int64, the utterance of each group
    frame: torch.Tensor  # (G,), int64, its frame
    index: torch.Tensor  # (R,), int64, the group of each node


def _group_by_frame(nodes: Nodes) -> _Groups:
    n_frames = int(nodes.frame.max()) + 1 if len(nodes) else 1
    keys = nodes.row * n_frames + nodes.frame
    keys, index = keys.unique(return_inverse=True)
    row = torch.div(keys, n_frames, rounding_mode="floor")
    return _Groups(row, keys % n_frames, index)


def _means(x: torch.Tensor, groups: _Groups) -> torch.Tensor:
    """(G, D): the mean of the rows of ``x``, (R, D), over each group."""
    x = x.to(compute_dtype(x.dtype))
    counts = groups.index.bincount()
    sums = x.new_zeros(len(counts), x.size(1)).index_add(0, groups.index, x)
    return sums / counts.unsqueeze(1)


def _sample(
    nodes: Nodes, weights: Optional[torch.Tensor], generator: Optional[torch.Generator]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """A node of each frame, drawn by weight, and the frame's weight: (G,) each."""
    groups = _group_by_frame(nodes)
    if weights is None:
        weights = torch.ones_like(nodes.occupancy)
    # The nodes of one frame after those of another; their weights add up to `mass`,
    # in which a frame has the interval from `begin` to `end`.
    order = groups.index.argsort(stable=True)  # (R,)
    mass = weights[order].double().cumsum(0)
    last_node = groups.index.bincount().cumsum(0) - 1  # (G,)
    end = mass[last_node]
    begin = nn.functional.pad(end, (1, 0))[: len(end)]
    device = mass.device if generator is None else generator.device
    x = torch.rand(len(end), dtype=mass.dtype, device=device, generator=generator)
    x = begin + x.to(mass.device) * (end - begin)
    # Rounding may bring x up to the frame's end, where the next frame begins.
    drawn = torch.minimum(torch.searchsorted(mass, x, right=True), last_node)
    return order[drawn], (end - begin).to(weights.dtype)


# Refusals


def check_blank_weight(blank_weight: float, form: str) -> None:
    """Refuse a weight of blank that is none, or that ``form`` has no use for.

    Args:
      blank_weight: B of :func:`nodes_kd_loss`.
      form: Its form.

    Raises:
      KDError: ``blank_weight`` is no finite number from 0 on, or other than 1 with a
        form other than "nodes" and "sampled_u".
    """
    require(
        isinstance(blank_weight, (int, float)) and 0 <= blank_weight < math.inf,
        f"`blank_weight` is {blank_weight!r}, and must be a finite number from 0 on: "
        "0 leaves out whether a node emits",
    )
    require(
        blank_weight == 1 or form in ("nodes", "sampled_u"),
        f"`blank_weight` is {blank_weight:g} and `form` {form}, which has no part of "
        "its own for blank: give `form` nodes or sampled_u, or `blank_weight` 1",
    )


def _check_ctc(x: torch.Tensor, owner: str, groups: _Groups, v: int) -> None:
    if x.size(-1) != v:
        raise KDError(
            f"the {owner} CTC head has {x.size(-1)} tokens and the student's joiner "
            f"{v}: both need the same tokenizer"
        )
    if not len(groups.row):
        return
    row, frame = int(groups.row.max()), int(groups.frame.max())
    if row >= x.size(0) or frame >= x.size(1):
        raise KDError(
            f"the teacher's lattice has row {row} and frame {frame}, and the {owner} "
            f"CTC output is of shape {tuple(x.shape)}: the targets are of other cuts, "
            "or the frame rates differ"
        )


def _require_dense(teacher: Distribution, form: str) -> None:
    if is_sparse(teacher):
        raise KDError(
            f"the form {form} needs the teacher's logits of all tokens, and its "
            f"lattice has {teacher.indices.size(-1)} a node: store it as dense, or run "
            "the teacher online"
        )
