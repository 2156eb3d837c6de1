"""How many epochs are done, and kd.pt: when it is written, and when it is read."""

import atexit
import math

import pytest
import torch
from lhotse import CutSet
from lhotse.dataset import K2SpeechRecognitionDataset

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import hidden_rows
from icefall_kd.losses.hidden import hidden_kd_loss
from icefall_kd.terms.hidden import parse_layers
from icefall_kd.terms.projectors import Projectors
from icefall_kd.training import checkpoint as checkpoint_module
from icefall_kd.training import clock as clock_module
from icefall_kd.training import distillation, session
from icefall_kd.training.checkpoint import KDCheckpoint
from icefall_kd.training.clock import EpochClock
from icefall_kd.training.freezing import Freezing
from icefall_kd.types import EncoderOut, Targets


class Training:
    """A training's clock, and the file of what it keeps."""

    def __init__(self, params):
        self.params = params
        self.clock = EpochClock(params)
        self.checkpoint = KDCheckpoint(params, self.clock)

    def keep(self, hidden):
        """Begin to write the file, with these projectors."""
        if hidden is not None:
            self.checkpoint.register("hidden", hidden, "projectors")
        self.checkpoint.start()


@pytest.fixture
def begin(tmp_path):
    """A training in one folder, from its first epoch unless told."""
    opened = []

    def make(**params):
        params = {"exp_dir": tmp_path, "num_epochs": 10, "start_epoch": 1, **params}
        opened.append(Training(params))
        return opened[-1]

    yield make
    for training in opened:
        training.checkpoint.close()


@pytest.fixture
def processes(monkeypatch):
    def set_to(rank, world_size):
        for module in (checkpoint_module, clock_module):
            monkeypatch.setattr(
                module, "rank_and_world_size", lambda: (rank, world_size)
            )

    return set_to


def see(progress, epoch, *batches):
    """The epochs done before each batch of so many cuts."""
    progress.clock.params["cur_epoch"] = epoch
    return [progress.clock.count(cuts) for cuts in batches]


def layers(lr=1e-3):
    return Projectors(parse_layers("out"), lr=lr)


def learn(hidden, steps=1):
    """Let a projector from 5 to 8 channels learn; return its parameters."""
    g = torch.Generator().manual_seed(0)
    lens = torch.tensor([7, 4])
    said = EncoderOut(torch.randn(2, 7, 5, generator=g, requires_grad=True), lens)
    teacher = torch.randn(2, 7, 1, 8, generator=g)
    hidden.build(said, {"out": teacher})
    for _ in range(steps):
        rows = hidden.between(("out", "out"))(hidden_rows(said, "out"))
        hidden_kd_loss(rows, teacher, lens).backward()
        hidden.step()
    return [p.detach().clone() for p in hidden.modules.parameters()]


def kept(progress, hidden=None):
    """Train a batch and write the file, as validation does."""
    progress.keep(hidden)
    see(progress, progress.clock.first_epoch, 1)
    progress.checkpoint.save()


# Epochs


def test_an_epochs_fraction_is_that_of_its_cuts(begin):
    progress = begin()
    progress.clock.cuts_per_epoch = 20
    assert see(progress, 1, 5, 5, 8, 2) == [0, 0.25, 0.5, 0.9]
    assert see(progress, 2, 10, 10) == [1, 1.5]
    assert see(progress, 3, 4) == [2]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_processes_see_as_many_cuts(begin, processes, world_size):
    processes(world_size - 1, world_size)
    progress = begin()
    progress.clock.cuts_per_epoch = 40
    assert see(progress, 1, 5, 5) == [0, 5 * world_size / 40]


def test_where_the_number_of_cuts_is_unknown_the_epoch_before_tells(begin):
    progress = begin()
    assert see(progress, 1, 3, 3, 2) == [0, 0, 0]
    assert see(progress, 2, 4, 4) == [1, 1.5]


def test_the_number_seen_goes_before_the_number_in_the_manifest(begin):
    """Recipes leave out cuts that are too long."""
    progress = begin()
    progress.clock.cuts_per_epoch = 16
    see(progress, 1, 4, 4)
    assert see(progress, 2, 4, 4) == [1, 1.5]


