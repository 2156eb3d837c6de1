"""What is read from results and logs of decoding."""

import os

import pytest

from icefall_kd.errors import KDError
from icefall_kd.report.results import read_decodings, split_last

NEW = "epoch-3_avg-1_context-2_max-sym-per-frame-1_use-averaged-model"
OLD = "epoch-30-avg-9-context-2-max-sym-per-frame-1-use-averaged-model"


@pytest.mark.parametrize(
    "name, test_set",
    [
        (f"wer-summary-test-clean-{NEW}", "test-clean"),
        (f"wer-summary-test-{OLD}", "test"),
        # Most recipes put the setting between the two, streaming ones with underscores.
        (f"wer-summary-test-other-greedy_search-{OLD}", "test-other"),
        (f"wer-summary_test-clean_greedy_search_{NEW}", "test-clean"),
        (f"wer-summary-TEST_NET-greedy_search-{OLD}", "TEST_NET"),
        ("wer-summary-dev-iter-4000-avg-2", "dev"),
    ],
)
def test_the_sets_name_is_what_stands_before_setting_and_suffix(
    write_summary, name, test_set
):
    (found,) = read_decodings(write_summary(name))
    assert list(found.rates) == [test_set]
    assert found.rates[test_set].percent == 5.25


@pytest.mark.parametrize(
    "suffix, checkpoint, options",
    [
        (NEW, "epoch 3, avg 1", "context-2_max-sym-per-frame-1_use-averaged-model"),
        (OLD, "epoch 30, avg 9", "context-2-max-sym-per-frame-1-use-averaged-model"),
        ("iter-4000-avg-2", "iter 4000, avg 2", ""),
        ("epoch-3_avg-1_use-averaged-model", "epoch 3, avg 1", "use-averaged-model"),
    ],
)
def test_the_suffix_tells_checkpoint_and_options(
    write_summary, suffix, checkpoint, options
):
    (found,) = read_decodings(write_summary(f"wer-summary-test-{suffix}"))
    assert (found.checkpoint, found.options) == (checkpoint, options)


def test_the_best_setting_stands_first_and_their_number_is_kept(write_summary):
    exp = write_summary(
        f"wer-summary-test-beam_2_lm_0.3-{OLD}",
        ("beam_4_lm_0.2", 4.5),
        ("beam_2_lm_0.3", 5.5),
        method="modified_beam_search",
    )
    (found,) = read_decodings(exp)
    assert found.method == "modified_beam_search"
    rate = found.rates["test"]
    assert (rate.percent, rate.setting, rate.settings) == (4.5, "beam_4_lm_0.2", 2)


def test_sets_of_one_checkpoint_are_one_decoding(write_summary):
    write_summary(f"wer-summary-test-clean-{NEW}", ("greedy_search", 3.5))
    exp = write_summary(f"wer-summary-test-other-{NEW}", ("greedy_search", 8.5))
    (found,) = read_decodings(exp)
    assert {s: r.percent for s, r in found.rates.items()} == {
        "test-clean": 3.5,
        "test-other": 8.5,
    }


def test_a_cer_summary_is_another_decoding_than_a_wer_summary(write_summary):
    write_summary(f"wer-summary-test-{OLD}", ("greedy_search", 9.5))
    exp = write_summary(f"cer-summary-test-{OLD}", ("greedy_search", 4.5))
    found = {d.kind: d.rates["test"].percent for d in read_decodings(exp)}
    assert found == {"wer": 9.5, "cer": 4.5}


def test_streaming_decodings_are_found_in_their_folder(write_summary):
    exp = write_summary(f"wer-summary_test_x_{NEW}", method="streaming/greedy_search")
    assert [d.method for d in read_decodings(exp)] == ["streaming/greedy_search"]


def test_results_of_an_experiment_inside_another_are_not_its_own(write_summary):
    write_summary(f"wer-summary-test-{NEW}", exp="exp")
    write_summary(f"wer-summary-test-{OLD}", exp="exp/student")
    (found,) = read_decodings(write_summary(f"wer-summary-dev-{NEW}"))
    assert sorted(found.rates) == ["dev", "test"]


def test_the_last_decoding_is_that_of_the_highest_epoch_and_not_the_best(
    write_summary,
):
    for suffix, rate in (
        ("epoch-9-avg-1", 2.0),
        ("epoch-10-avg-1", 3.0),
        ("iter-80000-avg-1", 1.0),
    ):
        exp = write_summary(f"wer-summary-test-{suffix}", ("greedy_search", rate))
    last, others = split_last(read_decodings(exp))
    assert [d.suffix for d in last] == ["epoch-10-avg-1"]
    assert [d.suffix for d in others] == ["epoch-9-avg-1", "iter-80000-avg-1"]


def test_of_equal_epochs_the_one_with_the_newest_log_is_last(
    write_summary, write_decode_log
):
    for suffix, date in (
        ("epoch-3-avg-1", "2025-01-02-00-00-00"),
        ("epoch-3-avg-2", "2025-01-03-00-00-00"),
        ("epoch-3-avg-3", "2025-01-01-00-00-00"),
    ):
        exp = write_summary(f"wer-summary-test-{suffix}")
        write_decode_log(suffix=suffix, date=date)
    last, _ = split_last(read_decodings(exp))
    assert [d.checkpoint for d in last] == ["epoch 3, avg 2"]


def test_of_equal_epochs_without_logs_the_newest_file_is_last(write_summary):
    for suffix, time in (("epoch-3-avg-2", 2_000_000), ("epoch-3-avg-1", 1_000_000)):
        exp = write_summary(f"wer-summary-test-{suffix}")
        path = exp / "greedy_search" / f"wer-summary-test-{suffix}.txt"
        os.utime(path, (time, time))
    last, _ = split_last(read_decodings(exp))
    assert [d.checkpoint for d in last] == ["epoch 3, avg 2"]


