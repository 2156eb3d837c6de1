"""What is read from training logs."""

import math

import pytest

from icefall_kd.report.logs import read_entries, read_training

KD = {"kd_ctc_weight": 1.0, "kd_hard_weight": 0.5, "num_epochs": 3}


def test_a_folder_without_training_logs_has_no_training(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "stage-7").write_text("Epoch 1, batch 0")
    assert read_training(tmp_path) is None


def test_settings_and_parameters_are_those_of_the_log(write_training, batch):
    exp = write_training(
        "Number of model parameters: 401250",
        batch(1, 0),
        settings={"best_valid_loss": math.inf, "base_lr": 0.045, "env_info": {"a": 1}},
    )
    found = read_training(exp)
    assert found.parameters == 401250
    assert found.settings["base_lr"] == 0.045
    assert found.settings["env_info"] == {"a": 1}


def test_an_older_icefall_prints_its_settings_as_a_python_dictionary(write_training):
    exp = write_training(
        settings="{'best_train_loss': inf, 'base_lr': 0.05, "
        "'exp_dir': PosixPath('zipformer/exp'), 'full_libri': True, 'x': 'a, b'}"
    )
    settings = read_training(exp).settings
    assert settings["base_lr"] == 0.05
    assert settings["full_libri"] is True
    assert settings["x"] == "a, b"


def test_epochs_run_from_0_by_the_largest_batch_of_an_epoch_so_far(
    write_training, batch
):
    lines = [batch(1, 0), batch(1, 50), batch(1, 100), batch(2, 0), batch(2, 25)]
    found = read_training(write_training(*lines)).losses()
    assert list(found) == ["loss", "ctc_loss"]
    # The second epoch has just begun, and its first mean is of a single batch.
    assert found["loss"] == [(0.0, 1.5), (0.5, 1.5), (1.0, 1.5), (1.25, 1.5)]


def test_training_losses_are_the_means_and_not_the_batch(write_training, batch):
    exp = write_training(batch(1, 5, tot="loss=2.5", own="loss=9.5"))
    assert read_training(exp).losses() == {"loss": [(1.0, 2.5)]}


def test_a_validation_stands_at_the_batch_before_it(write_training, batch, validation):
    exp = write_training(
        batch(1, 0), validation(1), batch(1, 8), batch(2, 2), validation(2, "loss=0.5")
    )
    found = read_training(exp).valid_losses()
    assert found == {"loss": [(0.0, 0.75), (1.25, 0.5)], "ctc_loss": [(0.0, 1.25)]}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_stays_in_its_place(write_training, batch, value):
    exp = write_training(
        batch(1, 0), batch(1, 1, f"loss={value}, ctc_loss=1e-05"), batch(1, 2)
    )
    found = read_training(exp).losses()
    assert len(found["loss"]) == 3 and str(found["loss"][1][1]) == value
    assert found["ctc_loss"][1] == (0.5, 1e-05)


def test_a_last_line_cut_short_is_no_batch(write_training, batch):
    whole = batch(1, 2)
    for end in (whole[:60], whole[: whole.index("tot_loss") + 14]):
        tail = f"2025-03-04 08:00:09,000 INFO [train.py:12] {end}"
        exp = write_training(batch(1, 0), batch(1, 1), tail=tail)
        assert [b.batch for b in read_training(exp).batches] == [0, 1]


def test_a_validation_cut_short_does_not_count(write_training, batch, validation):
    tail = "2025-03-04 08:00:09,000 INFO [train.py:12] " + validation(1)[:30]
    exp = write_training(batch(1, 0), tail=tail)
    assert read_training(exp).validations == []


def test_where_two_starts_overlap_the_later_one_counts(
    write_training, batch, validation
):
    write_training(
        batch(1, 0, "loss=4"),
        batch(1, 50, "loss=3"),
        batch(2, 0, "loss=2.9"),
        batch(2, 50, "loss=2.8"),
        validation(2, "loss=7"),
        date="2025-03-04-05-06-07",
    )
    exp = write_training(
        batch(2, 0, "loss=2"),
        batch(2, 50, "loss=1"),
        date="2025-03-05-00-00-00",
    )
    found = read_training(exp)
    losses = [(b.epoch, b.batch, b.losses["loss"]) for b in found.batches]
    assert losses == [(1, 0, 4), (1, 50, 3), (2, 0, 2), (2, 50, 1)]
    assert found.validations == []


