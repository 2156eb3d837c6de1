"""What a training saves, and goes on from."""

import logging
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from zipformer.bin.train import load_checkpoint_if_available
from zipformer.modules.optim import Eden
from zipformer.utils import AttributeDict
from zipformer.utils import save_checkpoint as save_checkpoint_impl

from icefall_kd import KDError
from icefall_kd.files import replacing


def save_checkpoint(
    filename: Path,
    params: AttributeDict,
    model: Union[nn.Module, DDP],
    model_avg: Optional[nn.Module],
    optimizer: torch.optim.Optimizer,
    scheduler: Eden,
    sampler: Any,
    scaler: "torch.cuda.amp.GradScaler",
    rank: int = 0,
) -> None:
    """Save states and ``params``; the file appears whole."""
    if rank != 0:
        return
    with replacing(filename) as temporary:
        save_checkpoint_impl(
            filename=temporary,
            model=model,
            model_avg=model_avg,
            params={**params, "sampler": sampler.state_dict()},
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            rank=rank,
        )
    if model_avg is not None:
        model_avg.to(torch.float64)


def check_average_period(params: AttributeDict, checkpoint: Dict[str, Any]) -> None:
    """Refuse another --average-period than before, when dev cuts are to be decoded.

    The averaged model is that between two checkpoints, and they must have one period.
    """
    before = checkpoint.get("average_period", params.average_period)
    if params.patience > 0 and before != params.average_period:
        raise KDError(
            f"--average-period is {params.average_period}, and the training in "
            f"{params.exp_dir} had {before}: give --average-period {before}"
        )


def load_checkpoint(
    params: AttributeDict, model: nn.Module, model_avg: Optional[nn.Module]
) -> Optional[Dict[str, Any]]:
    """Load the parameters that a training goes on from, and return its checkpoint."""
    checkpoints = load_checkpoint_if_available(
        params=params, model=model, model_avg=model_avg
    )
    if checkpoints and params.batch_idx_train > 0:
        # A student's first checkpoint has settings of its teacher's training.
        check_average_period(params, checkpoints)
        params.train_seconds = checkpoints.get("train_seconds", 0.0)
    return checkpoints


def load_states(checkpoints: Optional[Dict[str, Any]], **states: Any) -> None:
    """Load optimizer, scheduler and scaler, by the names that a checkpoint has."""
    for name, state in states.items():
        if checkpoints and checkpoints.get(name):
            logging.info(f"Loading {name} state dict")
            state.load_state_dict(checkpoints[name])
