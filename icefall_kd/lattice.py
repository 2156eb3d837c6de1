"""What can be told of a pruned lattice: how likely its nodes are, and its best path."""

from typing import Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.rnnt import get_engine
from icefall_kd.types import PrunedLattice

# A node that the path passes less likely is left out, by stored targets (whose
# occupancy is a byte, in steps of 1/255) and by a teacher that is asked online alike.
LEAST_OCCUPANCY = 1 / 510


def passed_nodes(occupancy: torch.Tensor) -> torch.Tensor:
    """Which nodes the path passes with a probability above LEAST_OCCUPANCY.

    Args:
      occupancy: Of any shape; that of a byte's 255 steps gives those above 0.

    Returns:
      bool, of the same shape.
    """
    return occupancy > LEAST_OCCUPANCY


def check_s_range(s_range: int, option: str) -> None:
    """Refuse a number of label positions at a frame that makes no lattice.

    Args:
      s_range: 0 for all positions.
      option: Its name on the command line.
    """
    if s_range != 0 and s_range < 2:
        raise KDError(
            f"{option} is {s_range}, and no path gets through fewer than 2 label "
            "positions: give 2 or more, or 0 for all of them"
        )


def _arcs(
    logits: torch.Tensor, ranges: torch.Tensor, symbols: torch.Tensor, blank_id: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """log P(next label) and log P(blank) at each node, (N, T, S)."""
    n, t, s, _ = logits.shape
    log_probs = logits.float().log_softmax(-1)
    padded = torch.cat((symbols, symbols.new_full((n, 1), blank_id)), 1)
    position = ranges.clamp(max=symbols.size(1)).reshape(n, -1)
    label = padded.gather(1, position).reshape(n, t, s)
    px = log_probs.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    return px, log_probs[..., blank_id]


def node_occupancy(
    logits: torch.Tensor,
    ranges: torch.Tensor,
    symbols: torch.Tensor,
    boundary: torch.Tensor,
    blank_id: int,
) -> torch.Tensor:
    """The probability that the path of a pruned lattice passes each node.

    From the engine's forward-backward pass over log P(label) and log P(blank), with
    -inf outside the ranges. Sums to T_n + U_n, or to 0 for an utterance that no path
    gets through.

    Args:
      logits: (N, T, S, V). Of the other arguments see
        :class:`icefall_kd.types.PrunedLattice`.
    """
    n, t, s, _ = logits.shape
    u = symbols.size(1)
    px_pruned, py_pruned = _arcs(logits, ranges, symbols, blank_id)
    # Without this a path could still emit labels behind its last blank.
    frames = torch.arange(t, device=logits.device).unsqueeze(0)
    padding = (frames >= boundary[:, 3:]).unsqueeze(-1)
    px_pruned = px_pruned.masked_fill(padding, -torch.inf)

    def spread(pruned: torch.Tensor) -> torch.Tensor:  # (N, U + 1, T)
        full = pruned.new_full((n, t, u + s + 1), -torch.inf)
        return full.scatter(2, ranges, pruned)[..., : u + 1].transpose(1, 2)

    px = torch.nn.functional.pad(spread(px_pruned)[:, :u], (0, 1), value=-torch.inf)
    sums, (px_grad, py_grad) = get_engine().mutual_information_recursion(
        px, spread(py_pruned).contiguous(), boundary, return_grad=True
    )
    passed = py_grad.clone()
    passed[:, :u] += px_grad[..., :t]
    passed = torch.nn.functional.pad(passed.transpose(1, 2), (0, s + 1))
    # Where no path is complete the engine's gradients mean nothing.
    nowhere = padding | ~torch.isfinite(sums)[:, None, None]
    return passed.gather(2, ranges).masked_fill(nowhere, 0.0)


def path_sums(
    arcs: torch.Tensor,
    row: torch.Tensor,
    frame: torch.Tensor,
    position: torch.Tensor,
    boundary: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """log of the summed probability of all paths over given nodes.

    Args:
      arcs: (R, 2), log P(next label) and log P(blank) at each node; -inf for an arc
        that no path may take.
      row, frame, position: (R,), where the nodes stand.
      boundary: (N, 4), int64: 0, 0, U_n, T_n.

    Returns:
      (N,), -inf where no path is complete; and (R, 2), the probability that the path
      takes each arc, which is the gradient of the former; 0 where no path is complete.
    """
    u, t = boundary[:, 2:].amax(0).tolist()
    px = arcs.new_full((len(boundary), u + 1, t + 1), -torch.inf)
    py = arcs.new_full((len(boundary), u + 1, t), -torch.inf)
    px[row, position, frame], py[row, position, frame] = arcs[:, 0], arcs[:, 1]
    sums, (px_grad, py_grad) = get_engine().mutual_information_recursion(
        px[:, :u].contiguous(), py, boundary, return_grad=True
    )
    px_grad = torch.nn.functional.pad(px_grad, (0, 0, 0, 1))
    taken = [g[row, position, frame] for g in (px_grad, py_grad)]
    gone = ~torch.isfinite(sums)[row]
    return sums, torch.stack(taken, -1).masked_fill(gone.unsqueeze(1), 0.0)


def best_path(lattice: PrunedLattice, blank_id: int) -> torch.Tensor:
    """The nodes on each utterance's best alignment (Viterbi), (N, T, S), bool.

    A path has T_n + U_n nodes: from each it goes on by one arc, a label or a blank. No
    node is on it where no path is complete.
    """
    px, py = _arcs(lattice.logits, lattice.ranges, lattice.labels, blank_id)
    on_path = torch.zeros_like(lattice.ranges, dtype=torch.bool)
    for i, (_, _, u, t) in enumerate(lattice.boundary.tolist()):
        first = lattice.ranges[i, :t, 0].tolist()
        nodes = _viterbi(px[i, :t].tolist(), py[i, :t].tolist(), first, u)
        for frame, position in nodes:
            on_path[i, frame, position - first[frame]] = True
    return on_path


def _viterbi(px, py, first, last_position) -> list:
    """Nodes (t, u) of the best path, from its end to its start."""
    lowest = float("-inf")
    by_label = []  # whether the best way into a node is a label
    before = {0: 0.0}  # score of each position u at frame t, entered by a blank
    for frame, (labels, blanks) in enumerate(zip(px, py)):
        scores, came = {}, {}
        for s in range(len(labels)):
            u = first[frame] + s
            if u > last_position:
                break
            by_blank = before.get(u, lowest)
            label = scores[u - 1] + labels[s - 1] if s else lowest
            scores[u], came[u] = max((by_blank, False), (label, True))
        by_label.append(came)
        before = {u: score + blanks[u - first[frame]] for u, score in scores.items()}
    if before.get(last_position, lowest) == lowest:
        return []
    nodes, frame, u = [], len(px) - 1, last_position
    while frame >= 0:
        nodes.append((frame, u))
        if by_label[frame][u]:
            u -= 1
        else:
            frame -= 1
    return nodes
