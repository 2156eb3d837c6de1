"""What the commands are given that they can't use, and the lines that work."""

from typing import Dict, Optional, Sequence, Tuple

from fuzzing import BAD_VALUES, NOT_UTF8

TEACHER = {
    "recipe": "RECIPE",
    "exp_dir": "EXP",
    "epoch": "2",
    "use_averaged_model": "0",
    "bpe_model": "BPE",
}
OF_CUTS = {"cuts": "in.jsonl.gz", "students": "a=EXP"}
# A command line that works, by the names of click's parameters.
BASE: Dict[str, Dict[str, str]] = {
    "doctor": {
        **TEACHER,
        "cuts": "kd.jsonl.gz",
        "student_dir": "student",
        "kd": "--kd-ctc-weight 1",
    },
    "dump": {
        **TEACHER,
        "in_cuts": "in.jsonl.gz",
        "out_cuts": "new.jsonl.gz",
        "max_duration": "5",
        "num_workers": "0",
        "num_threads": "1",
    },
    "combine": {
        "in_cuts": "in.jsonl.gz",
        "out_cuts": "jobs.jsonl.gz",
        "num_jobs": "2",
    },
    "repoint": {"cuts_path": "kd.jsonl.gz", "folders": "kd_kd"},
    "shar": {"cuts_path": "of-shar.jsonl.gz", "shar_dir": "shar"},
    "quantizer": {
        **TEACHER,
        "in_cuts": "in.jsonl.gz",
        "out": "new.pt",
        "layer": "1",
        "num_codebooks": "1",
        "num_vectors": "600",
        "iters": "1",
    },
    "student": {**TEACHER, "student_dir": "new-student", "changes": "joiner-dim=12"},
    "forecast": {
        **TEACHER,
        "cuts": "in.jsonl.gz",
        "num_cuts": "2",
        "student_dir": "student",
    },
    "decode": {
        **TEACHER,
        "cuts": "in.jsonl.gz",
        "test_set": "dev",
        "res_dir": "new-results",
        "max_duration": "5",
        "num_workers": "0",
        "num_threads": "1",
    },
    "label": {
        **TEACHER,
        "in_cuts": "in.jsonl.gz",
        "out_cuts": "new.jsonl.gz",
        "max_duration": "5",
        "num_workers": "0",
        "num_threads": "1",
    },
    "filter": {
        "in_cuts": "labelled.jsonl.gz",
        "out_cuts": "new.jsonl.gz",
        "bpe_model": "BPE",
    },
    "mix": {"out_cuts": "new.jsonl.gz", "in_cuts": "in.jsonl.gz"},
    # Its cuts have no audio.
    "export": {
        **TEACHER,
        "export_dir": "new-export",
        "cuts": "in.jsonl.gz",
        "on_the_fly_feats": "1",
    },
    "cascade": {
        "out_dir": "new-cascade",
        "student": "decoded/utterances-dev-STEM.jsonl",
        "teacher": "decoded/utterances-dev-STEM.jsonl",
    },
    "report": {
        "out_dir": "new-report",
        "models": "a=exp",
        "manifest_dir": "fbank",
        "targets": "kd.jsonl.gz",
    },
    "plug": {"recipe_dir": "toy", "new_dir": "new-toy"},
    "plot kl": {**TEACHER, "out": "new.svg", "num_cuts": "2", **OF_CUTS},
    "plot lattice": {**TEACHER, "out": "new.svg", "cuts": "in.jsonl.gz"},
    "plot spikes": {**TEACHER, "out": "new.svg", **OF_CUTS},
    "plot wer": {"out": "new.svg", "models": "a=exp", "manifest_dir": "fbank"},
    "plot losses": {"out": "new.svg", "models": "a=exp"},
    "plot way": {"out": "new.svg"},
}


