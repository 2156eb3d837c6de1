#!/usr/bin/env python3
"""
Usage:

  ./zipformer/train.py --exp-dir exp/teacher --num-epochs 4 --seed 42

The model, its options and the optimizer are those of the package zipformer, which is
icefall's own. The five lines that name kd are all that distillation needs:

  ./zipformer/train.py --exp-dir exp/student-kd --start-epoch 2 --num-epochs 4 \
    --manifest-dir data/kd --kd-ctc-weight 1 $(cat exp/student-kd/student_flags)
"""

import argparse
import copy
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import sentencepiece as spm
import torch
import torch.multiprocessing as mp
from asr_datamodule import AsrDataModule
from dev_wer import dev_wers_until, is_over, read_dev_wers
from lhotse import CutSet, fix_random_seed
from lhotse.dataset import SpecAugment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from zipformer.bin import train as zipformer_train
from zipformer.bin.train import (
    get_adjusted_batch_count,
    load_checkpoint_if_available,
    set_batch_count,
)
from zipformer.modules import model as zipformer_model
from zipformer.modules.optim import Eden, ScaledAdam
from zipformer.modules.scaling import ScheduledFloat, Whiten
from zipformer.modules.subsampling import Conv2dSubsampling
from zipformer.utils import (
    AttributeDict,
    MetricsTracker,
    cleanup_dist,
    get_parameter_groups_with_lrs,
    remove_checkpoints,
)
from zipformer.utils import save_checkpoint as save_checkpoint_impl
from zipformer.utils import setup_dist, setup_logger, str2bool, update_averaged_model

