"""The number of steps of a checkpoint, without its tensors."""

import pickle

import pytest
import torch

from icefall_kd.report.checkpoints import read_steps


def test_the_steps_are_those_of_batch_idx_train(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sampler": torch.Generator(),  # some object
        "batch_idx_train": 4321,
        "best_valid_loss": float("inf"),
    }
    content["sampler"] = torch.Size([1])
    torch.save(content, tmp_path / "epoch-1.pt")
    assert read_steps(tmp_path / "epoch-1.pt") == 4321


class Boom:
    def __reduce__(self):
        return print, ("run by a pickle",)


def test_nothing_of_the_file_is_run(tmp_path, capsys):
    torch.save({"x": Boom(), "batch_idx_train": 7}, tmp_path / "epoch-1.pt")
    assert read_steps(tmp_path / "epoch-1.pt") == 7
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [{"model": 1}, {"batch_idx_train": "x"}, [1, 2]])
def test_a_checkpoint_without_steps_has_none(tmp_path, content):
    torch.save(content, tmp_path / "epoch-1.pt")
    assert read_steps(tmp_path / "epoch-1.pt") is None


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_damaged_or_missing_checkpoint_has_none(tmp_path, cut):
    path = tmp_path / "epoch-1.pt"
    assert read_steps(path) is None
    torch.save({"batch_idx_train": 7}, path)
    path.write_bytes(path.read_bytes()[:cut])
    assert read_steps(path) is None
    path.write_bytes(pickle.dumps({"batch_idx_train": 7}))  # no zip file
    assert read_steps(path) is None