def test_a_start_that_failed_before_any_batch_changes_nothing(write_training, batch):
    write_training(batch(1, 0), settings={"base_lr": 0.045})
    exp = write_training(settings={"base_lr": 9.0}, date="2026-01-01-00-00-00")
    found = read_training(exp)
    assert found.settings == {"base_lr": 0.045}
    assert len(found.batches) == 1


def test_of_several_processes_that_of_rank_0_is_read(write_training, batch):
    write_training(batch(1, 0, "loss=1"), rank="(0/2) ", settings=KD)
    exp = write_training(batch(1, 0, "loss=2"), rank="(1/2) ", settings=KD)
    found = read_training(exp)
    assert [b.losses for b in found.batches] == [{"loss": 1.0}]
    assert found.settings == KD


@pytest.mark.parametrize(
    "settings, distils",
    [
        ({}, None),
        ({"base_lr": 0.045}, False),
        ({"kd_ctc_weight": 0.0, "kd_hard_weight": 1.0, "kd_nbest_weight": None}, False),
        ({"kd_ctc_weight": 0.0, "kd_hidden_weight": 0.1}, True),
        ({"kd_rnnt_weight": "0:0,2:0.5"}, True),
        ({"kd_rnnt_weight": "0:0,2:0"}, False),
    ],
)
def test_distillation_is_on_where_a_kd_weight_is_above_0(
    write_training, batch, settings, distils
):
    assert read_training(write_training(batch(1, 0), settings=settings)).distils == (
        distils
    )


def test_weights_that_stand_still_are_those_of_the_settings(write_training, batch):
    exp = write_training(batch(1, 0), batch(1, 4), settings=KD)
    assert read_training(exp).weights() == {
        "hard": [(0.0, 0.5), (1.0, 0.5)],
        "ctc": [(0.0, 1.0), (1.0, 1.0)],
    }


def test_weights_that_move_are_those_of_the_batch_and_not_of_its_mean(
    write_training, batch
):
    own = "kd_ctc_loss=0.1, kd_ctc_weight={}, kd_full_sum_weight=0.25, loss=1"
    mean = "kd_ctc_loss=0.1, kd_ctc_weight=0.9, kd_full_sum_weight=0.9, loss=1"
    exp = write_training(
        batch(1, 0, mean, own.format(0)),
        batch(1, 10, mean, own.format("0.75")),
        settings={**KD, "kd_ctc_weight": "0:0,1:1"},
    )
    found = read_training(exp)
    weights = found.weights()
    assert weights["ctc"] == [(0.0, 0.0), (1.0, 0.75)]
    assert weights["full_sum"] == [(0.0, 0.25), (1.0, 0.25)]
    assert weights["hard"] == [(0.0, 0.5), (1.0, 0.5)]
    assert list(weights) == ["hard", "ctc", "full_sum"]
    assert list(found.losses()) == ["kd_ctc_loss", "loss"]


def test_a_training_without_distillation_has_no_weights(write_training, batch):
    exp = write_training(batch(1, 0), settings={"kd_hard_weight": 1.0})
    assert read_training(exp).weights() == {}


def test_a_message_of_several_lines_is_one_record(tmp_path):
    path = tmp_path / "log"
    path.write_text(
        "half a line\n2025-03-04 08:00:00,250 INFO [a.py:1] \nFor test, WER of:\nx\t1\n"
        "2025-03-04 08:00:01,500 WARNING [b.py:1] (0/2) next\n"
    )
    (first, text), (second, other) = read_entries(path)
    assert text == "\nFor test, WER of:\nx\t1"
    assert other == "next"
    assert (second - first).total_seconds() == 1.25


