"""A recipe in miniature, and what the tests of ``icefall-kd plug`` do with it.

It is written here; what is like icefall's in it is its shape.
"""

import pytest

from icefall_kd.errors import KDError
from icefall_kd.plug.lines import IMPORT, plug_data_module, plug_train

TRAIN = '''\
#!/usr/bin/env python3
"""A recipe in miniature."""
import argparse
import copy
from asr_datamodule import ToyDataModule

from utils import (
    MetricsTracker,
    get_parameter_groups_with_lrs,
)

SIZE = 3


def get_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default=SIZE)   # odd spacing stays

    return parser


def get_params():
    return {"batch_idx_train": 0}


def get_model(params):
    return params


def compute_loss(params, model, sp, batch, is_training):
    feature = batch["inputs"]
    texts = batch["supervisions"]["text"]
    with grad(is_training):
        losses = model(x=feature, y=sp.encode(texts))
        loss = 0.0
        for one in losses[:3]:
            loss += one

    assert loss.requires_grad == is_training

    info = MetricsTracker()
    info["frames"] = 3
    # Summed, not averaged.
    info["loss"] = loss.detach().cpu().item()

    return loss, info


def run(rank, world_size, args):
    params = get_params()
    params.update(vars(args))
    model = get_model(params)
    model_avg = copy.deepcopy(model)
    if world_size > 1:
        model = DDP(model, device_ids=[rank], find_unused_parameters=True)

    optimizer = ScaledAdam(
        get_parameter_groups_with_lrs(model, lr=0.1, include_names=True),
        lr=0.1,  # no effect
    )
    toy = ToyDataModule(args)
    train_dl = toy.train_dataloaders(toy.train_cuts())


def main():
    parser = get_parser()
    ToyDataModule.add_arguments(parser)
    args = parser.parse_args()


if __name__ == "__main__":
    main()
'''

DATA = """\
import logging
from torch.utils.data import DataLoader


class ToyDataModule:
    @classmethod
    def add_arguments(cls, parser):
        pass

    def train_dataloaders(self, cuts_train, sampler_state_dict=None):
        transforms = []
        train = Dataset(cut_transforms=transforms)
        if self.args.on_the_fly_feats:
            train = Dataset(cut_transforms=transforms, on_the_fly=True)

        if self.args.bucketing_sampler:
            train_sampler = DynamicBucketingSampler(cuts_train, shuffle=True)
        else:
            train_sampler = SimpleCutSampler(cuts_train)
        logging.info("About to create train dataloader")
        train_dl = DataLoader(train, sampler=train_sampler, batch_size=None)
        return train_dl

    def valid_dataloaders(self, cuts_valid):
        valid = Dataset()
        return DataLoader(valid, sampler=SimpleCutSampler(cuts_valid))
"""
UTILS = """\
MetricsTracker = dict


def get_parameter_groups_with_lrs(model, lr, include_names):
    return []
"""
DECODE = """\
#!/usr/bin/env python3
import sys

import train
from train import get_params

if __name__ == "__main__":
    print(train.__file__, sys.modules["asr_datamodule"].__file__)
"""
# Run as scripts, the files of the toy need no torch and no session.
STUBS = {
    "torch/utils/data/__init__.py": "DataLoader = None\n",
    "torch/utils/__init__.py": "",
    "torch/__init__.py": "",
    "icefall_kd/__init__.py": "",
    "icefall_kd/training/__init__.py": "",
    "icefall_kd/training/session.py": "def add_arguments(parser):\n"
    "    parser.add_argument('--kd-ctc-weight')\n",
}
TRAIN_LINES = [
    IMPORT,
    "    kd.add_arguments(parser)",
    "    kd.begin(batch)",
    "    loss = kd.joint_loss(loss, info, model, batch)",
    "    kd.attach(params, model)",
]
DATA_LINES = [IMPORT, "        train = kd.wrap_dataset(train, cuts_train)"]


def replaced(text, old, new):
    assert text.count(old) == 1, (text.count(old), old)
    return text.replace(old, new)


def train_of(*changes):
    text = TRAIN
    for old, new in changes:
        text = replaced(text, old, new)
    return text


def data_of(*changes):
    text = DATA
    for old, new in changes:
        text = replaced(text, old, new)
    return text


def plugged(text, path="train.py"):
    return plug_train(text.encode(), path).decode()


def wrapped(text, path="asr_datamodule.py"):
    return plug_data_module(text.encode(), path, ["ToyDataModule"]).decode()


def as_formerly_plugged(text):
    """A plugged file as a former version wrote it."""
    assert text.count(IMPORT) == 1
    return text.replace(IMPORT, "from icefall_kd.recipe import session as kd").replace(
        "    kd.begin(batch)\n", ""
    )


def added(before, after):
    """The inserted lines, in order; all others must be there unchanged."""
    rest = iter(after.splitlines(keepends=True))
    lines = []
    for line in before.splitlines(keepends=True):
        for found in rest:
            if found == line:
                break
            lines.append(found.rstrip("\r\n"))
        else:
            raise AssertionError(f"lost or changed: {line!r}")
    return lines + [line.rstrip("\r\n") for line in rest]


def follows(text, first, second):
    """Whether the line ``second`` stands right behind the line ``first``."""
    lines = text.splitlines()
    return lines[lines.index(first) + 1] == second


def refused(call, *parts):
    with pytest.raises(KDError) as caught:
        call()
    sentence = caught.value.sentence
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence, sentence
    return sentence