def test_a_fraction_stays_below_the_epochs_end(begin):
    progress = begin()
    progress.clock.cuts_per_epoch = 4
    assert see(progress, 1, 4, 4, 4) == [0, 1, 1]


def test_epochs_count_from_where_distillation_began(begin):
    progress = begin(start_epoch=5)
    progress.clock.cuts_per_epoch = 8
    assert see(progress, 5, 2, 2) == [0, 0.25]
    assert see(progress, 7, 2) == [2]


@pytest.mark.parametrize(
    "start, last, expected", [(1, 10, 10), (2, 4, 3), (10, 10, 1), (11, 10, 1)]
)
def test_the_number_of_epochs_is_of_distillation(begin, start, last, expected):
    assert begin(start_epoch=start, num_epochs=last).clock.num_epochs == expected


@pytest.mark.parametrize("params", [{"num_epochs": None}, {"num_epochs": 0}])
def test_a_recipe_that_does_not_say_trains_for_ever(begin, params):
    assert begin(**params).clock.num_epochs == math.inf


def test_batches_before_the_first_epoch_are_of_the_one_that_comes(begin):
    """icefall tries the largest batches first, with no cur_epoch yet."""
    kept(begin(start_epoch=2))
    progress = begin(start_epoch=6)
    progress.clock.cuts_per_epoch = 100
    assert progress.clock.first_epoch == 2 and [
        progress.clock.count(30),
        progress.clock.count(9),
    ] == [4, 4]
    assert see(progress, 6, 5, 5) == [4, 4.05]
    assert progress.clock.cuts_per_epoch == 100


def test_the_rest_of_an_epoch_does_not_tell_its_length(begin):
    progress = begin(start_batch=70)
    progress.clock.cuts_per_epoch = 100
    assert see(progress, 1, 10, 10) == [0, 0.1]
    assert see(progress, 2, 50, 20) == [1, 1.5]
    assert see(progress, 3, 50) == [2] and progress.clock.cuts_per_epoch == 70


# The file


def test_nothing_is_written_where_nothing_moves(begin, tmp_path):
    progress = begin()
    see(progress, 1, 3)
    progress.checkpoint.save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank, written", [(0, True), (1, False)])
def test_one_process_writes(begin, processes, tmp_path, rank, written):
    processes(rank, 2)
    kept(begin())
    assert (tmp_path / "kd.pt").is_file() == written
    assert [p.name for p in tmp_path.iterdir()] == ["kd.pt"] * written


def test_the_file_is_written_once_for_each_stretch_of_training(begin, tmp_path):
    """Validation calls for it at each of its batches."""
    progress, file = begin(), tmp_path / "kd.pt"
    progress.keep(None)
    progress.checkpoint.save()
    assert not file.exists()  # validation before any training
    see(progress, 1, 3)
    progress.checkpoint.save()
    file.unlink()
    progress.checkpoint.save()
    assert not file.exists()
    see(progress, 1, 3)
    progress.checkpoint.save()
    assert file.exists()


def test_a_folder_that_is_gone_is_left_alone(begin, tmp_path):
    progress = begin(exp_dir=tmp_path / "gone")
    kept(progress)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_a_folder_has_no_file(begin):
    kept(begin(exp_dir=None))