LONG = "9" * 5000  # digits, more than Python reads as a number
NO_MANIFESTS = ("o.json", "o.yaml", "o.json.gz", "o", "a-folder/")
# Of options that have a form of their own: what that form can't mean.
EXTRA: Dict[Tuple[str, str], Sequence[str]] = {
    ("doctor", "kd"): (
        "'x",
        '"',
        "--kd-config 'x",
        "--kd-config a-folder",
        "--kd-config a-file",
        "--kd-config in.jsonl.gz",
        "--kd-ctc-weight",
        "--kd-ctc-weight nan",
        "--kd-ctc-weight 1:1",
        "--kd-ctc-weight 1 --kd-temperature inf",
        "--kd-ctc-weight 1 --kd-ctc-delay -1",
        "--help",
        "-h",
        "word",
    ),
    ("dump", "keep"): (
        "dense@2",
        "top:0",
        "top:1.5",
        f"top:{LONG}",
        f"top:8@{LONG}",
        "top:8@0",
        "adaptive:2:9",
        "adaptive:.9:256",
        "adaptive:0.9",
        "sampled:0",
        "none",
    ),
    ("dump", "keep_lattice"): ("collapsed", "path:", "path:none", "top:8@0"),
    ("dump", "keep_hidden"): (
        "9:half",
        f"{LONG}:half",
        "out:a-file",
        "out:a-folder",
        "out:no-such.pt",
        "out:half,out:half",
        "-1:half",
        "half",
    ),
    ("dump", "weights"): ("1,2", "1,", "-1,1"),
    ("dump", "exp_dir"): ("EXP,", ",EXP", "EXP,no-such"),
    ("quantizer", "layer"): ("9", LONG, "out:half", "0,1"),
    ("student", "changes"): (
        "=",
        "x=1",
        "joiner-dim",
        "joiner-dim=",
        "joiner-dim=0",
        "joiner-dim=-4",
        "joiner-dim=4.5",
        "joiner-dim=99999999999",
        f"joiner-dim={LONG}",
        "vocab-size=0",
        "feature-dim=1",
        "encoder-dim=,",
        "encoder-dim=0,0",
        "encoder-dim=16",
        "encoder-dim=16,24,24",
        f"encoder-dim={LONG},24",
        "num-encoder-layers=0,0",
        "num-encoder-layers=9,9",
        "num-heads=0,4",
        "causal=maybe",
        "causal=1",
        "context-size=0",
        f"joiner-dim={NOT_UTF8}",
    ),
    ("student", "params_goal"): ("0M", "-5M", "1e9M", "3x", "1", f"{LONG}M", "5MM"),
    ("student", "speed"): ("0x", "0.5x", "99999x", f"{LONG}x", "5M", "1x"),
    ("student", "preset"): ("S", "xxl", "s,m"),
    ("report", "models"): ("a=", "=exp", "a=no-such", "a=a-file", "a=a-folder", "a"),
    ("report", "pictures"): ("a=a-file", "a-file.svg", "a=no-such.svg", "=x.svg"),
    **{
        (f"plot {kind}", "models"): ("a=", "=exp", "a=no-such", "a=a-file", "a")
        for kind in ("wer", "losses")
    },
    **{
        (f"plot {kind}", "students"): ("a=", "=EXP", "a=no-such", "a=a-file", "a")
        for kind in ("kl", "spikes")
    },
    **{
        (f"plot {kind}", "out"): ("o", "o.jpg", ".svg", "o.svg/", "a-file/o.svg")
        for kind in ("kl", "lattice", "losses", "spikes", "way", "wer")
    },
    ("plot lattice", "cuts"): ("shar", "a-file"),
    ("report", "targets"): ("in.jsonl.gz", "shar", "toy/train.py"),
    ("combine", "num_jobs"): ("3", "10000"),
    ("dump", "cut_seconds"): ("20", "20:1", "nan:20", "1:inf", "-1:20", ":", "1:2:3"),
    ("dump", "out_cuts"): (*NO_MANIFESTS, "in.jsonl.gz"),
    ("label", "out_cuts"): (*NO_MANIFESTS, "in.jsonl.gz", "kd.jsonl.gz"),
    ("label", "in_cuts"): ("shar",),
    ("label", "program"): ("asr", "asr {wavs} {out}", "'"),
    ("mix", "out_cuts"): (*NO_MANIFESTS, "in.jsonl.gz"),
    ("filter", "out_cuts"): (*NO_MANIFESTS, "labelled.jsonl.gz"),
    ("filter", "in_cuts"): ("in.jsonl.gz", "shar"),
    ("filter", "rules"): ("labelled.jsonl.gz",),
    ("filter", "words_per_second"): ("1", "2:1", "nan:1", "-1:2", "1:2:3", "50:60"),
    ("filter", "characters_per_second"): ("2:1", "nan:nan", "500:inf"),
    ("filter", "characters"): ("z-a", "a]", "a-c", "\\"),
    ("filter", "page"): ("labelled.jsonl.gz", "new.jsonl.gz"),
}
RANDOM = {"init": "random"}
# Of several options, what can't be said together; None: left out.
TOGETHER: Sequence[Tuple[str, Dict[str, Optional[str]]]] = (
    *(
        ("student", {**RANDOM, "changes": change})
        for change in (
            *EXTRA["student", "changes"],
            "vocab-size=-1",
            "vocab-size=99999999999",
            "feature-dim=0",
            "decoder-dim=6",
            "encoder-dim=99999999,99999999",
            "num-encoder-layers=99999,99999",
            "pos-dim=0",
            "cnn-module-kernel=0,0",
            "downsampling-factor=0,0",
            "blank-id=99",
            "sample-rate=0",
        )
    ),
    ("student", {"listed": "", "vocab_size": "1000001"}),
    ("student", {"layers": "important"}),
    ("student", {"layers": "important", "cuts": "in.jsonl.gz", "num_cuts": "0"}),
    ("student", {"params_goal": "5M", "speed": "2x"}),
    ("student", {**RANDOM, "channels": "important", "cuts": "in.jsonl.gz"}),
    ("student", {"listed": "", "model_flags": "--nonsense"}),
    ("student", {"rtf": "0.02"}),
    ("student", {"rtf": "0.02", "times": "a-file"}),
    ("student", {"rtf": "0.02", "times": "a-folder"}),
    ("student", {"rtf": "0.02", "speed": "2x"}),
    ("student", {"measure": ""}),
    ("student", {"listed": "", "times": "a-file"}),
    ("student", {"listed": "", "measure": "", "times": "a-file"}),
    ("student", {"listed": "", "measure": "", "recipe": None}),
    ("student", {"recipe": None}),
    ("student", {"exp_dir": None}),
    ("student", {"student_dir": None}),
    *(
        ("doctor", {**dict.fromkeys(BASE["doctor"]), **some})
        for some in (
            {"model_flags": "--nonsense"},
            {"cuts": "kd.jsonl.gz"},
            {"student_dir": "student"},
            {"kd": "--kd-ctc-weight 1"},
            {"bpe_model": "BPE"},
            {"recipe": "RECIPE"},
            {"exp_dir": "EXP"},
        )
    ),
    ("doctor", {"cuts": None}),
    ("dump", {"exp_dir": "EXP,EXP", "weights": "1,nan"}),
    ("dump", {"exp_dir": "EXP,EXP", "weights": "0,0"}),
    ("dump", {"exp_dir": "EXP,EXP", "weights": "-1,2"}),
    ("dump", {"exp_dir": "EXP,EXP", "weights": "inf,1"}),
    ("dump", {"exp_dir": "EXP,EXP", "teacher_field": "x"}),
    ("dump", {"keep": "none"}),
    ("dump", {"num_jobs": "2", "job": "2"}),
    ("decode", {"cascade": "a-file", "answers": "decoded/utterances-dev-STEM.jsonl"}),
    ("decode", {"skip_blanks": "0.9", "decoding_method": "ctc-greedy-search"}),
    ("decode", {"reset_context_after": "1", "decoding_method": "ctc-greedy-search"}),
    ("decode", {"reset_context_after": "1", "decoding_method": "modified_beam_search"}),
    ("decode", {"reset_context_after": "1", "skip_blanks": "0.9"}),
    ("label", {"nbest": ""}),
    ("label", {"time_limit": "5"}),
    ("label", {"recipe": None}),
    ("label", {"exp_dir": None}),
    ("label", {"bpe_model": None}),
    ("label", {"exp_dir": "EXP,EXP"}),
    ("label", {"num_jobs": "2", "job": "2"}),
    ("label", {**dict.fromkeys(TEACHER), "program": "asr {wavs}"}),
    ("label", {**dict.fromkeys(TEACHER), "program": "asr {wavs} {out}"}),
    ("label", {"language": "en"}),
    ("label", {"whisper": "a-folder"}),
    ("label", {"assistant": "a-folder"}),
    *(
        ("label", {**dict.fromkeys((*TEACHER, "num_workers")), "whisper": place})
        for place in ("a-folder", "a-file", "no/such/file", NOT_UTF8)
    ),
    ("mix", {"in_cuts": "labelled.jsonl.gz", "out_cuts": "labelled.jsonl.gz"}),
    ("filter", {"other_cuts": "labelled.jsonl.gz"}),
    ("filter", {"agreement": "5"}),
    ("filter", {"agreement": "5", "other_cuts": "in.jsonl.gz"}),
    ("filter", {"min_score": "-1", "measure": "heads"}),
    ("cascade", {"max_rate": "5", "max_cost": "1"}),
    ("cascade", {"measure": "heads", "max_cost": "0.01"}),
    ("plug", {"check": "", "as_diff": ""}),
    ("plug", {"check": "", "leave_out": "train.py"}),
    ("plug", {"check": "", "recipe_dir": "no-such", "new_dir": ""}),
    ("plug", {"undo_it": "", "new_dir": ""}),
    ("report", {"teacher": "a", "baseline": "a"}),
)
# Bad values that are as good as another one for a text, and for a path.
FOR_NUMBERS = ("inf", "0", "-0.5", "1.5", "1e400", "2147483648", "1" + 20 * "0")
FOR_TEXTS = (*FOR_NUMBERS, "x", "nan", "-1", LONG, "a,b", ",", ":")
NAMES = (" ", "a\nb", "no/such/file")  # that a file may have
FALSE = {"use_averaged_model": ("0",), "iteration": ("0",)}
# What a command takes, odd as it is, or right by chance. An empty text is none.
ACCEPTED: Dict[str, Dict[str, Sequence[str]]] = {
    "doctor": {
        **FALSE,
        "bpe_model": ("",),
        "student_dir": ("",),
        "kd": ("", "--kd-ctc-weight 1:1"),
        "write_flags": ("", "a-file", " ", "a\nb"),
    },
    "dump": {
        **FALSE,
        "bpe_model": ("",),
        "storage_dir": ("", ".", "a-folder", *NAMES),
        "keep_lattice": ("", "collapsed"),
        "keep_hidden": ("",),
        "keep_simple": ("",),
        "cut_seconds": ("",),
        "weights": ("",),
        "teacher_field": ("",),
        "s_range": ("0",),
        "max_duration": ("1.5",),
        "job": ("0",),
        "num_workers": ("0",),
        "num_threads": ("0",),
    },
    "decode": {
        **FALSE,
        "test_set": ("", "x", "nan", "-1", "a,b", ",", ":", ".", "a-folder", "a-file"),
        "res_dir": ("", ".", "a-folder", *NAMES),
        "window": ("1.5",),
        "reset_context_after": ("1.5",),
        "causal_padding": ("0",),
        "cascade": ("",),
        "answers": ("",),
        "on_the_fly_feats": ("0",),
        "max_duration": ("1.5",),
        "num_workers": ("0",),
        "num_threads": ("0",),
    },
    "label": {
        **FALSE,
        "program": ("",),
        "whisper": ("",),
        "window": ("1.5",),
        "reset_context_after": ("1.5",),
        "causal_padding": ("0",),
        "on_the_fly_feats": ("0",),
        "max_duration": ("1.5",),
        "job": ("0",),
        "num_workers": ("0",),
        "num_threads": ("0",),
    },
    "filter": {
        "rules": ("",),
        "bpe_model": ("",),
        "wer_threshold": ("1.5",),
        "min_score": ("-0.5", "-1"),
        "measure": ("",),
        "other_cuts": ("",),
        "heads": ("1.5",),
        "words_per_second": ("",),
        "characters_per_second": ("",),
        "characters": ("", "no/such/file"),  # "ein" is of these
        "page": ("", "a-file", " ", "a\nb"),
    },
    "mix": {"weights": ("1.5",), "seed": ("0", "2147483648")},
    "export": {
        **FALSE,
        "export_dir": (".", "a-folder", *NAMES),
        "heads": ("",),
        "int8": ("",),
        "check_cuts": ("",),
        "sherpa": ("0",),
        # Of the form plain, which is not asked for.
        "plain_mask": ("0",),
        "plain_table_mb": ("1.5",),
    },
    "cascade": {"out_dir": (".", "a-folder", *NAMES), "max_cost": ("1.5",)},
    # The targets are still where the manifest says.
    "repoint": {"folders": (".", "a-folder")},
    # Where the small files of a store will be found, perhaps on another machine.
    "shar": {"storage_dir": ("", ".", "a-folder", "a-file/x", *NAMES)},
    "quantizer": {
        **FALSE,
        "out": NAMES,
        "bpe_model": ("",),
        "seed": ("0", "2147483648"),
    },
    "student": {
        **FALSE,
        "bpe_model": ("",),
        "student_dir": (".", "a-folder", *NAMES),
        "preset": ("",),
        "params_goal": ("",),
        "speed": ("", "1x"),
        "times": ("",),
        "changes": ("encoder-dim=16",),
        "cuts": ("",),
        "seed": ("0", "2147483648"),
    },
    "forecast": {
        **FALSE,
        "baseline_dir": ("",),
        "difference": ("1.5",),
        "json_file": ("", "a-file", " ", "a\nb"),
    },
    "report": {
        "out_dir": (".", "a-folder", *NAMES),
        "teacher": ("",),
        "baseline": ("",),
        "manifest_dir": ("", ".", "a-folder"),
        "targets": ("in.jsonl.gz", "shar"),
        "title": tuple({*BAD_VALUES} - {*FOR_NUMBERS, NOT_UTF8}),
    },
    "plug": {"new_dir": ("a-folder", " ", "a\nb")},
    "plot kl": {**FALSE, "cut_id": ("",), "student_epoch": ("0",)},
    "plot lattice": {**FALSE, "cut_id": ("",), "cuts": ("shar",)},
    "plot spikes": {**FALSE, "cut_id": ("",), "student_epoch": ("0",)},
    "plot wer": {"manifest_dir": ("", ".", "a-folder")},
}
ACCEPTED_TOGETHER: Sequence[Tuple[str, Dict[str, Optional[str]]]] = tuple(
    ("student", {**RANDOM, "changes": change})
    for change in (
        "encoder-dim=16",
        "num-encoder-layers=9,9",
        "causal=1",
        "decoder-dim=6",
    )
)
# Faults that are known and to be mended, each kind with its reason: not judged.
KNOWN: Dict[Tuple[str, str], Tuple[Sequence[str], str]] = {}
FLAG_VALUES = ("=", "=x", "=" + NOT_UTF8)
