"""Which of several processes this one is."""

from typing import Tuple


def rank_and_world_size() -> Tuple[int, int]:
    """Return this process's rank and the number of processes: 0 and 1 without DDP."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