def test_a_student_that_is_fine_tuned_on_hard_labels_was_distilled(
    write_training, batch
):
    """Warm-up, distillation and fine-tuning are three starts in one folder."""
    off = {**KD, "kd_ctc_weight": 0.0, "kd_hard_weight": 1.0}
    write_training(batch(2, 0), batch(2, 9), settings=off)
    write_training(*(batch(3, 0), batch(3, 9)), settings=KD, date="2025-03-04-06-00-00")
    late = {"settings": off, "date": "2025-03-04-07-00-00"}
    found = read_training(write_training(batch(4, 0), batch(4, 9), **late))
    assert found.distils and found.kd_settings["kd_ctc_weight"] == 1.0
    assert found.settings["kd_ctc_weight"] == 0.0
    assert [w for _, w in found.weights()["ctc"]] == [0, 0, 1, 1, 0, 0]
    # Trained again from the warm-up without it, nothing of it is left.
    late["date"] = "2025-03-04-08-00-00"
    again = read_training(write_training(batch(3, 0), batch(3, 9), **late))
    assert not again.distils


def test_an_entry_of_a_date_that_there_is_not_is_left_out_and_counted(
    write_training, batch
):
    good = f"2025-03-04 08:00:02,000 INFO [train.py:1] {batch(1, 50)}\n"
    bad = f"2025-02-30 08:00:01,000 INFO [train.py:1] {batch(1, 0)}\nmore of it\n"
    found = read_training(write_training(tail=bad + good))
    assert [b.batch for b in found.batches] == [50] and found.skipped == 1


def saved(name, hidden=""):
    return f"Saving checkpoint to zipformer/exp/{hidden}{name}.pt"


def test_seconds_run_from_the_first_entry_to_each_checkpoint(
    write_training, batch, validation
):
    exp = write_training(
        (5, batch(1, 0)),
        (20, saved("checkpoint-4000")),
        (30, batch(1, 50)),
        (34, saved("epoch-1", ".tmp.")),
        (34, saved("best-train-loss")),
        (40, batch(2, 0)),
        (44, validation(2)),
    )
    training = read_training(exp)
    assert training.seconds == 44
    assert training.seconds_until("checkpoint-4000") == 20
    assert training.seconds_until("epoch-1") == 34
    assert training.seconds_until("epoch-2") == 44  # not saved: its last line
    assert training.seconds_until("epoch-3") is None
    assert training.seconds_until("checkpoint-8000") is None


def test_neither_a_pause_counts_nor_batches_that_were_lost(write_training, batch):
    write_training(
        (10, batch(1, 0)),
        (60, batch(1, 50)),
        (70, saved("epoch-1")),
        (80, batch(2, 0)),
        (900, batch(2, 50)),  # trained again by the next start
        date="2025-01-01-00-00-00",
    )
    exp = write_training(
        (1000, "Loading checkpoint from zipformer/exp/epoch-1.pt"),
        (7, batch(2, 0)),
        (27, batch(2, 50)),
        (30, saved("epoch-2")),
        date="2025-01-02-00-00-00",
    )
    training = read_training(exp)
    assert training.seconds_until("epoch-1") == 70
    assert training.seconds_until("epoch-2") == training.seconds == 100


def test_a_start_within_an_epoch_goes_on_with_the_seconds_so_far(write_training, batch):
    write_training(
        *((10, batch(1, 0)), (60, batch(1, 50)), (80, saved("checkpoint-80"))),
        (90, batch(1, 100)),
        date="2025-01-01-00-00-00",
    )
    exp = write_training((5, batch(1, 100)), date="2025-01-02-00-00-00")
    training = read_training(exp)
    assert training.seconds == 85
    assert [line.seconds for line in training.batches] == [10, 60, 85]


def test_the_steps_that_logs_tell_are_those_of_their_last_lines(write_training, batch):
    exp = write_training(*(batch(e, n) for e in (2, 3) for n in (0, 50, 100)))
    training = read_training(exp)
    assert training.least_steps(2) == 101
    assert training.least_steps(3) == training.least_steps(9) == 202
    assert training.least_steps(1) == 0