@pytest.mark.parametrize("text", ["", "settings\tWER\n", "settings\tWER\nx\tmany\n"])
def test_a_summary_without_a_rate_is_refused(write_summary, text):
    exp = write_summary(f"wer-summary-test-{NEW}")
    path = exp / "greedy_search" / f"wer-summary-test-{NEW}.txt"
    path.write_text(text)
    with pytest.raises(KDError, match=f"{path.name} holds no error rate.*decode again"):
        read_decodings(exp)


@pytest.mark.parametrize("head", ["%WER = 7.25", "%WER 7.25% [4 / 55, 1 ins ]"])
def test_where_summaries_are_gone_the_errs_files_tell(tmp_path, head):
    folder = tmp_path / "greedy_search"
    folder.mkdir()
    name = f"errs-test-clean-greedy_search-{OLD}.txt"
    (folder / name).write_text(f"{head}\nErrors: 1 insertions\n")
    (found,) = read_decodings(tmp_path)
    assert found.rates["test-clean"].percent == 7.25


# Times


def stored(test_set, suffix=NEW):
    return f"The transcripts are stored in exp/recogs-{test_set}-{suffix}.txt"


def done(test_set):
    return (
        f"\nFor {test_set}, WER of different settings are:\nx\t5\tbest for {test_set}\n"
    )


def test_a_sets_seconds_run_from_the_ready_model_or_the_set_before(
    write_summary, write_decode_log
):
    exp = write_summary(f"wer-summary-test-clean-{NEW}")
    write_decode_log(
        (0, "Device: cuda:0"),
        (1, '{\n  "device": "cuda:0",\n  "max_duration": 600\n}'),
        (5, "Number of model parameters: 1234"),
        (6, "About to get test-clean cuts"),
        (6.5, "About to get test-other cuts"),
        (8, "batch 0/?, cuts processed until now is 1"),
        (16.5, stored("test-clean")),
        (16.5, "[test-clean-greedy_search] %WER 5.00% [1 / 20, 0 ins, 1 del, 0 sub ]"),
        (17, "Wrote detailed error stats to exp/errs-test-clean.txt"),
        (17, done("test-clean")),
        (22, stored("test-other")),
        (23, "Wrote detailed error stats to exp/errs-test-other.txt"),
        (23, done("test-other")),
        suffix=NEW,
    )
    (found,) = read_decodings(exp)
    assert found.log.seconds == {"test-clean": 10.0, "test-other": 5.0}
    assert (found.log.device, found.log.max_duration) == ("cuda:0", 600)
    assert found.log.parameters == 1234


def test_settings_that_are_stored_one_by_one_were_searched_together(
    write_summary, write_decode_log
):
    exp = write_summary(f"wer-summary-test-b-{OLD}", ("a", 1), ("b", 2))
    write_decode_log(
        (0, "Number of model parameters: 1"),
        (9, stored("test-a", OLD)),
        (9, "[test-a] %WER 1.00% [1 / 100, 0 ins, 1 del, 0 sub ]"),
        (10, "Wrote detailed error stats to x"),
        (10, stored("test-b", OLD)),
        (11, "[test-b] %WER 2.00% [2 / 100, 0 ins, 2 del, 0 sub ]"),
        (11, "Wrote detailed error stats to x"),
        (11, done("test")),
        suffix=OLD,
    )
    (found,) = read_decodings(exp)
    assert found.log.seconds == {"test": 9.0}


def test_a_log_without_stored_transcripts_ends_a_set_at_its_score(
    write_summary, write_decode_log
):
    exp = write_summary("wer-summary-test-epoch-4-avg-1")
    write_decode_log(
        (0, "Number of model parameters: 1"),
        (1, "About to get test cuts from cuts_test.jsonl.gz"),
        (4, "[test] %WER 16.33% [200 / 1225, 10 ins, 111 del, 79 sub ]"),
        suffix="epoch-4-avg-1",
    )
    (found,) = read_decodings(exp)
    assert found.log.seconds == {"test": 3.0}


def test_of_several_logs_of_a_decoding_the_newest_is_read(
    write_summary, write_decode_log
):
    exp = write_summary(f"wer-summary-test-{NEW}")
    for date, second in (("2025-01-02-00-00-00", 4), ("2025-01-01-00-00-00", 9)):
        write_decode_log(
            (0, "Number of model parameters: 1"),
            (second, stored("test")),
            (second, done("test")),
            suffix=NEW,
            date=date,
        )
    (found,) = read_decodings(exp)
    assert found.log.seconds == {"test": 4.0}
    assert found.date == "2025-01-02-00-00-00"


@pytest.mark.parametrize("device, sets", [("cpu", ["dev", "test"]), ("cuda", ["test"])])
def test_a_set_of_an_older_log_counts_where_it_was_decoded_likewise(
    write_summary, write_decode_log, device, sets
):
    exp = write_summary(f"wer-summary-test-{NEW}")
    for date, on, test_set in (
        ("2025-01-02-00-00-00", "cpu", "test"),
        ("2025-01-01-00-00-00", device, "dev"),
    ):
        write_decode_log(
            (0, f"Device: {on}"),
            (0, "Number of model parameters: 1"),
            (4, stored(test_set)),
            (4, done(test_set)),
            suffix=NEW,
            date=date,
        )
    (found,) = read_decodings(exp)
    assert sorted(found.log.seconds) == sets


def test_a_log_cut_short_has_no_seconds(write_summary, write_decode_log):
    exp = write_summary(f"wer-summary-test-{NEW}")
    write_decode_log((0, "Number of model parameters: 1"), suffix=NEW)
    assert read_decodings(exp)[0].log.seconds == {}
