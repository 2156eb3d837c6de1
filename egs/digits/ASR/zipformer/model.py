"""The model, which is that of the package zipformer, and its CR-CTC."""

import argparse
from typing import Any, Dict

import torch
from lhotse.dataset import SpecAugment
from torch import Tensor, nn
from zipformer.bin import train as zipformer_train
from zipformer.modules import model as zipformer_model
from zipformer.modules.scaling import ScheduledFloat, Whiten
from zipformer.modules.subsampling import Conv2dSubsampling
from zipformer.utils import AttributeDict

from icefall_kd import KDError, get_engine


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model, all that its checkpoints depend on, to ``parser``."""
    zipformer_train.add_model_arguments(parser)
    parser.add_argument(
        "--embed-channels",
        type=str,
        default="8,32,128",
        help="Channels of encoder_embed's convolutions; icefall's are 8,32,128.",
    )


def get_model(params: AttributeDict) -> nn.Module:
    """Return the package's model, with the front end that ``params`` describe."""
    model = zipformer_train.get_model(params)
    # A checkpoint of a former version has no such setting.
    embed_channels = params.get("embed_channels", "8,32,128")
    numbers = [n.strip() for n in embed_channels.split(",")]
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
        raise KDError(
            f"--embed-channels is {embed_channels!r}, and must be three numbers "
            "above 0, such as 8,32,128"
        )
    channels = [int(n) for n in numbers]
    if channels != [8, 32, 128]:
        model.encoder_embed = Conv2dSubsampling(
            params.feature_dim,
            int(params.encoder_dim.split(",")[0]),
            *channels,
            dropout=ScheduledFloat((0.0, 0.3), (20000.0, 0.1)),
        )
    return model


def forget_metrics(model: nn.Module) -> None:
    """Begin an epoch with what a training has that goes on from its checkpoint.

    How often an activation is looked at for whitening follows from the last look, and
    no checkpoint keeps it.
    """
    for module in model.modules():
        if isinstance(module, Whiten):
            module.prob = module.max_prob


def get_spec_augment(params: AttributeDict) -> SpecAugment:
    """Return CR-CTC's masks, which suit this recipe's short utterances and few bins."""
    return SpecAugment(
        time_warp_factor=0,
        num_frame_masks=int(2 * params.time_mask_ratio),
        features_mask_size=8,
        num_feature_masks=2,
        frames_mask_size=20,
        max_frames_mask_fraction=0.15 * params.time_mask_ratio,
    )


def cr_ctc_inputs(spec_augment: SpecAugment, feature_lens: Tensor) -> Dict[str, Any]:
    """Return what makes the model compute CR-CTC's loss in training.

    The model then masks two copies of each utterance (arXiv:2410.05101).
    """
    supervision_segments = torch.zeros(feature_lens.numel(), 3, dtype=torch.int64)
    supervision_segments[:, 0] = torch.arange(feature_lens.numel())
    supervision_segments[:, 2] = feature_lens.cpu()
    return {
        "use_cr_ctc": True,
        "use_spec_aug": True,
        "spec_augment": spec_augment,
        "supervision_segments": supervision_segments,
    }


def no_time_warp(features: Tensor, **options: Any) -> Tensor:
    """Return ``features`` as they are.

    The model calls it for CR-CTC; the package's own takes other ``options``.
    """
    return features


def prepare_package() -> None:
    """Let the package's model compute its losses here, without a warp of time."""
    zipformer_model.k2 = get_engine()
    zipformer_model.time_warp = no_time_warp