from icefall_kd import KDError, get_engine
from icefall_kd.files import replacing
from icefall_kd.training import session as kd


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model, all that its checkpoints depend on, to ``parser``."""
    zipformer_train.add_model_arguments(parser)
    parser.add_argument(
        "--embed-channels",
        type=str,
        default="8,32,128",
        help="Channels of encoder_embed's convolutions; icefall's are 8,32,128.",
    )


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
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
    add_model_arguments(parser)
    # A teacher of 1.3 M parameters.
    parser.set_defaults(
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
    kd.add_arguments(parser)
    return parser


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


def create_grad_scaler(**options: Any) -> "torch.cuda.amp.GradScaler":
    if hasattr(torch.amp, "GradScaler"):  # from torch 2.3 on
        return torch.amp.GradScaler("cuda", **options)
    return torch.cuda.amp.GradScaler(**options)


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


def compute_loss(
    params: AttributeDict,
    model: Union[nn.Module, DDP],
    sp: spm.SentencePieceProcessor,
    batch: dict,
    is_training: bool,
    spec_augment: Optional[SpecAugment] = None,
) -> Tuple[Tensor, MetricsTracker]:
    """Compute the sum of losses over the frames of a batch.

    Args:
      params:
        Parameters for training. See :func:`get_params`.
      model:
        The Zipformer model, or DDP around it.
      batch:
        What `lhotse.dataset.K2SpeechRecognitionDataset` gives.
      is_training:
        True for training: enables autograd.
      spec_augment:
        The masks of CR-CTC, None without it and in validation.
    """
    kd.begin(batch)
    device = model.device if isinstance(model, DDP) else next(model.parameters()).device
    feature = batch["inputs"].to(device)  # (N, T, C)
    supervisions = batch["supervisions"]
    feature_lens = supervisions["num_frames"].to(device)
    # One by one: for a list sentencepiece starts threads, which cost 5 ms a batch.
    y = [sp.encode(text, out_type=int) for text in supervisions["text"]]

    use_cr_ctc = spec_augment is not None
    more_inputs = cr_ctc_inputs(spec_augment, feature_lens) if use_cr_ctc else {}
    with torch.set_grad_enabled(is_training):
        simple_loss, pruned_loss, ctc_loss, _, cr_loss = model(
            x=feature,
            x_lens=feature_lens,
            y=y,
            prune_range=params.prune_range,
            am_scale=params.am_scale,
            lm_scale=params.lm_scale,
            **more_inputs,
        )
        s = params.simple_loss_scale
        warm = min(1.0, params.batch_idx_train / params.warm_step)
        loss = (1.0 - warm * (1.0 - s)) * simple_loss + (0.1 + 0.9 * warm) * pruned_loss
        loss += params.ctc_loss_scale * ctc_loss
        if use_cr_ctc:
            loss += params.cr_loss_scale * cr_loss

    assert loss.requires_grad == is_training

    info = MetricsTracker()
    loss = kd.joint_loss(loss, info, model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info["frames"] = (feature_lens // params.subsampling_factor).sum().item()

    # Note: We use reduction=sum while computing the loss.
    info["loss"] = loss.detach().cpu().item()
    info["simple_loss"] = simple_loss.detach().cpu().item()
    info["pruned_loss"] = pruned_loss.detach().cpu().item()
    info["ctc_loss"] = ctc_loss.detach().cpu().item()
    if use_cr_ctc:
        info["cr_loss"] = cr_loss.detach().cpu().item()
    return loss, info


def compute_validation_loss(
    params: AttributeDict,
    model: Union[nn.Module, DDP],
    sp: spm.SentencePieceProcessor,
    valid_dl: torch.utils.data.DataLoader,
    world_size: int = 1,
) -> MetricsTracker:
    """Run the validation process."""
    model.eval()
    tot_loss = MetricsTracker()
    for batch in valid_dl:
        loss, loss_info = compute_loss(params, model, sp, batch, is_training=False)
        assert loss.requires_grad is False
        tot_loss = tot_loss + loss_info
    if world_size > 1:
        tot_loss.reduce(loss.device)
    loss_value = tot_loss["loss"] / tot_loss["frames"]
    if loss_value < params.best_valid_loss:
        params.best_valid_epoch = params.cur_epoch
        params.best_valid_loss = loss_value
    return tot_loss


def train_one_epoch(
    params: AttributeDict,
    model: Union[nn.Module, DDP],
    optimizer: torch.optim.Optimizer,
    scheduler: Eden,
    sp: spm.SentencePieceProcessor,
    train_dl: torch.utils.data.DataLoader,
    valid_dl: torch.utils.data.DataLoader,
    scaler: "torch.cuda.amp.GradScaler",
    bar: tqdm,
    model_avg: Optional[nn.Module] = None,
    spec_augment: Optional[SpecAugment] = None,
    tb_writer: Optional[SummaryWriter] = None,
    world_size: int = 1,
    rank: int = 0,
) -> None:
    """Train the model for one epoch, and validate it at its end."""
    begun = time.monotonic()
    model.train()
    tot_loss = MetricsTracker()
    for batch_idx, batch in enumerate(train_dl):
        if batch_idx % 10 == 0:
            set_batch_count(model, get_adjusted_batch_count(params))
        params.batch_idx_train += 1
        batch_size = len(batch["supervisions"]["text"])

        with torch.autocast("cuda", enabled=params.use_fp16, dtype=torch.float16):
            loss, loss_info = compute_loss(
                params, model, sp, batch, is_training=True, spec_augment=spec_augment
            )
        tot_loss = (tot_loss * (1 - 1 / params.reset_interval)) + loss_info
        scaler.scale(loss).backward()
        scheduler.step_batch(params.batch_idx_train)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        if rank == 0 and params.batch_idx_train % params.average_period == 0:
            update_averaged_model(params=params, model_cur=model, model_avg=model_avg)
        if params.batch_idx_train % params.save_every_n == 0:
            save_checkpoint(
                params.exp_dir / f"checkpoint-{params.batch_idx_train}.pt",
                params,
                model,
                model_avg,
                optimizer,
                scheduler,
                train_dl.sampler,
                scaler,
                rank,
            )
            remove_checkpoints(params.exp_dir, topk=params.keep_last_k, rank=rank)

        bar.update(sum(c.duration for c in batch["supervisions"]["cut"]) * world_size)
        if batch_idx % params.log_interval == 0:
            cur_lr = max(scheduler.get_last_lr())
            logging.info(
                f"Epoch {params.cur_epoch}, batch {batch_idx}, loss[{loss_info}], "
                f"tot_loss[{tot_loss}], batch size: {batch_size}, lr: {cur_lr:.2e}"
            )
            if tb_writer is not None:
                step = params.batch_idx_train
                tb_writer.add_scalar("train/learning_rate", cur_lr, step)
                loss_info.write_summary(tb_writer, "train/current_", step)
                tot_loss.write_summary(tb_writer, "train/tot_", step)

    if not tot_loss["frames"]:
        raise KDError(
            "the training cuts fill none of the --num-buckets with --max-duration "
            f"{params.max_duration} s, and an epoch has 0 batches: give fewer buckets, "
            "a shorter duration or more cuts"
        )
    params.train_seconds += time.monotonic() - begun
    valid_info = compute_validation_loss(params, model, sp, valid_dl, world_size)
    logging.info(f"Epoch {params.cur_epoch}, validation: {valid_info}")
    if tb_writer is not None:
        valid_info.write_summary(tb_writer, "train/valid_", params.batch_idx_train)
    params.train_loss = tot_loss["loss"] / tot_loss["frames"]
    if params.train_loss < params.best_train_loss:
        params.best_train_epoch = params.cur_epoch
        params.best_train_loss = params.train_loss


def check_cuts(cuts: CutSet, sp: spm.SentencePieceProcessor) -> float:
    """Refuse cuts that the losses can't take; return their duration in seconds."""
    total = 0.0
    for c in cuts:
        problem = ""
        if len(c.supervisions) != 1:
            problem = f"has {len(c.supervisions)} supervisions and must have 1"
        elif not (c.supervisions[0].text or "").strip():
            problem = "has an empty text and must have a transcript"
        else:
            frames = ((c.num_frames - 7) // 2 + 1) // 2
            tokens = len(sp.encode(c.supervisions[0].text))
            if frames - 2 < tokens:
                problem = (
                    f"has {frames} frames after subsampling and needs "
                    f"{tokens + 2} for its {tokens} tokens"
                )
        if problem:
            raise KDError(
                f"the cut {c.id} {problem}: mend it or leave it out "
                "of the training cuts"
            )
        total += c.duration
    if not total:
        raise KDError("there are no training cuts: make the data")
    return total


def load_bpe_model(path: str) -> spm.SentencePieceProcessor:
    if not Path(path).is_file():
        raise KDError(
            f"the BPE model {path} does not exist: run the token stage, or mend "
            "--bpe-model"
        )
    sp = spm.SentencePieceProcessor()
    sp.load(path)
    return sp


def run(rank: int, world_size: int, args: argparse.Namespace) -> None:
    """Train in process `rank` of `world_size`."""
    params = get_params()
    params.update(vars(args))
    params.exp_dir = Path(params.exp_dir)
    torch.set_num_threads(params.num_threads or os.cpu_count() or 1)
    fix_random_seed(params.seed)
    if world_size > 1:
        setup_dist(rank, world_size, params.master_port)

    setup_logger(f"{params.exp_dir}/log/log-train")
    logging.info("Training started")
    if params.patience > 0 and params.start_batch == 0:
        rows = read_dev_wers(params.exp_dir)
        if is_over(
            [row for row in rows if row.epoch < params.start_epoch], params.patience
        ):
            logging.info(f"Over: no better WER for {params.patience} epochs")
            return
    tb_writer = None
    if args.tensorboard and rank == 0:
        tb_writer = SummaryWriter(log_dir=f"{params.exp_dir}/tensorboard")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
    logging.info(f"Device: {device}")

    sp = load_bpe_model(params.bpe_model)
    # <blk> is defined in local/train_bpe_model.py
    params.blank_id = sp.piece_to_id("<blk>")
    params.sos_id = params.eos_id = sp.piece_to_id("<sos/eos>")
    params.vocab_size = sp.get_piece_size()
    logging.info(params)

    logging.info("About to create model")
    zipformer_model.k2 = get_engine()
    zipformer_model.time_warp = no_time_warp
    model = get_model(params)
    num_param = sum([p.numel() for p in model.parameters()])
    logging.info(f"Number of model parameters: {num_param}")

    model_avg: Optional[nn.Module] = None
    if rank == 0:
        model_avg = copy.deepcopy(model).to(torch.float64)
    checkpoints = load_checkpoint_if_available(
        params=params, model=model, model_avg=model_avg
    )
    if checkpoints and params.batch_idx_train > 0:
        # A student's first checkpoint has settings of its teacher's training.
        check_average_period(params, checkpoints)
        params.train_seconds = checkpoints.get("train_seconds", 0.0)
    model.to(device)
    if world_size > 1:
        logging.info("Using DDP")
        ids = [rank] if device.type == "cuda" else None
        model = DDP(model, device_ids=ids, find_unused_parameters=True)
    kd.attach(params, model)

    optimizer = ScaledAdam(
        get_parameter_groups_with_lrs(model, lr=params.base_lr, include_names=True),
        lr=params.base_lr,  # should have no effect
        clipping_scale=2.0,
    )
    scheduler = Eden(
        optimizer,
        params.lr_batches,
        params.lr_epochs,
        warmup_batches=params.lr_warmup,
        warmup_start=0.1,
    )
    scaler = create_grad_scaler(enabled=params.use_fp16, init_scale=1.0)
    states = {"optimizer": optimizer, "scheduler": scheduler, "grad_scaler": scaler}
    for name, state in states.items():
        if checkpoints and checkpoints.get(name):
            logging.info(f"Loading {name} state dict")
            state.load_state_dict(checkpoints[name])

    digits = AsrDataModule(args)
    train_cuts = digits.train_cuts()
    seconds = check_cuts(train_cuts, sp)
    sampler_state_dict: Optional[Dict[str, Any]] = None
    if params.start_batch > 0 and checkpoints and "sampler" in checkpoints:
        sampler_state_dict = checkpoints["sampler"]
    train_dl = digits.train_dataloaders(
        train_cuts, sampler_state_dict=sampler_state_dict
    )
    valid_dl = digits.valid_dataloaders(digits.dev_cuts())

    def over(epoch: int, anew: bool = True) -> bool:
        """Whether the training is over after this epoch, which is done."""
        if params.patience == 0:
            return False
        params.cur_epoch = epoch
        rows = dev_wers_until(params, valid_dl, sp, anew)
        if not is_over(rows, params.patience):
            return False
        logging.info(f"Over: no better WER for {params.patience} epochs")
        return True

    # A training that was stopped before it had decoded the dev cuts does so first.
    if params.start_batch == 0 and over(params.start_epoch - 1, anew=False):
        return
    spec_augment = get_spec_augment(params) if params.use_cr_ctc else None
    epochs = params.num_epochs - params.start_epoch + 1
    with (
        logging_redirect_tqdm(),
        tqdm(
            desc=f"Training {params.exp_dir.name}",
            total=round(seconds * epochs),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=rank != 0,
        ) as bar,
    ):
        for epoch in range(params.start_epoch, params.num_epochs + 1):
            scheduler.step_epoch(epoch - 1)
            fix_random_seed(params.seed + epoch - 1)
            forget_metrics(model)
            train_dl.sampler.set_epoch(epoch - 1)
            params.cur_epoch = epoch
            train_one_epoch(
                params=params,
                model=model,
                model_avg=model_avg,
                spec_augment=spec_augment,
                optimizer=optimizer,
                scheduler=scheduler,
                sp=sp,
                train_dl=train_dl,
                valid_dl=valid_dl,
                scaler=scaler,
                bar=bar,
                tb_writer=tb_writer,
                world_size=world_size,
                rank=rank,
            )
            best = {
                "best-train-loss.pt": params.best_train_epoch == epoch,
                "best-valid-loss.pt": params.best_valid_epoch == epoch,
            }
            # The epoch's own comes last: it says that all of them are there.
            for name in [*filter(best.get, best), f"epoch-{epoch}.pt"]:
                save_checkpoint(
                    params.exp_dir / name,
                    params,
                    model,
                    model_avg,
                    optimizer,
                    scheduler,
                    train_dl.sampler,
                    scaler,
                    rank,
                )
            if over(epoch):
                break
        else:
            if params.patience > 0:
                logging.warning(
                    f"--num-epochs {params.num_epochs} ended the training before "
                    f"--patience {params.patience} did: the WER may still improve"
                )
    logging.info("Done!")
    if world_size > 1:
        torch.distributed.barrier()
        cleanup_dist()


def main():
    parser = get_parser()
    AsrDataModule.add_arguments(parser)
    args = parser.parse_args()
    args.exp_dir = Path(args.exp_dir)
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
    if args.world_size > 1:
        mp.spawn(run, args=(args.world_size, args), nprocs=args.world_size, join=True)
    else:
        run(rank=0, world_size=1, args=args)


if __name__ == "__main__":
    main()
