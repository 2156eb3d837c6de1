"""The end of a training: dev_wer.py of the digits recipe, without any training."""

import sys
from types import SimpleNamespace

import pytest
import torch

from icefall_kd.errors import KDError

HEADER = "epoch,steps,seconds,ctc,transducer\n"


@pytest.fixture
def dev_wer(recipe):
    return sys.modules[recipe.is_over.__module__]


@pytest.fixture
def rows_of(dev_wer):
    """Rows of epochs from 2 on, with these WERs of both heads."""

    def make(*means):
        return [dev_wer.DevWer(n, 10 * n, n, w, w) for n, w in enumerate(means, 2)]

    return make


@pytest.mark.parametrize(
    "means, patience, over",
    [
        ([], 1, False),
        ([50], 1, False),
        ([50, 40], 1, False),
        ([50, 60], 1, True),
        ([50, 50], 1, True),  # as good is no better
        ([50, 60], 2, False),
        ([50, 60, 55], 2, True),
        ([50, 60, 49], 2, False),
        ([50, 60, 49, 70, 48.99, 80], 2, False),
        ([50, 60, 70, 80], 3, True),
        ([100, 100, 100, 100], 1, False),  # it has not begun to output words
        ([97, 98, 95, 96], 1, False),
        ([97, 98, 89, 96], 1, True),
    ],
)
def test_a_training_is_over_when_no_late_epoch_is_better(
    dev_wer, rows_of, means, patience, over
):
    assert dev_wer.is_over(rows_of(*means), patience) is over


def test_the_best_epoch_is_the_first_of_equal_means_of_both_heads(dev_wer):
    rows = [
        dev_wer.DevWer(2, 0, 0, 30, 10),
        dev_wer.DevWer(3, 0, 0, 9, 30),
        dev_wer.DevWer(4, 0, 0, 19, 20),
    ]
    assert dev_wer.best_of(rows).epoch == 3
    assert rows[0].mean == 20


def test_as_many_epochs_are_averaged_as_there_are(dev_wer):
    assert [dev_wer.num_averaged(epoch, 3) for epoch in (2, 3, 4, 5, 60)] == [
        1,
        2,
        3,
        3,
        3,
    ]


def test_rows_are_read_as_they_were_written(dev_wer, rows_of, tmp_path):
    assert dev_wer.read_dev_wers(tmp_path) == []
    rows = rows_of(100, 33.33, 50.05)
    dev_wer.write_dev_wers(tmp_path, rows)
    assert dev_wer.read_dev_wers(tmp_path) == rows
    assert (tmp_path / "best-epoch").read_text() == "3\n"
    assert {p.name for p in tmp_path.iterdir()} == {"best-epoch", "dev-wer.csv"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epoch,steps\n2,10\n",
        HEADER.replace("ctc,", ""),
        HEADER + "2,10,1.0,50.00\n",
        HEADER + "2,10,1.0,50.00,50.00,7\n",
        HEADER + "2,10,1.0,50.00,x\n",
        HEADER + "2.5,10,1.0,50.00,50.00\n",
        HEADER + "2,10,1.0,nan,50.00\n",
        HEADER + "2,10,1.0,inf,50.00\n",
        HEADER + "2,10,-1.0,50.00,50.00\n",
        HEADER + "3,10,1.0,50.00,50.00\n2,10,1.0,50.00,50.00\n",
        HEADER + "2,10,1.0,50.00,50.00\n2,10,1.0,50.00,50.00\n",
        "\0\0",
    ],
)
def test_a_damaged_file_is_refused_and_named(dev_wer, tmp_path, text):
    (tmp_path / "dev-wer.csv").write_text(text)
    with pytest.raises(KDError, match="dev-wer.csv is damaged .*: remove it"):
        dev_wer.read_dev_wers(tmp_path)


