"""icefall-kd export: the files say what the recipe's own model says."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exporting import encoded
from lhotse import CutSet

from icefall_kd.cli import cli
from icefall_kd.export import build
from icefall_kd.export.files import write_offline
from icefall_kd.export.folder import hash_of_file, read_tokens, write_tokens
from icefall_kd.export.graph import exportable
from icefall_kd.teacher.loader import load_recipe_model
from icefall_kd.tokens import load_tokenizer, token_names

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
SUFFIX = "epoch-2-avg-1"
PARTS = ("encoder", "decoder", "joiner", "model")


@pytest.fixture(scope="session")
def spoken(tmp_path_factory, speak):
    """Manifests of cuts with audio, whose features have their mean or have it not."""
    folder = tmp_path_factory.mktemp("spoken")
    for mean in ("none", "utterance"):
        cuts = [speak(f"{mean}-{i}", n, mean) for i, n in enumerate((43, 61))]
        CutSet.from_cuts(cuts).to_file(folder / f"{mean}.jsonl.gz")
    return folder


@pytest.fixture(scope="session")
def export_words(teacher_exp, spoken):
    """``export`` of the small model into a folder."""

    def words(folder, *more, mean="utterance"):
        return [
            *("export", "--recipe", teacher_exp.recipe, "--exp-dir"),
            *(teacher_exp.folder, "--epoch", 2, "--use-averaged-model", 0),
            *("--bpe-model", teacher_exp.bpe_model, "--export-dir", folder),
            *("--cuts", spoken / f"{mean}.jsonl.gz", *more),
        ]

    return words


@pytest.fixture(scope="session")
def exported(tmp_path_factory, export_words):
    """The small model in all forms, which takes the mean off by itself."""
    folder = tmp_path_factory.mktemp("exported") / "files"
    words = export_words(folder, "--forms", "torchscript,onnx")
    with pytest.raises(SystemExit) as e:
        cli([str(w) for w in words], prog_name="icefall-kd")
    assert e.value.code == 0
    return folder


@pytest.fixture(scope="session")
def session_of(exported):
    def session(part):
        path = exported / f"{part}-{SUFFIX}.onnx"
        return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    sessions = {part: session(part) for part in PARTS}
    return sessions.__getitem__


@pytest.fixture(scope="session")
def model(teacher_exp):
    return load_recipe_model(teacher_exp.recipe, teacher_exp.folder, epoch=2)[0]


# 2000 feature frames, 20 s, are what the recipe's table of encodings is for.
SECONDS_3_25_60 = [pytest.param(n, marks=pytest.mark.slow) for n in (300, 2500, 6000)]


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [9, 58, 2100, *SECONDS_3_25_60])
def test_onnx_says_what_torch_says(session_of, model, num_frames):
    x, x_lens = torch.randn(1, num_frames, 20) + 4, torch.tensor([num_frames])
    out, lens = encoded(model, x - x.mean(1, keepdim=True), x_lens)
    inputs = {"x": x.numpy(), "x_lens": x_lens.numpy()}
    found, found_lens = session_of("encoder").run(None, inputs)
    expected = model.joiner.encoder_proj(out)
    assert found_lens.tolist() == lens.tolist() == [expected.size(1)]
    assert np.abs(found - expected.numpy()).max() < 1e-4
    found, _ = session_of("model").run(None, inputs)
    assert np.abs(found - model.ctc_output(out).numpy()).max() < 1e-4


@torch.no_grad()
def test_decoder_and_joiner_say_what_torch_says(session_of, model):
    y = torch.tensor([[-1, 0], [0, 3], [7, 24], [11, 11]])
    expected = model.joiner.decoder_proj(model.decoder(y, need_pad=False)[:, 0])
    (found,) = session_of("decoder").run(None, {"y": y.numpy()})
    assert np.abs(found - expected.numpy()).max() < 1e-5
    frames = torch.randn(4, expected.size(1))
    inputs = {"encoder_out": frames.numpy(), "decoder_out": found}
    (found,) = session_of("joiner").run(None, inputs)
    expected = model.joiner(frames, expected, project_input=False)
    assert np.abs(found - expected.numpy()).max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [9, 90, *SECONDS_3_25_60])
def test_torchscript_says_what_torch_says(exported, model, num_frames):
    script = torch.jit.load(str(exported / "jit_script.pt"))
    x, x_lens = torch.randn(1, num_frames, 20) + 4, torch.tensor([num_frames])
    expected, _ = encoded(model, x - x.mean(1, keepdim=True), x_lens)
    # By the names of icefall's jit_pretrained.py.
    out, lens = script.encoder(features=x, feature_lengths=x_lens)
    assert lens.tolist() == [expected.size(1)]
    project = model.joiner.encoder_proj
    assert (script.joiner.encoder_proj(out) - project(expected)).abs().max() < 1e-4
    assert (script.ctc_output(out) - model.ctc_output(expected)).abs().max() < 1e-4
    y = torch.tensor([[0, 3]])
    decoded = model.decoder(y, need_pad=False)
    assert torch.allclose(script.decoder(y, need_pad=False), decoded, atol=1e-6)
    logits = model.joiner(expected[:, :1], decoded)
    assert torch.allclose(script.joiner(expected[:, :1], decoded), logits, atol=1e-5)


def test_the_metadata_are_those_that_sherpa_onnx_reads(session_of):
    def of(part):
        return session_of(part).get_modelmeta().custom_metadata_map

    assert of("decoder") == {"context_size": "2", "vocab_size": "25"}
    assert of("joiner") == {"joiner_dim": "20"}
    kinds = {"encoder": "zipformer2", "model": "zipformer2_ctc"}
    for part, kind in kinds.items():
        values = of(part)
        assert values["model_type"] == kind and values["version"] == "1"
        assert len(session_of(part).get_inputs()) == 2  # else it is no offline model


def test_metadata_json_says_what_is_in_the_folder(exported, teacher_exp):
    values = json.loads((exported / "metadata.json").read_text("utf8"))
    names = {f"{part}-{SUFFIX}.onnx" for part in PARTS} | {"jit_script.pt"}
    assert set(values["files"]) == names
    there = {p.name for p in exported.iterdir()}
    assert there == names | {"metadata.json", "tokens.txt"}
    for name, of_file in values["files"].items():
        assert of_file["sha256"] == hash_of_file(exported / name)
    features = values["features"]
    assert (features["num_mel_bins"], features["sampling_rate"]) == (20, 8000)
    assert features["mean"] == "utterance"
    assert (values["frame_rate"], values["feature_frame_rate"]) == (25, 100)
    shapes = values["files"][f"encoder-{SUFFIX}.onnx"]["inputs"]
    assert [v["shape"] for v in shapes] == [["N", "T", 20], ["N"]]
    tokens = token_names(load_tokenizer(teacher_exp.bpe_model))
    assert read_tokens(exported / "tokens.txt") == tokens
    assert values["tokens"]["number"] == 25
    assert {"torch", "onnx", "icefall_kd"} <= set(values["versions"])


# What is refused


@pytest.fixture
def written(monkeypatch):
    """The files that would be written: nothing is traced."""
    names = []

    def write(model, settings, part, path, **options):
        path.write_bytes(b"1")
        names.append(path.name)

    monkeypatch.setattr(build, "write_offline", write)
    monkeypatch.setattr(build, "inputs_and_outputs", lambda path: {})
    return names


def test_one_head_alone_can_be_asked_for(invoke, export_words, written, tmp_path):
    done = invoke(*export_words(tmp_path / "a", "--heads", "ctc", mean="none"))
    assert done.code == 0 and written == [f"model-{SUFFIX}.onnx"]
    assert "mean taken off: none" in done.out


def test_a_model_with_a_ctc_head_alone_has_one_file(
    invoke,
    refused,
    export_words,
    written,
    tmp_path,
    monkeypatch,
    teacher_exp,
    make_model,
):
    settings = {"vocab_size": 25, "use_transducer": False, "use_ctc": True}
    ctc = make_model(**settings).eval()
    known = {**teacher_exp.settings, **settings}
    monkeypatch.setattr(
        "icefall_kd.teacher.loader.load_recipe_model", lambda *args: (ctc, known)
    )
    words = export_words(tmp_path / "a")
    sentence = refused(*words, "--heads", "transducer")
    assert (
        "--heads has transducer, and the model AsrModel has ctc: give ctc" in sentence
    )
    assert invoke(*words).code == 0
    assert written == [f"model-{SUFFIX}.onnx"]


def test_characters_are_tokens_too(
    invoke, export_words, written, tmp_path, monkeypatch, teacher_exp
):
    lang = tmp_path / "lang_char"
    lang.mkdir()
    names = [
        "<blk>",
        "<sos/eos>",
        "<unk>",
        *"一二三四五六七八九十百千万上下左右前后东西南",
    ]
    assert len(names) == 25
    text = "".join(f"{name} {i}\n" for i, name in enumerate(names))
    (lang / "tokens.txt").write_text(text + "#0 25\n", "utf8")
    done = invoke(*export_words(tmp_path / "a"), "--bpe-model", lang)
    assert done.code == 0, done
    assert read_tokens(tmp_path / "a" / "tokens.txt") == names


def test_a_folder_of_another_model_is_refused(
    invoke, refused, export_words, written, tmp_path
):
    assert invoke(*export_words(tmp_path / "a")).code == 0
    sentence = refused(*export_words(tmp_path / "a"), "--epoch", 1)
    assert f"holds files of another model ({SUFFIX}, parameters" in sentence
    assert "epoch-1-avg-1" in sentence and sentence.count("--export-dir") == 1
    sentence = refused(*export_words(tmp_path / "a", mean="none"))
    assert "other features (mean utterance and not none)" in sentence


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--forms", "onnx,tflite"], "--forms is 'onnx,tflite', and must be of torch"),
        (["--heads", "attention"], "--heads is 'attention', and must be of transducer"),
        (["--opset", 12], "--opset is 12, and must be a whole number from 13 to 17"),
        (["--forms", "fp16"], "they are made of the files in fp32: give onnx among"),
        (["--bpe-model", ""], "the tokens are exported too: give --bpe-model"),
        (["--export-dir", __file__], "--export-dir is"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_what_cant_be_exported_is_refused(
    refused, export_words, tmp_path, words, sentence
):
    assert sentence in refused(*export_words(tmp_path / "a"), *words)


def test_cuts_without_audio_are_refused(refused, export_words, in_cuts, tmp_path):
    sentence = refused(*export_words(tmp_path / "a"), "--cuts", in_cuts)
    assert (
        "give cuts of the recipe that have both stored features and audio" in sentence
    )


def test_a_causal_model_needs_one_chunk_size(
    refused, export_words, tmp_path, monkeypatch, teacher_exp
):
    settings = {**teacher_exp.settings, "causal": True}
    settings["chunk_size"] = "16,32"
    monkeypatch.setattr(
        "icefall_kd.teacher.loader.load_recipe_model",
        lambda *args: (teacher_exp.models["epoch-2"], settings),
    )
    sentence = refused(*export_words(tmp_path / "a"))
    assert "--chunk-size is 16,32 in training, and a causal model" in sentence


def test_a_package_that_is_missing_is_named(
    refused, export_words, tmp_path, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    sentence = refused(*export_words(tmp_path / "a"))
    assert sentence.endswith("run `pip install onnx`")


def test_nothing_is_left_where_torch_cant_trace(
    invoke, export_words, tmp_path, monkeypatch, tree_of
):
    def fail(*args, **options):
        raise RuntimeError("no\nsuch operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    before = tree_of(tmp_path)
    done = invoke(*export_words(tmp_path / "a", "--heads", "ctc"))
    reason = "can't make ONNX of this model (RuntimeError: no such operator)"
    assert done.code == 1 and done.out == "" and reason in done.err[-1]
    assert len(done.err) == 2 and tree_of(tmp_path) == before


# What is checked


@pytest.fixture
def checked(tmp_path, exported, export_words, spoken):
    """The words that check a copy of the exported files with --check alone."""
    folder = tmp_path / "files"
    shutil.copytree(exported, folder)
    cuts = spoken / "utterance.jsonl.gz"
    words = export_words(folder, "--check", cuts, "--only-check", "--sherpa", 0)
    return SimpleNamespace(folder=folder, words=words)


def rewrite(folder, name, change):
    """Change a file of ONNX, and its hash in metadata.json: as exported wrongly."""
    import onnx

    model = onnx.load(str(folder / name))
    change(model)
    onnx.save(model, str(folder / name))
    path = folder / "metadata.json"
    values = json.loads(path.read_text("utf8"))
    values["files"][name]["sha256"] = hash_of_file(folder / name)
    path.write_text(json.dumps(values), "utf8")


def flip(model):
    """Turn the sign of one weight, the largest of a matrix product."""
    import onnx

    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")]
    names = [node.input[1] for node in products]
    tensor = next(t for t in model.graph.initializer if t.name in names)
    array = onnx.numpy_helper.to_array(tensor).copy()
    place = np.unravel_index(np.abs(array).argmax(), array.shape)
    array[place] *= -1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def test_files_that_are_the_model_pass(invoke, checked):
    done = invoke(*checked.words)
    assert done.code == 0, done
    rows = [line.split() for line in done.out.splitlines()]
    forms = [row[:2] for row in rows if row[1:2] in (["transducer"], ["ctc"])]
    both = ("transducer", "ctc")
    assert forms == [[f, h] for h in both for f in ("torch", "torchscript", "fp32")]
    result = json.loads((checked.folder / "parity.json").read_text("utf8"))
    assert result["broken"] == []
    for row in result["forms"]:
        assert row["same"] == row["cuts"] == 2
        assert row["form"] == "torch" or row["encoder"] < 1e-4
    values = json.loads((checked.folder / "metadata.json").read_text("utf8"))
    assert values["checked"]["broken"] == 0 and values["checked"]["utterances"] == 2


@pytest.mark.parametrize(
    "part, head",
    [("encoder", "transducer"), ("joiner", "transducer"), ("model", "ctc")],
)
def test_a_flipped_weight_is_found(invoke, checked, part, head):
    rewrite(checked.folder, f"{part}-{SUFFIX}.onnx", flip)
    done = invoke(*checked.words)
    where = "encoder" if part == "model" else part
    assert done.code == 1 and len(done.err) == 2  # what is done, and the refusal
    # Nobody can deploy this head; the other one, and TorchScript, are right.
    parts = ("model",) if head == "ctc" else ("encoder", "decoder", "joiner")
    names = {f"{name}-{SUFFIX}.onnx" for name in parts}
    failed = {p.name for p in checked.folder.glob("*.failed")}
    assert failed == {f"{name}.failed" for name in names}
    assert f"Renamed to *.failed, as they are wrong: {min(names)}" in done.out
    values = json.loads((checked.folder / "metadata.json").read_text("utf8"))
    assert set(values["failed"]) == names and not names & set(values["files"])
    assert values["checked"]["broken"] == 1 and len(values["files"]) == 5 - len(names)
    sentence = f"the form fp32 ({head}) is not the model: its {where} differs by"
    assert sentence in done.err[-1]


def test_a_check_that_fails_before_its_end_leaves_no_word_of_an_earlier_one(
    invoke, checked
):
    path = checked.folder / "metadata.json"
    values = json.loads(path.read_text("utf8"))
    path.write_text(json.dumps({**values, "checked": {"broken": 0}}), "utf8")
    (checked.folder / "tokens.txt").write_text("a 0\n", "utf8")
    assert invoke(*checked.words).code == 1
    assert "checked" not in json.loads(path.read_text("utf8"))


def test_the_first_cuts_alone_can_be_checked(invoke, refused, checked, export_words):
    done = invoke(*checked.words, "--num-cuts", 1)
    assert done.code == 0, done
    result = json.loads((checked.folder / "parity.json").read_text("utf8"))
    assert {row["cuts"] for row in result["forms"]} == {1}
    table = (checked.folder / "parity.md").read_text("utf8").splitlines()
    assert len(table) == 2 + len(result["forms"])
    words = export_words(checked.folder, "--num-cuts", 1)
    assert "--num-cuts is 1 and --check is missing" in refused(*words)


def test_a_file_that_has_changed_is_found(invoke, checked):
    path = checked.folder / f"joiner-{SUFFIX}.onnx"
    path.write_bytes(path.read_bytes() + b"\n")
    done = invoke(*checked.words)
    assert done.code == 1 and "is not the file that was exported" in done.err[0]
    path.unlink()
    assert "is missing: export again" in invoke(*checked.words).err[0]


def test_a_decoder_of_another_epoch_is_found(
    invoke, checked, export_words, tmp_path, teacher_exp
):
    other = load_recipe_model(teacher_exp.recipe, teacher_exp.folder, epoch=1)[0]
    path = checked.folder / f"decoder-{SUFFIX}.onnx"
    options = {"takes_mean": True, "opset": 13}
    write_offline(exportable(other), teacher_exp.settings, "decoder", path, **options)
    rewrite(checked.folder, path.name, lambda model: None)
    done = invoke(*checked.words)
    assert done.code == 1 and "is not the model: its decoder differs by" in done.err[-1]


def test_tokens_of_another_model_are_found(invoke, checked):
    path = checked.folder / "tokens.txt"
    names = read_tokens(path)
    names[3], names[4] = names[4], names[3]
    write_tokens(path, names)
    done = invoke(*checked.words)
    assert done.code == 1
    assert (
        f"tokens.txt is not of this model: its token 3 is {names[3]!r}" in done.err[0]
    )


@pytest.mark.parametrize(
    "name, value", [("dither", 1.0), ("high_freq", 0.0), ("mean", "none")]
)
def test_swapped_feature_settings_are_found(invoke, checked, name, value):
    path = checked.folder / "metadata.json"
    values = json.loads(path.read_text("utf8"))
    values["features"][name] = value
    path.write_text(json.dumps(values), "utf8")
    done = invoke(*checked.words)
    assert done.code == 1 and f"other features ({name} {value} and not" in done.err[0]


def test_a_check_needs_files_and_cuts(invoke, refused, export_words, spoken, tmp_path):
    words = export_words(tmp_path / "a", "--only-check")
    assert "--only-check is given without --check" in refused(*words)
    words += ["--check", spoken / "utterance.jsonl.gz", "--sherpa", 0]
    assert "has no metadata.json, so there is nothing to check" in refused(*words)
    words = export_words(tmp_path / "a", "--cuts", "")
    assert "it is not known what features the model" in refused(*words)
    words = export_words(tmp_path / "a", "--heads", "ctc", "--int8", "joiner")
    assert "--int8 has joiner, and what is exported has model" in refused(*words)


@pytest.mark.parametrize("scales", ["tensor", "channel"])
def test_the_scales_of_int8_are_those_that_are_asked_for(
    invoke, export_words, written, tmp_path, monkeypatch, scales
):
    asked = []
    monkeypatch.setattr(
        build, "write_int8", lambda a, b, s: asked.append(s) or b.write_bytes(b"1")
    )
    words = export_words(tmp_path / "a", "--heads", "ctc", "--int8", "model")
    assert invoke(*words, "--int8-scales", scales).code == 0
    files = json.loads((tmp_path / "a" / "metadata.json").read_text("utf8"))["files"]
    assert asked == [scales] and files[f"model-{SUFFIX}.int8.onnx"]["scales"] == scales
    assert "scales" not in files[f"model-{SUFFIX}.onnx"]


def test_scales_of_no_int8_are_refused(refused, export_words, tmp_path):
    sentence = refused(*export_words(tmp_path / "a"), "--int8-scales", "channel")
    assert "--int8-scales is channel, and no part is written in int8" in sentence


@pytest.mark.slow
def test_sherpa_onnx_reads_a_scale_for_each_channel(
    invoke, export_words, spoken, talking_exp, tmp_path
):
    """It loads the files, and finds what onnxruntime finds with them."""
    pytest.importorskip("sherpa_onnx")
    words = export_words(tmp_path / "a", "--check", spoken / "utterance.jsonl.gz")
    more = ["--int8", "encoder,joiner,model", "--int8-scales", "channel"]
    done = invoke(*words, "--exp-dir", talking_exp, *more)
    result = json.loads((tmp_path / "a" / "parity.json").read_text("utf8"))
    rows = {(row["form"], row["head"]): row for row in result["forms"]}
    for head in ("transducer", "ctc"):
        assert rows["sherpa-onnx fp32", head]["same"] == 2
        of_sherpa, ours = (rows[form, head] for form in ("sherpa-onnx int8", "int8"))
        assert of_sherpa["differ"] == ours["differ"]
        assert of_sherpa["wer"] == ours["wer"]
    assert done.code == bool(result["broken"])


@pytest.mark.slow
def test_sherpa_onnx_finds_what_torch_finds(
    invoke, export_words, spoken, talking_exp, tmp_path
):
    """In all precisions, from the audio; so does int8 of an untrained model."""
    pytest.importorskip("sherpa_onnx")
    pytest.importorskip("onnxconverter_common")
    words = export_words(tmp_path / "a", "--check", spoken / "utterance.jsonl.gz")
    more = ["--forms", "onnx,fp16", "--int8", "encoder,joiner,model"]
    done = invoke(*words, "--exp-dir", talking_exp, *more)
    result = json.loads((tmp_path / "a" / "parity.json").read_text("utf8"))
    rows = {(row["form"], row["head"]): row for row in result["forms"]}
    for head in ("transducer", "ctc"):
        for form in ("fp32", "sherpa-onnx fp32", "sherpa-onnx fp32, batch 8"):
            assert rows[form, head]["same"] == 2, (form, head)
        for form in ("fp16", "int8", "sherpa-onnx fp16", "sherpa-onnx int8"):
            assert (form, head) in rows
    assert {f"int8 {part} alone" for part in ("encoder", "joiner")} <= {
        form for form, _ in rows
    }
    assert done.code == bool(result["broken"])
