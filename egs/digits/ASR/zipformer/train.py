#!/usr/bin/env python3
"""
Usage:

  ./zipformer/train.py --exp-dir exp/teacher --num-epochs 4 --seed 42

The model, its options and the optimizer are those of the package zipformer, which is
icefall's own. The five lines that name kd are all that distillation needs:

  ./zipformer/train.py --exp-dir exp/student-kd --start-epoch 2 --num-epochs 4 \
    --manifest-dir data/kd --kd-ctc-weight 1 $(cat exp/student-kd/student_flags)

On several GPUs it runs with --world-size, or under torchrun, which may start it on
several machines; --max-duration is that of one process.
"""

import argparse
import copy
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import sentencepiece as spm
import torch
import torch.multiprocessing as mp
from asr_datamodule import AsrDataModule, check_cuts, load_bpe_model
from checkpoint import load_checkpoint, load_states, save_checkpoint
from dev_wer import dev_wers_until, is_over, read_dev_wers
from lhotse import fix_random_seed
from lhotse.dataset import SpecAugment
from model import (
    add_model_arguments,
    cr_ctc_inputs,
    forget_metrics,
    get_model,
    get_spec_augment,
    prepare_package,
)
from optim import create_grad_scaler, get_optimizer, get_scheduler
from options import TEACHER, add_training_arguments, check_options, get_params
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from zipformer.bin.train import get_adjusted_batch_count, set_batch_count
from zipformer.modules.optim import Eden
from zipformer.utils import (
    AttributeDict,
    MetricsTracker,
    cleanup_dist,
    remove_checkpoints,
    setup_logger,
    update_averaged_model,
)

from icefall_kd import KDError
from icefall_kd.training import session as kd


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_training_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(**TEACHER)
    kd.add_arguments(parser)
    return parser


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
      params: Parameters for training. See :func:`get_params`.
      model: The Zipformer model, or DDP around it.
      sp: The tokens.
      batch: What `lhotse.dataset.K2SpeechRecognitionDataset` gives.
      is_training: True for training: enables autograd.
      spec_augment: The masks of CR-CTC, None without it and in validation.
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
    save: Callable[[str], None],
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
            save(f"checkpoint-{params.batch_idx_train}.pt")
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


def setup_dist(rank: int, world_size: int, master_port: int) -> None:
    """Join the other processes, at the address that torchrun set or on this machine."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", str(master_port))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, rank=rank, world_size=world_size)


def run(rank: int, world_size: int, args: argparse.Namespace) -> None:
    """Train in process `rank` of `world_size`."""
    params = get_params()
    params.update(vars(args))
    params.exp_dir = Path(params.exp_dir)
    torch.set_num_threads(params.num_threads or os.cpu_count() or 1)
    fix_random_seed(params.seed)
    if world_size > 1:
        setup_dist(rank, world_size, params.master_port)
    # Of several machines, each numbers its own GPUs from 0.
    local_rank = int(os.environ.get("LOCAL_RANK", rank))

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
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    logging.info(f"Device: {device}")

    sp = load_bpe_model(params.bpe_model)
    # <blk> is defined in local/train_bpe_model.py
    params.blank_id = sp.piece_to_id("<blk>")
    params.sos_id = params.eos_id = sp.piece_to_id("<sos/eos>")
    params.vocab_size = sp.get_piece_size()
    logging.info(params)

    logging.info("About to create model")
    prepare_package()
    model = get_model(params)
    num_param = sum([p.numel() for p in model.parameters()])
    logging.info(f"Number of model parameters: {num_param}")

    model_avg: Optional[nn.Module] = None
    if rank == 0:
        model_avg = copy.deepcopy(model).to(torch.float64)
    checkpoints = load_checkpoint(params, model, model_avg)
    model.to(device)
    if world_size > 1:
        logging.info("Using DDP")
        ids = [local_rank] if device.type == "cuda" else None
        model = DDP(model, device_ids=ids, find_unused_parameters=True)
    kd.attach(params, model)

    optimizer = get_optimizer(params, model)
    scheduler = get_scheduler(params, optimizer)
    scaler = create_grad_scaler(enabled=params.use_fp16, init_scale=1.0)
    load_states(
        checkpoints, optimizer=optimizer, scheduler=scheduler, grad_scaler=scaler
    )

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

    def save(name: str) -> None:
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
                save=save,
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
                save(name)
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
    launched = int(os.environ.get("WORLD_SIZE", 1))  # by torchrun, on all nodes
    if launched > 1:
        args.world_size = launched
    check_options(args)
    if launched > 1:
        run(int(os.environ["RANK"]), launched, args)
    elif args.world_size > 1:
        mp.spawn(run, args=(args.world_size, args), nprocs=args.world_size, join=True)
    else:
        run(rank=0, world_size=1, args=args)


if __name__ == "__main__":
    main()
