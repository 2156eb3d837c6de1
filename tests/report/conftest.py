"""Files in the shape of icefall's own, with numbers that nobody measured."""

import json

import pytest

DATE = "2025-03-04-05-06-07"


def stamp(second):
    """A log's time stamp, so many seconds after eight o'clock."""
    minute, rest = divmod(second, 60)
    return f"2025-03-04 08:{int(minute):02d}:{int(rest):02d},{int(rest % 1 * 1000):03d}"


def entry(message, second=0, rank="", source="train.py:12"):
    return f"{stamp(second)} INFO [{source}] {rank}{message}\n"


@pytest.fixture
def write_training(tmp_path):
    """Write a training log from messages; return the experiment folder.

    A message may be a pair of its second and its text.
    """

    def write(*messages, settings=None, date=DATE, rank="", exp="exp", tail=""):
        folder = tmp_path / exp / "log"
        folder.mkdir(parents=True, exist_ok=True)
        text = entry("Training started", rank=rank)
        if settings is not None:
            shown = settings
            if not isinstance(settings, str):
                shown = json.dumps(settings, indent=2, sort_keys=True)
            text += entry(shown, rank=rank)
        timed = [(1, m) if isinstance(m, str) else m for m in messages]
        text += "".join(entry(m, second, rank) for second, m in timed)
        ending = f"-{rank[1]}" if rank else ""
        path = folder / f"log-train-{date}{ending}"
        path.write_text(text + tail, encoding="utf8")
        return tmp_path / exp

    return write


@pytest.fixture
def batch():
    """A training line."""

    def line(epoch, number, tot="loss=1.5, ctc_loss=2.5", own=None):
        return (
            f"Epoch {epoch}, batch {number}, loss[{own or tot}, over 40.00 frames. ], "
            f"tot_loss[{tot}, over 400.00 frames. ], batch size: 5, lr: 4.20e-02, "
        )

    return line


@pytest.fixture
def validation():
    def line(epoch, values="loss=0.75, ctc_loss=1.25"):
        return f"Epoch {epoch}, validation: {values}, over 1187.00 frames. "

    return line


@pytest.fixture
def write_summary(tmp_path):
    """Write a summary of error rates; return the experiment folder."""

    def write(name, *rates, method="greedy_search", exp="exp"):
        folder = tmp_path / exp / method
        folder.mkdir(parents=True, exist_ok=True)
        unit = "CER" if name.startswith("cer") else "WER"
        rates = rates or ((method, 5.25),)
        lines = [f"settings\t{unit}", *(f"{k}\t{v}" for k, v in rates)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", "utf8")
        return tmp_path / exp

    return write


@pytest.fixture
def write_decode_log(tmp_path):
    """Write a decoding log of (second, message)s; return its path."""

    def write(
        *messages, suffix="epoch-3_avg-1", date=DATE, method="greedy_search", exp="exp"
    ):
        folder = tmp_path / exp / method
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"log-decode-{suffix}-{date}"
        path.write_text(
            "".join(entry(m, s, source="decode.py:9") for s, m in messages), "utf8"
        )
        return path

    return write


@pytest.fixture
def write_recogs(tmp_path):
    """Write transcripts as icefall does, and the errs file; return the transcripts."""

    def write(
        pairs,
        name="test-greedy_search-epoch-3-avg-1",
        folder="greedy_search",
        errs=None,
        char_level=False,
    ):
        path = tmp_path / folder / f"recogs-{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for cut_id, reference, result in pairs:
            texts = reference.split(), result.split()
            if char_level:
                texts = [list("".join(text)) for text in texts]
            lines += [f"{cut_id}:\tref={texts[0]}", f"{cut_id}:\thyp={texts[1]}"]
        path.write_text("".join(line + "\n" for line in lines), "utf8")
        if errs is not None:
            (path.parent / f"errs-{name}.txt").write_text(errs, "utf8")
        return path

    return write
