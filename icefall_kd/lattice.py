"""Pruned lattices of a transducer: where they lie, how likely their nodes are."""

from typing import List, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from icefall_kd.errors import require
from icefall_kd.rnnt import get_engine
from icefall_kd.types import PrunedLattice

# Nodes that the path passes with a lower probability are left out, by stored targets
# (whose occupancy is a byte, in steps of 1/255) and by an online teacher alike.
LEAST_OCCUPANCY = 1 / 510


def passed_nodes(occupancy: torch.Tensor) -> torch.Tensor:
    """Return which nodes the path passes with a probability above LEAST_OCCUPANCY.

    Args:
      occupancy: Of any shape; an occupancy of a store, which is a byte's, is either 0
        or above that bound.

    Returns:
      bool, of the same shape.
    """
    return occupancy > LEAST_OCCUPANCY


def check_s_range(s_range: int) -> None:
    """Refuse a number of label positions at a frame that makes no lattice.

    Args:
      s_range: 0 for all positions.

    Raises:
      KDError: 1, or a number below 0.
    """
    require(
        s_range == 0 or s_range >= 2,
        f"`s_range` is {s_range}, and no path gets through fewer than 2 label "
        "positions: give 2 or more, or 0 for all of them",
    )


# Building a lattice


def next_labels(
    labels: torch.Tensor,
    position: torch.Tensor,
    row: Union[int, torch.Tensor] = 0,
    lens: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return the label that follows each label position u; -1 after the last label.

    Args:
      labels: (N, U), int64; or (U,), those of one utterance.
      position: Label positions, 0 or more, of any shape.
      row: The utterance of each position, of a shape that fits ``position``.
      lens: (N,), how many labels each utterance has; None: U.

    Returns:
      int64, of the shape of ``position``.
    """
    padded = nn.functional.pad(torch.atleast_2d(labels), (0, 1), value=-1)
    label = padded[row, position.clamp(max=padded.size(1) - 1)]
    return label if lens is None else label.masked_fill(position >= lens[row], -1)


def pad_labels(
    labels: Sequence[Sequence[int]], frames: torch.Tensor, blank_id: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Collate the labels of a batch.

    Args:
      labels: The token ids of each utterance.
      frames: (N,), T_n, the valid frames of each.
      blank_id: The token id of blank, which pads.

    Returns:
      The labels, (N, U), int64, U at least 1; and k2's boundary, (N, 4), int64, with
      0, 0, U_n, T_n in each row. Both on the device of ``frames``.
    """
    longest = max((len(y) for y in labels), default=0)
    padded = torch.full((len(labels), max(1, longest)), blank_id, dtype=torch.int64)
    boundary = torch.zeros(len(labels), 4, dtype=torch.int64)
    for i, y in enumerate(labels):
        padded[i, : len(y)] = torch.as_tensor(y, dtype=torch.int64)
        boundary[i, 2] = len(y)
    boundary[:, 3] = frames.cpu()
    return padded.to(frames.device), boundary.to(frames.device)


def decode_labels(
    decoder: nn.Module, labels: torch.Tensor, blank_id: int
) -> torch.Tensor:
    """Return the decoder's output after a blank and after each label, (N, U + 1, D).

    Args:
      decoder: The transducer's decoder (prediction network).
      labels: (N, U), int64.
      blank_id: The token id of blank.
    """
    return decoder(nn.functional.pad(labels, (1, 0), value=blank_id))


def prune(
    simple_am: torch.Tensor,
    simple_lm: torch.Tensor,
    labels: torch.Tensor,
    boundary: torch.Tensor,
    blank_id: int,
    s_range: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Find a lattice's ranges by the simple joiner, as the recipe's pruned loss does.

    The simple joiner adds the two simple projections, without smoothing (Kuang et al.,
    arXiv:2206.13236).

    Args:
      simple_am: (N, T, V), the simple projection of the encoder's output.
      simple_lm: (N, U + 1, V), that of the decoder's output.
      labels: (N, U), int64.
      boundary: (N, 4), int64, of :func:`pad_labels`.
      blank_id: The token id of blank.
      s_range: Label positions at a frame, 2 or more.

    Returns:
      The simple loss of each utterance, (N,), with its graph; and the ranges, (N, T,
      S), int64.
    """
    engine = get_engine()
    with torch.autocast(simple_am.device.type, enabled=False):
        losses, (px_grad, py_grad) = engine.rnnt_loss_smoothed(
            lm=simple_lm,
            am=simple_am,
            symbols=labels,
            termination_symbol=blank_id,
            lm_only_scale=0.0,
            am_only_scale=0.0,
            boundary=boundary,
            reduction="none",
            return_grad=True,
        )
    ranges = engine.get_rnnt_prune_ranges(
        px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=s_range
    )
    return losses, ranges


def pruned_logits(
    joiner: nn.Module, am: torch.Tensor, decoder_out: torch.Tensor, ranges: torch.Tensor
) -> torch.Tensor:
    """Return the joiner's logits at the nodes of a pruned lattice, (N, T, S, V).

    Args:
      joiner: The transducer's joiner.
      am: (N, T, J), the joiner's projection of the encoder's output.
      decoder_out: (N, U + 1, D), of :func:`decode_labels`.
      ranges: (N, T, S), int64, the label positions of each frame.
    """
    am, lm = get_engine().do_rnnt_pruning(
        am=am, lm=joiner.decoder_proj(decoder_out), ranges=ranges
    )
    return joiner(am, lm, project_input=False)


# Paths through a lattice


def _arcs(
    logits: torch.Tensor, ranges: torch.Tensor, labels: torch.Tensor, blank_id: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """log P(next label) and log P(blank) at each node, (N, T, S)."""
    log_probs = logits.float().log_softmax(-1)
    row = torch.arange(len(labels), device=labels.device)[:, None, None]
    label = next_labels(labels, ranges, row)
    label = label.masked_fill(label < 0, blank_id)  # of an arc that no path takes
    px = log_probs.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    return px, log_probs[..., blank_id]


def node_occupancy(
    logits: torch.Tensor,
    ranges: torch.Tensor,
    labels: torch.Tensor,
    boundary: torch.Tensor,
    blank_id: int,
) -> torch.Tensor:
    """Return the probability that the path of a pruned lattice passes each node.

    It comes from the engine's forward-backward pass over log P(label) and log P(blank),
    with -inf outside the ranges.

    Args:
      logits: (N, T, S, V), the joiner's, before softmax.
      ranges: (N, T, S), int64, the label position of each node.
      labels: (N, U), int64.
      boundary: (N, 4), int64, of :func:`pad_labels`.
      blank_id: The token id of blank.

    Returns:
      (N, T, S), float; its sum over an utterance is T_n + U_n, or 0 if no path gets
      through.
    """
    n, t, s, _ = logits.shape
    u = labels.size(1)
    px_pruned, py_pruned = _arcs(logits, ranges, labels, blank_id)
    # Without this a path could still emit labels after its last blank.
    frames = torch.arange(t, device=logits.device).unsqueeze(0)
    padding = (frames >= boundary[:, 3:]).unsqueeze(-1)  # (N, T, 1)
    px_pruned = px_pruned.masked_fill(padding, -torch.inf)

    def spread(pruned: torch.Tensor) -> torch.Tensor:
        """From the ranges to all label positions, (N, U + 1, T)."""
        # The ranges of a short utterance reach beyond U; those positions are cut off.
        full = pruned.new_full((n, t, u + s + 1), -torch.inf)
        return full.scatter(2, ranges, pruned)[..., : u + 1].transpose(1, 2)

    # The engine's px, (N, U, T + 1), has one more frame than py, (N, U + 1, T).
    px = nn.functional.pad(spread(px_pruned)[:, :u], (0, 1), value=-torch.inf)
    sums, (px_grad, py_grad) = get_engine().mutual_information_recursion(
        px, spread(py_pruned).contiguous(), boundary, return_grad=True
    )
    # A path passes a node where it leaves it, by a blank or by a label.
    passed = py_grad.clone()
    passed[:, :u] += px_grad[..., :t]
    passed = nn.functional.pad(passed.transpose(1, 2), (0, s + 1))
    # Where no path is complete the engine's gradients mean nothing.
    no_path = padding | ~torch.isfinite(sums)[:, None, None]
    return passed.gather(2, ranges).masked_fill(no_path, 0.0)


def path_sums(
    arcs: torch.Tensor,
    row: torch.Tensor,
    frame: torch.Tensor,
    position: torch.Tensor,
    boundary: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Sum the probability of all paths over some nodes of a batch's lattices.

    Args:
      arcs: (R, 2), log P(next label) and log P(blank) at each node; -inf for an arc
        that no path may take.
      row: (R,), int64, the utterance of each node.
      frame: (R,), int64, its frame t.
      position: (R,), int64, its label position u.
      boundary: (N, 4), int64, of :func:`pad_labels`.

    Returns:
      The log of the sums, (N,), -inf where no path is complete; and its gradient, the
      probability that the path takes each arc, (R, 2), 0 where no path is complete.
    """
    u, t = boundary[:, 2:].amax(0).tolist()
    px = arcs.new_full((len(boundary), u + 1, t + 1), -torch.inf)
    py = arcs.new_full((len(boundary), u + 1, t), -torch.inf)
    px[row, position, frame], py[row, position, frame] = arcs[:, 0], arcs[:, 1]
    sums, (px_grad, py_grad) = get_engine().mutual_information_recursion(
        px[:, :u].contiguous(), py, boundary, return_grad=True
    )
    # px has no label position U; its gradient gets one, of 0, to be indexed as py's.
    px_grad = nn.functional.pad(px_grad, (0, 0, 0, 1))
    taken = torch.stack(
        (px_grad[row, position, frame], py_grad[row, position, frame]), -1
    )
    no_path = ~torch.isfinite(sums)[row]
    return sums, taken.masked_fill(no_path.unsqueeze(1), 0.0)


def best_path(lattice: PrunedLattice, blank_id: int) -> torch.Tensor:
    """Find the nodes on each utterance's best alignment (Viterbi).

    A path has T_n + U_n nodes: from each it goes on by one arc, a label or a blank.

    Args:
      lattice: Of N utterances.
      blank_id: The token id of blank.

    Returns:
      (N, T, S), bool; no node is on the path of an utterance without a complete one.
    """
    px, py = _arcs(lattice.logits, lattice.ranges, lattice.labels, blank_id)
    on_path = torch.zeros_like(lattice.ranges, dtype=torch.bool)
    for i, (_, _, u, t) in enumerate(lattice.boundary.tolist()):
        first = lattice.ranges[i, :t, 0].tolist()
        nodes = _viterbi(px[i, :t].tolist(), py[i, :t].tolist(), first, u)
        for frame, position in nodes:
            on_path[i, frame, position - first[frame]] = True
    return on_path


def _viterbi(
    px: List[List[float]], py: List[List[float]], first: List[int], last_position: int
) -> List[Tuple[int, int]]:
    """Nodes (t, u) of the best path of one utterance, from its end to its start.

    Args:
      px: (T, S), log P(next label).
      py: (T, S), log P(blank).
      first: (T,), the lowest label position of each frame.
      last_position: U.
    """
    lowest = float("-inf")
    by_label = []  # for each frame, whether the best way into a position is a label
    entered = {0: 0.0}  # score of each position of this frame, entered by a blank
    for frame, (labels, blanks) in enumerate(zip(px, py)):
        scores, label_is_best = {}, {}
        for s in range(len(labels)):
            u = first[frame] + s
            if u > last_position:
                break
            by_blank = entered.get(u, lowest)
            label = scores[u - 1] + labels[s - 1] if s else lowest
            scores[u], label_is_best[u] = max((by_blank, False), (label, True))
        by_label.append(label_is_best)
        entered = {u: score + blanks[u - first[frame]] for u, score in scores.items()}
    if entered.get(last_position, lowest) == lowest:
        return []
    nodes, frame, u = [], len(px) - 1, last_position
    while frame >= 0:
        nodes.append((frame, u))
        if by_label[frame][u]:
            u -= 1
        else:
            frame -= 1
    return nodes
