"""The digits corpora as PyTorch DataLoaders; see ../local for how they are made."""

import argparse
import logging
from pathlib import Path
from typing import Any, Dict, Optional

import sentencepiece as spm
import torch
from lhotse import CutSet, fix_random_seed
from lhotse.dataset import (
    DynamicBucketingSampler,
    K2SpeechRecognitionDataset,
    SpecAugment,
)
from torch.utils.data import DataLoader
from zipformer.utils import str2bool

from icefall_kd import KDError
from icefall_kd.targets.transcript import has_no_text
from icefall_kd.training import session as kd


class _SeedWorkers:
    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, worker_id: int):
        fix_random_seed(self.seed + worker_id)


class AsrDataModule:
    """DataLoaders for training, validation and test cuts with stored features."""

    def __init__(self, args: argparse.Namespace):
        self.args = args

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser):
        """Add the options of the data to ``parser``."""
        group = parser.add_argument_group(
            title="ASR data related options",
            description="Effective batch sizes, sampling and augmentation.",
        )
        group.add_argument(
            "--manifest-dir",
            type=Path,
            default=Path("data/fbank"),
            help="Path to directory with train/dev/test cuts.",
        )
        group.add_argument(
            "--train-set",
            type=str,
            default="train",
            help="Comma-separated cut sets to train on: cuts_<name>.jsonl.gz",
        )
        group.add_argument(
            "--max-duration",
            type=int,
            default=20,
            help="Maximum pooled recordings duration (seconds) in a single batch.",
        )
        group.add_argument(
            "--num-buckets",
            type=int,
            default=10,
            help="The number of buckets for the DynamicBucketingSampler.",
        )
        group.add_argument(
            "--shuffle",
            type=str2bool,
            default=True,
            help="When enabled, the examples are shuffled for each epoch.",
        )
        group.add_argument(
            "--drop-last",
            type=str2bool,
            default=True,
            help="Whether to drop last batch. Used by sampler.",
        )
        group.add_argument(
            "--return-cuts",
            type=str2bool,
            default=True,
            help="When enabled, each batch has batch['supervisions']['cut'].",
        )
        group.add_argument(
            "--num-workers",
            type=int,
            default=1,
            help="The number of dataloader workers that collect the batches.",
        )
        group.add_argument(
            "--enable-spec-aug",
            type=str2bool,
            default=False,
            help="When enabled, use SpecAugment for training dataset.",
        )
        group.add_argument(
            "--spec-aug-time-warp-factor",
            type=int,
            default=0,
            help="Used only when --enable-spec-aug is True. "
            "A value less than 1 means to disable time warp.",
        )

    def train_dataloaders(
        self, cuts_train: CutSet, sampler_state_dict: Optional[Dict[str, Any]] = None
    ) -> DataLoader:
        """Return batches of ``cuts_train``, from where ``sampler_state_dict`` was."""
        input_transforms = []
        if self.args.enable_spec_aug:
            logging.info("Enable SpecAugment")
            input_transforms.append(
                SpecAugment(
                    time_warp_factor=self.args.spec_aug_time_warp_factor,
                    num_frame_masks=2,
                    features_mask_size=8,
                    num_feature_masks=2,
                    frames_mask_size=20,
                )
            )
        else:
            logging.info("Disable SpecAugment")
        train = K2SpeechRecognitionDataset(
            input_transforms=input_transforms, return_cuts=self.args.return_cuts
        )
        train = kd.wrap_dataset(train, cuts_train)
        if isinstance(train, K2SpeechRecognitionDataset):  # no teacher has targets
            check_transcripts(cuts_train)
        train_sampler = DynamicBucketingSampler(
            cuts_train,
            max_duration=self.args.max_duration,
            shuffle=self.args.shuffle,
            num_buckets=self.args.num_buckets,
            drop_last=self.args.drop_last,
        )
        if sampler_state_dict is not None:
            logging.info("Loading sampler state dict")
            train_sampler.load_state_dict(sampler_state_dict)
        seed = torch.randint(0, 100000, ()).item()
        return DataLoader(
            train,
            sampler=train_sampler,
            batch_size=None,
            num_workers=self.args.num_workers,
            worker_init_fn=_SeedWorkers(seed),
        )

    def valid_dataloaders(self, cuts_valid: CutSet) -> DataLoader:
        """Return batches of ``cuts_valid``."""
        return self.test_dataloaders(cuts_valid)

    def test_dataloaders(self, cuts: CutSet) -> DataLoader:
        """Return batches of ``cuts``."""
        sampler = DynamicBucketingSampler(
            cuts, max_duration=self.args.max_duration, shuffle=False, num_buckets=2
        )
        return DataLoader(
            K2SpeechRecognitionDataset(return_cuts=self.args.return_cuts),
            sampler=sampler,
            batch_size=None,
            num_workers=self.args.num_workers,
        )

    def cuts(self, name: str) -> CutSet:
        """Return the cut set ``name`` of the manifest folder."""
        path = self.args.manifest_dir / f"cuts_{name}.jsonl.gz"
        if not path.is_file():
            raise KDError(
                f"the manifest {path} does not exist: run the stages before "
                "this one, or mend --manifest-dir"
            )
        logging.info(f"About to get {name} cuts from {path}")
        return CutSet.from_file(path)

    def train_cuts(self) -> CutSet:
        names = self.args.train_set.split(",")
        cuts = self.cuts(names[0]).to_eager()
        for name in names[1:]:
            cuts = cuts + self.cuts(name).to_eager()
        return cuts

    def dev_cuts(self) -> CutSet:
        return self.cuts("dev")

    def test_cuts(self) -> CutSet:
        return self.cuts("test")


def check_transcripts(cuts: CutSet) -> None:
    """Refuse cuts without transcripts, which only targets can teach on."""
    for c in cuts:
        if has_no_text(c):
            raise KDError(
                f"the cut {c.id} has an empty text and must have a transcript: mend it "
                "or leave it out of the training cuts"
            )


def check_cuts(cuts: CutSet, sp: spm.SentencePieceProcessor) -> float:
    """Refuse cuts that the losses can't take; return their duration in seconds."""
    total = 0.0
    for c in cuts:
        problem = ""
        if len(c.supervisions) != 1:
            problem = f"has {len(c.supervisions)} supervisions and must have 1"
        elif not has_no_text(c):
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