def test_close_ends_it(begin, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(atexit, "register", calls.append)
    monkeypatch.setattr(atexit, "unregister", calls.remove)
    progress = begin()
    progress.keep(None)
    assert calls == [progress.checkpoint.save]
    see(progress, 1, 3)
    progress.checkpoint.close()
    assert calls == []
    progress.checkpoint.save()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()


ENDS = """
import sys
from icefall_kd.training.checkpoint import KDCheckpoint
from icefall_kd.training.clock import EpochClock
from icefall_kd.training.freezing import Freezing
params = {"exp_dir": sys.argv[1], "num_epochs": 3, "start_epoch": 2}
clock = EpochClock(params)
checkpoint = KDCheckpoint(params, clock)
checkpoint.start()
params["cur_epoch"] = 2
clock.count(3)
if sys.argv[2] == "closed":
    checkpoint.close()
if sys.argv[2] == "failed":
    raise RuntimeError
"""


@pytest.mark.parametrize("how, written", [("", 1), ("failed", 1), ("closed", 0)])
def test_a_process_that_ends_leaves_the_file(run_python, begin, tmp_path, how, written):
    (tmp_path / "exp").mkdir()
    done = run_python(ENDS, tmp_path / "exp", how)
    assert (done.returncode == 0) == (how != "failed")
    assert [p.name for p in (tmp_path / "exp").iterdir()] == ["kd.pt"] * written
    if written:
        assert begin(exp_dir=tmp_path / "exp", start_epoch=3).clock.first_epoch == 2


# A training that goes on


@pytest.mark.parametrize("params", [{"start_epoch": 3}, {"start_batch": 40}])
def test_a_training_that_goes_on_counts_from_its_beginning(begin, params):
    kept(begin(start_epoch=2, num_epochs=9))
    progress = begin(**{"start_epoch": 2, "num_epochs": 9, **params})
    assert (progress.clock.first_epoch, progress.clock.num_epochs) == (2, 8)
    assert see(progress, 5, 1) == [3]


@pytest.mark.parametrize("params", [{"start_epoch": 2}, {"start_epoch": 1}])
def test_one_that_begins_anew_in_the_folder_does_not(begin, params):
    hidden = layers()
    learned = learn(hidden, 3)
    kept(begin(start_epoch=2), hidden)
    progress, fresh = begin(**params), layers()
    assert (
        progress.clock.first_epoch == params["start_epoch"]
        and progress.checkpoint.state == {}
    )
    kept(progress, fresh)
    assert not torch.equal(learn(fresh, 0)[0], learned[0])
    assert (
        begin(start_epoch=9).clock.first_epoch == params["start_epoch"]
    )  # the newer one's


def test_one_whose_file_is_gone_begins_there(begin):
    assert begin(start_epoch=4).clock.first_epoch == 4


def test_projectors_go_on_through_the_file(begin):
    hidden = layers(lr=0.05)
    learn(hidden, 3)
    kept(begin(), hidden)
    other, progress = layers(lr=0.05), begin(start_epoch=2)
    progress.keep(other)
    for steps in (0, 2):  # Adam's moments too
        for a, b in zip(learn(hidden, steps), learn(other, steps)):
            torch.testing.assert_close(a, b)
    assert not torch.equal(learn(other, 0)[0], learn(layers(), 0)[0])


def test_the_new_learning_rate_is_taken(begin):
    hidden = layers(lr=0.05)
    learn(hidden)
    kept(begin(), hidden)
    other = layers(lr=0.01)
    begin(start_epoch=2).keep(other)
    learn(other)
    assert other.optimizer.param_groups[0]["lr"] == 0.01


def test_other_processes_read_what_one_wrote(begin, processes):
    hidden = layers()
    learned = learn(hidden, 3)
    kept(begin(start_epoch=2), hidden)
    processes(1, 2)
    progress, other = begin(start_epoch=3), layers()
    progress.keep(other)
    assert progress.clock.first_epoch == 2 and not progress.checkpoint.is_written
    torch.testing.assert_close(learn(other, 0), learned)


def test_projectors_may_come_to_a_training_that_had_none(begin):
    kept(begin())
    progress, hidden = begin(start_epoch=2), layers()
    progress.keep(hidden)
    learn(hidden)
    see(progress, 2, 1)
    progress.checkpoint.save()
    assert begin(start_epoch=3).checkpoint.state["hidden"]["modules"]


def test_projectors_of_other_layers_are_refused(begin):
    hidden = layers()
    learn(hidden)
    kept(begin(), hidden)
    other = Projectors(parse_layers("2"))
    begin(start_epoch=2).keep(other)
    said = EncoderOut(
        torch.zeros(1, 2, 5),
        torch.tensor([2]),
        hidden={2: torch.zeros(1, 4, 5)},
        hidden_lens=torch.tensor([4]),
    )
    heard = Targets(torch.tensor([2]), parts={"hidden": {2: torch.zeros(1, 2, 2, 8)}})
    with pytest.raises(KDError, match="HiddenTerm.layers.*or remove kd.pt") as e:
        other.build(said, heard.parts["hidden"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "list", "bare", "word"])
def test_a_damaged_file_is_refused(begin, tmp_path, damage, start):
    kept(begin())
    file = tmp_path / "kd.pt"
    data = file.read_bytes()
    if damage in ("list", "bare", "word"):
        found = {"list": [1], "bare": {}, "word": {"first_epoch": "one"}}
        torch.save(found[damage], file)
    else:
        file.write_bytes({"empty": b"", "cut": data[:-9], "text": b"x" * 99}[damage])
    with pytest.raises(KDError, match="can't be read .*remove it to begin") as e:
        begin(start_epoch=start)
    assert str(file) in str(e.value) and "\n" not in str(e.value)


# In a session


@pytest.fixture
def attached(make_model, make_params, tmp_path):
    def attach(**changes):
        folder = {"exp_dir": tmp_path / "exp", "num_epochs": 4, "start_epoch": 1}
        folder["exp_dir"].mkdir(exist_ok=True)
        session.attach(make_params(**{**folder, **changes}), make_model())
        return session.current()

    return attach


@pytest.mark.parametrize(
    "changes, written",
    [
        ({}, False),
        ({"kd_schedule": "warmup"}, True),
        ({"kd_last_epochs": 1.0}, True),
        ({"kd_hard_weight": "0:1,3:0.5"}, True),
        ({"kd_ctc_weight": "3:0.5"}, False),  # a constant
        ({"kd_hidden_weight": 0.5, "kd_hidden_layers": "out"}, True),
        ({"kd_hidden_layers": "out"}, False),  # whose weight is 0
    ],
    ids=str,
)
def test_a_session_keeps_the_file_where_something_moves(
    attached, tmp_path, changes, written
):
    progress = attached(**changes)
    see(progress, 1, 3)
    progress.checkpoint.save()
    assert (tmp_path / "exp" / "kd.pt").exists() == written


def test_a_session_has_the_schedule_of_the_training_that_it_goes_on_with(attached):
    changes = {"kd_schedule": "warmup", "num_epochs": 21}
    first = attached(start_epoch=2, **changes)
    see(first, 2, 3)
    first.checkpoint.save()
    later = attached(start_epoch=6, **changes)
    assert later.distillation.joint.schedule.num_epochs == 20
    (done,) = see(later, 6, 3)
    assert done == 4 and later.distillation.joint.weights(done)["ctc"] == 0.7
    assert later.distillation.joint.weights(3.5)["ctc"] == pytest.approx(0.35)


def test_attaching_again_ends_the_first_sessions_file(attached, tmp_path):
    first = attached(kd_schedule="warmup")
    attached()
    see(first, 1, 3)
    first.checkpoint.save()
    assert not (tmp_path / "exp" / "kd.pt").exists()


def test_the_dataset_tells_how_many_cuts_an_epoch_has(attached, make_cut, make_store):
    cuts = make_store([make_cut(name, 33) for name in "abcde"])
    found = attached()
    session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    assert (
        found.clock.cuts_per_epoch == 5
        and not found.distillation.has_untranscribed_cuts
    )


def test_a_shar_does_not_tell(attached, make_cut, make_store, monkeypatch):
    """Of which the first cuts are read alone."""
    monkeypatch.setattr("icefall_kd.targets.first_look.SAMPLE", 3)
    (stored,) = make_store([make_cut("a", 33)])
    cuts = [stored.with_id(name) for name in "abcde"]
    for cut in cuts:
        cut.custom = {**cut.custom, "shard_origin": "x"}
    found = attached()
    session.wrap_dataset(K2SpeechRecognitionDataset(), CutSet.from_cuts(cuts))
    assert found.clock.cuts_per_epoch == 0


def test_cuts_without_end_do_not_tell(attached, make_cut, make_store, monkeypatch):
    """Of which the first are read alone, where the recipe repeats each corpus."""
    monkeypatch.setattr("icefall_kd.targets.first_look.SAMPLE", 9)
    a, b = (make_store([make_cut(i, 33)], name=i) for i in "ab")
    found = attached()
    cuts = CutSet.mux(a.repeat(), b.repeat())
    wrapped = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    assert found.clock.cuts_per_epoch == 0
    batch = wrapped[CutSet.from_cuts(c for c, _ in zip(cuts, range(3)))]
    assert batch["kd_targets"].lens.tolist() == [7, 7, 7]


def test_another_encoding_than_utf8_is_warned_of(attached, monkeypatch, caplog):
    """Lhotse reads manifests by it."""
    attached()
    assert "PYTHONUTF8" not in caplog.text
    monkeypatch.setattr(session, "text_encoding", lambda: "gbk")
    attached()
    assert "as gbk" in caplog.text and "set PYTHONUTF8=1" in caplog.text


# What belongs to a checkpoint


def batches(progress, epoch, *numbers, cuts=4):
    """Train so many batches, as the recipe numbers them."""
    found = []
    for number in numbers:
        progress.params.update(cur_epoch=epoch, batch_idx_train=number)
        progress.checkpoint.before_batch()
        found.append(progress.clock.count(cuts))
    return found


def test_the_file_has_a_state_for_each_of_the_last_checkpoints(begin, tmp_path):
    progress = begin(save_every_n=3)
    progress.keep(None)
    batches(progress, 1, 1, 2, 3)
    assert not (tmp_path / "kd.pt").exists()  # before any checkpoint
    batches(progress, 1, 4, 5)
    assert list(torch.load(tmp_path / "kd.pt")["at"]) == [3]
    batches(progress, 2, 6, 7, 8)  # epoch-1.pt is that of batch 5
    assert list(torch.load(tmp_path / "kd.pt")["at"]) == [3, 5, 6]
    batches(progress, 3, *range(9, 20))
    # The last five within an epoch, and those of the last five epochs' ends.
    assert list(torch.load(tmp_path / "kd.pt")["at"]) == [5, 6, 8, 9, 12, 15, 18]


@pytest.mark.parametrize("every", [None, 3])
def test_a_killed_training_counts_on_as_if_it_had_not_been(begin, every):
    whole = begin(save_every_n=every)
    whole.clock.cuts_per_epoch = (
        99  # cuts in the manifest, some of which the recipe leaves out
    )
    whole.keep(None)
    expected = batches(whole, 1, 1, 2, 3, 4, 5) + batches(whole, 2, 6, 7, 8, 9)
    killed = begin(save_every_n=every)
    killed.clock.cuts_per_epoch = 99
    killed.keep(None)
    batches(killed, 1, 1, 2, 3, 4, 5), batches(killed, 2, 6, 7)
    if every:  # from checkpoint-6, within the second epoch
        again = begin(start_batch=6, batch_idx_train=6, start_epoch=2)
        again.clock.cuts_per_epoch = 99
        assert batches(again, 2, 7, 8, 9) == expected[6:]
    else:  # from epoch-1.pt
        again = begin(batch_idx_train=5, start_epoch=2)
        again.clock.cuts_per_epoch = 99
        assert batches(again, 2, 6, 7, 8, 9) == expected[5:]


def test_projectors_go_on_from_the_checkpoints_state(begin, caplog):
    hidden, progress = layers(), begin(save_every_n=2)
    progress.keep(hidden)
    at = {}
    for number in range(1, 8):
        progress.params.update(cur_epoch=1, batch_idx_train=number)
        progress.checkpoint.before_batch()
        progress.clock.count(1)
        at[number] = learn(hidden, 1)
    for number in (2, 4, 6):
        other = layers()
        begin(start_batch=number, batch_idx_train=number).keep(other)
        torch.testing.assert_close(learn(other, 0), at[number])
    assert "projectors" not in caplog.text
    other = layers()
    begin(start_batch=3, batch_idx_train=3).keep(other)  # whose state nobody kept
    assert "has no projectors of the checkpoint" in caplog.text


def test_a_search_for_memory_leaves_the_projectors_alone(
    make_model, make_params, make_cut, make_fingerprint, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(Projectors, "step", lambda self: calls.append("step"))
    monkeypatch.setattr(Projectors, "forget", lambda self: calls.append("forget"))
    params = make_params(
        kd_hidden_weight=1.0, kd_hidden_layers="out", start_epoch=2, exp_dir=tmp_path
    )
    session.attach(params, make_model())
    found = session.current()
    for epoch in (None, None, 2, 2, 3):
        params["cur_epoch"] = epoch
        found.distillation.step_projectors()
    assert calls == ["step", "forget", "forget", "step", "step"]


def test_a_second_resume_from_a_checkpoint_is_as_the_first(begin, tmp_path):
    whole = begin(save_every_n=3)
    whole.clock.cuts_per_epoch = 40
    whole.keep(None)
    expected = batches(whole, 1, *range(1, 9))
    for _ in range(2):  # killed again before the next checkpoint
        again = begin(start_batch=6, batch_idx_train=6, save_every_n=3)
        again.clock.cuts_per_epoch = 40
        again.keep(None)
        assert batches(again, 1, 7, 8) == expected[6:]


def test_a_training_killed_right_behind_its_checkpoint_goes_on_from_it(
    attached, tmp_path, caplog
):
    """Its next batch, which would have marked the checkpoint, never came."""
    changes = {"kd_hidden_weight": 0.5, "kd_hidden_layers": "out", "save_every_n": 9}
    first = attached(**changes)
    hidden, model = first.distillation.joint.projectors, first.distillation.tap.model
    first.clock.params.update(cur_epoch=1, batch_idx_train=4)
    first.clock.count(3)
    learn(hidden, 0)
    pending = hidden.optimizer.param_groups[0]["params"]
    for p in pending:
        p.grad = torch.ones_like(p)
    model.state_dict()  # as for epoch-1.pt; the process is killed behind it
    expected = [p.detach().clone() for p in pending]
    later = attached(**changes, start_epoch=2, batch_idx_train=4)
    learned = learn(later.distillation.joint.projectors, 0)
    for a, b, c in zip(learned, expected, learn(layers(), 0)):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert later.checkpoint.snapshot["counted"]["seen"] == 3
    assert "has no projectors" not in caplog.text


def test_processes_that_share_projectors_do_not_wait_at_a_checkpoint(
    attached, monkeypatch
):
    """One of them alone writes it, and moving the projectors takes all."""
    found = attached(kd_hidden_weight=0.5, kd_hidden_layers="out")
    monkeypatch.setattr(distillation, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(Projectors, "step", lambda self: pytest.fail("step"))
    found.clock.params.update(cur_epoch=1, batch_idx_train=4)
    found.distillation.tap.model.state_dict()


def test_a_file_that_the_former_version_wrote_is_read(begin, tmp_path):
    """It had the counts and the projectors of each checkpoint, and what thawed."""
    hidden, newest = layers(), layers()
    learned, later = learn(hidden, 2), learn(newest, 5)
    counted = {"epoch": 3, "seen": 12, "per_epoch": 16, "from_start": True}
    snapshot = {"counted": counted, "hidden": hidden.state_dict()}
    last = {"counted": {**counted, "seen": 14}, "hidden": newest.state_dict()}
    state = {
        "first_epoch": 2,
        "at": {7: {**snapshot, "ended": False}},
        "newest": {**last, "batch": 8},
        "hidden": newest.state_dict(),
        "thawed": {"decoder:1.5": 6, "joiner:1.9": 8},
    }
    torch.save(state, tmp_path / "kd.pt")
    for batch, seen, parameters, thawed in (
        (7, 12, learned, {"decoder:1.5": 6}),
        (8, 14, later, state["thawed"]),
    ):
        training = begin(start_epoch=3, start_batch=batch, batch_idx_train=batch)
        projectors = layers()
        training.keep(projectors)
        torch.testing.assert_close(learn(projectors, 0), parameters)
        assert batches(training, 3, batch + 1) == [1 + seen / 16]
        freezing = Freezing.__new__(Freezing)
        freezing.params = training.params
        freezing.params["batch_idx_train"] = batch
        training.checkpoint.register("thawed", freezing)
        assert freezing.thawed == thawed
