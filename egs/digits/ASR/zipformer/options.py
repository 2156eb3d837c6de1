"""The options of a training, and what it keeps beside them."""

import argparse
import sys

import torch
from zipformer.utils import AttributeDict, str2bool

from icefall_kd import KDError, get_engine

# A teacher of 1.3 M parameters.
TEACHER = dict(
    feature_dim=40,
    sample_rate=8000,
    num_encoder_layers="2,2,2",
    downsampling_factor="1,2,2",
    feedforward_dim="96,192,192",
    num_heads="4,4,4",
    encoder_dim="48,96,96",
    encoder_unmasked_dim="32,64,64",
    query_head_dim="16",
    value_head_dim="12",
    pos_head_dim="4",
    cnn_module_kernel="15,15,15",
    decoder_dim=96,
    joiner_dim=96,
    use_cr_ctc=False,
)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training to ``parser``, but those of its model."""
    add = parser.add_argument
    add("--world-size", type=int, default=1, help="Number of processes for DDP.")
    add("--master-port", type=int, default=12354, help="Master port for DDP.")
    add("--tensorboard", type=str2bool, default=True, help="Write tensorboard files.")
    add("--num-epochs", type=int, default=4, help="Train until this epoch is done.")
    add(
        "--start-epoch",
        type=int,
        default=1,
        help="Resume from this epoch: above 1, exp-dir/epoch-{start_epoch-1}.pt.",
    )
    add(
        "--start-batch",
        type=int,
        default=0,
        help="If positive, --start-epoch is ignored: exp-dir/checkpoint-{it}.pt.",
    )
    add(
        "--patience",
        type=int,
        default=0,
        help="If positive, decode the dev cuts after each epoch, and end the training "
        "when the mean WER of both heads has not improved for so many epochs.",
    )
    add("--avg", type=int, default=1, help="Epochs to average, for --patience.")
    add("--exp-dir", type=str, default="exp/zipformer", help="Models and logs go here.")
    add("--bpe-model", type=str, default="data/lang_bpe/bpe.model", help="Tokens.")
    add("--base-lr", type=float, default=0.045, help="The base learning rate.")
    add("--lr-batches", type=float, default=500, help="Batches that decay the rate.")
    add("--lr-epochs", type=float, default=6, help="Epochs that decay the rate.")
    add("--lr-warmup", type=float, default=100, help="Batches that raise the rate.")
    add("--ref-duration", type=float, default=10, help="Batch count's reference.")
    add("--prune-range", type=int, default=5, help="Symbols per frame in the lattice.")
    add("--lm-scale", type=float, default=0.25, help="Smooths the simple loss.")
    add("--am-scale", type=float, default=0.0, help="Smooths the simple loss.")
    add("--simple-loss-scale", type=float, default=0.5, help="After the warm-up.")
    add("--ctc-loss-scale", type=float, default=0.2, help="Scale of the CTC loss.")
    add("--cr-loss-scale", type=float, default=0.2, help="Scale of CR-CTC's loss.")
    add(
        "--time-mask-ratio",
        type=float,
        default=2.5,
        help="How much more of the time SpecAugment masks for CR-CTC.",
    )
    add("--warm-step", type=int, default=100, help="Warm-up of the pruned loss.")
    add("--seed", type=int, default=42, help="For initialisation and shuffling.")
    add("--save-every-n", type=int, default=50, help="Steps between checkpoint-N.pt.")
    add("--keep-last-k", type=int, default=30, help="How many checkpoint-N.pt to keep.")
    add("--average-period", type=int, default=10, help="Steps between model averages.")
    add("--use-fp16", type=str2bool, default=False, help="Train in half precision.")
    add("--num-threads", type=int, default=0, help="CPU threads; 0: all cores.")


def get_params() -> AttributeDict:
    """Parameters that are not passed from the command line."""
    return AttributeDict(
        {
            "best_train_loss": float("inf"),
            "best_valid_loss": float("inf"),
            "best_train_epoch": -1,
            "best_valid_epoch": -1,
            "batch_idx_train": 0,
            "train_seconds": 0.0,  # of training alone, from the start on
            "log_interval": 50,
            "reset_interval": 200,
            "subsampling_factor": 4,  # not passed in, this is fixed.
            "ignore_id": -1,
            "label_smoothing": 0.1,
            "env_info": {
                "torch": str(torch.__version__),
                "engine": get_engine().__name__,
                "python": sys.version.split()[0],
            },
        }
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that don't go together."""
    if args.use_cr_ctc and args.enable_spec_aug:
        raise KDError(
            "--use-cr-ctc and --enable-spec-aug are both true: leave out the second, "
            "as CR-CTC has SpecAugment's masks of its own"
        )
    if args.patience < 0 or args.avg < 1:
        raise KDError(
            f"--patience is {args.patience} and --avg {args.avg}: give --patience from "
            "0 on and --avg from 1 on"
        )
    if args.patience > 0 and args.world_size > 1:
        raise KDError(
            f"--patience is {args.patience} and --world-size {args.world_size}: give "
            "--world-size 1, as only one process can end the training"
        )
