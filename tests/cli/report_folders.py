"""Experiment folders for reports, with numbers that nobody measured."""

import json

SUFFIX = "epoch-3_avg-1_use-averaged-model"
KD = {"kd_ctc_weight": "0:0,2:1", "kd_hard_weight": 1.0, "kd_schedule": "warmup"}


def training_log(settings, parameters, losses):
    def entry(message):
        return f"2025-03-04 08:00:00,000 INFO [train.py:1] {message}\n"

    text = entry(json.dumps(settings, indent=2))
    text += entry(f"Number of model parameters: {parameters}")
    for i, loss in enumerate(losses):
        own = f"loss={loss}, ctc_loss={2 * loss}"
        if settings.get("kd_ctc_weight"):
            own = f"kd_ctc_loss=0.5, kd_ctc_weight={i / 10}, {own}"
        text += entry(
            f"Epoch 1, batch {i * 50}, loss[{own}, over 40.00 frames. ], "
            f"tot_loss[{own}, over 400.00 frames. ], batch size: 5, lr: 4.20e-02, "
        )
    return text + entry("Epoch 1, validation: loss=0.5, over 10.00 frames. ")


def decode_log(seconds):
    lines = [
        (0, "Device: cpu"),
        (0, '{\n  "max_duration": 60\n}'),
        (0, "Number of model parameters: 1"),
        (seconds, f"The transcripts are stored in x/recogs-test-clean-{SUFFIX}.txt"),
        (seconds, "\nFor test-clean, WER of different settings are:\nx\t1"),
    ]
    return "".join(
        f"2025-03-04 08:00:{s:02d},000 INFO [decode.py:1] {m}\n" for s, m in lines
    )


def write_exp(parent, name, settings=None, rate=None, parameters=1000, seconds=2):
    folder = parent / name
    (folder / "log").mkdir(parents=True)
    if settings is not None:
        (folder / "log" / "log-train-2025-03-04-05-06-07").write_text(
            training_log(settings, parameters, [4.0, 2.0, 1.0])
        )
    if rate is not None:
        method = folder / "greedy_search"
        method.mkdir()
        (method / f"wer-summary-test-clean-{SUFFIX}.txt").write_text(
            f"settings\tWER\ngreedy_search\t{rate}\n"
        )
        (method / f"log-decode-{SUFFIX}-2025-03-04-05-06-07").write_text(
            decode_log(seconds)
        )
    return folder
