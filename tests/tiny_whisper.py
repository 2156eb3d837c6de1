"""Makes a Whisper of few parameters, which says letters at random."""

import string

import pytest
import torch

LETTERS = string.ascii_letters + " "
LANGUAGES = ("en", "de", "zh")


def special_tokens():
    languages = [f"<|{language}|>" for language in LANGUAGES]
    rest = ["translate", "transcribe", "startoflm", "startofprev", "nospeech"]
    rest = [f"<|{name}|>" for name in (*rest, "notimestamps")]
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    return ["<|endoftext|>", "<|startoftranscript|>", *languages, *rest, *times]


def tokenizer_of(transformers):
    """Bytes and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens())
    names = {f"{n}_token": "<|endoftext|>" for n in ("bos", "eos", "unk", "pad")}
    return transformers.WhisperTokenizerFast(tokenizer_object=tokenizer, **names)


def save_whisper(folder, multilingual=False, seed=0, d_model=16):
    """Write a random Whisper as transformers does."""
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(transformers)
    ids = tokenizer.get_vocab()
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    special = dict(eos_token_id=end, pad_token_id=end, bos_token_id=end)
    config = transformers.WhisperConfig(
        vocab_size=len(ids),
        num_mel_bins=8,
        d_model=d_model,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=24,
        init_std=0.5,
        decoder_start_token_id=start,
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.WhisperForConditionalGeneration(config)
    blank = {tokenizer.encode(c, add_special_tokens=False)[0] for c in LETTERS}
    more = {}
    if multilingual:
        more["lang_to_id"] = {f"<|{name}|>": ids[f"<|{name}|>"] for name in LANGUAGES}
        tasks = ("transcribe", "translate")
        more["task_to_id"] = {task: ids[f"<|{task}|>"] for task in tasks}
    model.generation_config = transformers.GenerationConfig(
        is_multilingual=multilingual,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=sorted(set(range(end)) - blank) + list(range(start, len(ids))),
        begin_suppress_tokens=[end],
        alignment_heads=[[0, 0], [1, 1]],
        decoder_start_token_id=start,
        max_length=24,
        **special,
        **more,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory):
    """The folder of a tiny Whisper of English."""
    return save_whisper(tmp_path_factory.mktemp("whisper") / "tiny.en")


@pytest.fixture(scope="session")
def multilingual_folder(tmp_path_factory):
    """The folder of a tiny multilingual Whisper."""
    return save_whisper(tmp_path_factory.mktemp("whisper") / "tiny", True, 1)
