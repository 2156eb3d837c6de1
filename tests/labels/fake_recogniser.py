"""fake_recogniser.py WAVS OUT [FAULT]: hears of each wav file how long it is."""

import sys
import time
import wave

wavs, out, fault = [*sys.argv[1:], ""][:3]
lines = []
with open(wavs, encoding="utf8") as f:
    for line in f:
        cut_id, path = line.split()
        with wave.open(path) as audio:
            assert (audio.getnchannels(), audio.getsampwidth()) == (1, 2)
            lines.append([cut_id, f"Söme {audio.getnframes()}."])
if fault == "dies":
    print("loading\nout of luck", file=sys.stderr)
    sys.exit(3)
if fault == "hangs":
    time.sleep(3600)
if fault == "fewer":
    del lines[-1]
if fault == "other-ids":
    lines[0][0] = "x" + lines[0][0]
if fault == "twice":
    lines.append(lines[0])
if fault == "one-empty":
    lines[0][1] = ""
if fault == "all-empty":
    lines = [(cut_id, "") for cut_id, _ in lines]
if fault in ("nbest", "no-score"):
    score = "-0.25" if fault == "nbest" else "high"
    lines = [(i, f"{s} {text}{more}") for i, text in lines
             for s, more in (("-1.5", " more"), (score, ""))]  # fmt: skip
encoding = {"latin-1": "latin-1", "utf-16": "utf-16"}.get(fault, "utf8")
if fault != "no-file":
    with open(out, "w", encoding=encoding) as f:
        f.writelines(" ".join(line) + "\n" for line in reversed(lines))
