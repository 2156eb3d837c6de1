"""The optimizer, its learning rate and the scaler of its gradients."""

from typing import Any

import torch
from torch import nn
from zipformer.modules.optim import Eden, ScaledAdam
from zipformer.utils import AttributeDict, get_parameter_groups_with_lrs


def get_optimizer(params: AttributeDict, model: nn.Module) -> ScaledAdam:
    return ScaledAdam(
        get_parameter_groups_with_lrs(model, lr=params.base_lr, include_names=True),
        lr=params.base_lr,  # should have no effect
        clipping_scale=2.0,
    )


def get_scheduler(params: AttributeDict, optimizer: ScaledAdam) -> Eden:
    return Eden(
        optimizer,
        params.lr_batches,
        params.lr_epochs,
        warmup_batches=params.lr_warmup,
        warmup_start=0.1,
    )


def create_grad_scaler(**options: Any) -> "torch.cuda.amp.GradScaler":
    if hasattr(torch.amp, "GradScaler"):  # from torch 2.3 on
        return torch.amp.GradScaler("cuda", **options)
    return torch.cuda.amp.GradScaler(**options)