def test_bytes_that_are_no_text_are_refused(dev_wer, tmp_path):
    (tmp_path / "dev-wer.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KDError, match="dev-wer.csv is damaged"):
        dev_wer.read_dev_wers(tmp_path)


class Model:
    """What decode_dev calls of a model."""

    def parameters(self):
        yield torch.zeros(1)

    def forward_encoder(self, x, lens):
        return x, lens

    def ctc_output(self, out):
        return out


@pytest.fixture
def decode(dev_wer, monkeypatch):
    """The WERs of what both heads output for given references, two to a batch."""
    sp = SimpleNamespace(
        piece_to_id=lambda piece: 0, decode=lambda hyps: [" ".join(h) for h in hyps]
    )

    def run(references, ctc, transducer):
        ctc, transducer = ([text.split() for text in x] for x in (ctc, transducer))
        made = []

        class Search:
            def __init__(self, model):
                made.append(model)

            def __call__(self, encoder_out, lens):
                found = [SimpleNamespace(tokens=transducer.pop(0)) for _ in lens]
                return SimpleNamespace(hypotheses=found)

        greedy = sys.modules[dev_wer.Recogniser.__module__]
        monkeypatch.setattr(
            greedy, "ctc_greedy", lambda out, lens, blank: [ctc.pop(0) for _ in lens]
        )
        monkeypatch.setattr(greedy, "GreedySearch", Search)
        batches = [
            {
                "inputs": torch.zeros(len(part), 4, 2),
                "supervisions": {
                    "num_frames": torch.tensor([4] * len(part)),
                    "text": part,
                },
            }
            for part in (references[:2], references[2:])
            if part
        ]
        wers = dev_wer.decode_dev(Model(), batches, sp)
        assert len(made) == 1  # tables are made once, not for each batch
        return wers

    return run


def test_wers_count_the_errors_of_all_dev_cuts(decode):
    references = ["a b", "c d e", "f g h i j"]
    ctc = ["a", "c d e", "f g x i j"]  # one missing, one wrong
    transducer = ["a b b", "c d e", "f g h i j"]  # one too many
    assert decode(references, ctc, transducer) == (20.0, 10.0)


def test_dev_cuts_without_words_are_refused(decode):
    with pytest.raises(KDError, match="no words"):
        decode(["", ""], ["", ""], ["", ""])


@pytest.fixture
def until(dev_wer, monkeypatch, tmp_path):
    """dev_wers_until of an epoch with given WERs; its calls are counted."""
    loaded = []

    def run(epoch, wers=(50.0, 40.0), avg=3, **more):
        def load_model(folder, exp_dir, epoch, iteration, avg, averaged):
            loaded.append((epoch, avg))
            assert (exp_dir, iteration, averaged) == (tmp_path, 0, True)
            assert (folder / "train.py").is_file()
            return None, {}

        monkeypatch.setattr(dev_wer, "load_model", load_model)
        monkeypatch.setattr(dev_wer, "decode_dev", lambda *_: wers)
        params = SimpleNamespace(
            exp_dir=tmp_path, cur_epoch=epoch, avg=avg, batch_idx_train=10 * epoch
        )
        params.train_seconds = more.get("seconds", 1.25 * epoch)
        return dev_wer.dev_wers_until(params, None, None, more.get("anew", True))

    run.loaded = loaded
    return run


def test_each_epoch_from_the_second_on_is_decoded(until, dev_wer, tmp_path):
    assert until(0) == until(1) == [] and list(tmp_path.iterdir()) == []
    assert until(2) == [dev_wer.DevWer(2, 20, 2.5, 50.0, 40.0)]
    assert len(until(3)) == 2 and until.loaded == [(2, 1), (3, 2)]
    assert len(until(3, anew=False)) == 2 and len(until.loaded) == 2
    assert len(until(4, anew=False)) == 3 and until.loaded[-1] == (4, 3)
    until(7)
    assert until.loaded[-1] == (7, 3)


def test_a_row_has_the_seconds_of_training_and_rounded_rates(until, dev_wer, tmp_path):
    (row,) = until(2, wers=(100 / 3, 200 / 3), seconds=7.0499)
    assert row == dev_wer.DevWer(2, 20, 7.0, 33.33, 66.67)
    assert dev_wer.read_dev_wers(tmp_path) == [row]


def test_rows_of_later_epochs_are_forgotten_when_one_is_trained_again(until):
    for epoch in (2, 3, 4):
        until(epoch)
    first, again = until(3, wers=(9.0, 9.0))
    assert (first.epoch, again.epoch, again.mean) == (2, 3, 9.0)


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--patience", "2", "--world-size", "2"],
            "--world-size 2: give --world-size 1",
        ),
        (["--patience", "-1"], "--patience is -1"),
        (["--patience", "1", "--avg", "0"], "--avg 0"),
    ],
)
def test_what_can_not_end_a_training_is_refused(
    recipe, monkeypatch, tmp_path, words, said
):
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--exp-dir", str(tmp_path / "exp"), *words]
    )
    monkeypatch.setattr(recipe, "run", None)
    with pytest.raises(KDError) as refused:
        recipe.main()
    assert said in str(refused.value) and list(tmp_path.iterdir()) == []
