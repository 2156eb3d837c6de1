"""A Whisper of the package transformers: what it says of windows of audio.

The search is greedy: the encoder runs once, transformers generates the tokens, and one
more pass of the decoder over all of them gives their probabilities. So scores do not
depend on how the tokens were found.
"""

import hashlib
import importlib
import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch

from icefall_kd.errors import KDError, first_line, require
from icefall_kd.targets.fingerprint import hash_state_dict

RATE = 16_000  # Hz, of all Whispers
NUM_TIMES = 1501  # tokens for times, 20 ms apart
NAME = re.compile(r"[\w.-]+/[\w.-]+")  # of a model on the hub
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # of different tokenizers


@dataclass(frozen=True)
class Heard:
    """What a Whisper said of a window.

    Args:
      tokens: Of the text.
      log_probs: In nats, of each token, and of the end if the model came to it.
      speech: log(1 - p), where p is the probability that nobody speaks; None where the
        tokenizer has no token for that.
    """

    tokens: List[int]
    log_probs: List[float]
    speech: Optional[float]


def need_transformers() -> Any:
    """Import transformers, or say how to install it.

    Raises:
      KDError: it can't be imported.
    """
    try:
        package = importlib.import_module("transformers")
        package.WhisperForConditionalGeneration.from_pretrained  # noqa: B018
        return package
    except Exception as e:  # a broken installation raises anything
        is_old = int(torch.__version__.split(".")[0]) < 2
        pip = "'transformers<4.47'" if is_old else "transformers"
        raise KDError(
            "a Whisper needs the package transformers, which can't be used "
            f"({first_line(e)[:120]}): run `pip install {pip}`"
        ) from None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Leave out the warnings and bars of transformers, which come with each call.

    Args:
      transformers: The package.
    """
    logging = transformers.utils.logging
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


class Parts:
    """Model, tokenizer and features of a Whisper.

    Args:
      place: The folder, or a model's name on the hub, such as openai/whisper-tiny.
      parameter: What ``place`` is called in errors.

    Raises:
      KDError: no Whisper, or one that can't be loaded as a whole.
    """

    def __init__(self, place: str, parameter: str = "whisper") -> None:
        self.place = place
        is_name = NAME.fullmatch(place) and not Path(place).exists()
        require(
            is_name or (Path(place) / "config.json").is_file(),
            f"`{parameter}` is {place}, which is no folder with a config.json: give "
            "the folder of a Whisper of transformers, or a name such as "
            "openai/whisper-tiny",
        )
        package = need_transformers()
        try:
            with quiet(package):
                config = package.AutoConfig.from_pretrained(place)
                self._load(package, config.model_type, parameter)
        except KDError:
            raise
        except Exception as e:  # files that are missing or damaged, no network, ...
            raise KDError(
                f"`{parameter}` is {place}, which can't be loaded ({first_line(e)}"
                "): give a folder that transformers saved, with model, tokenizer and "
                "preprocessor"
            ) from None
        self.model.float().eval()
        self.generation = self.model.generation_config
        for name in ("no_timestamps_token_id", "is_multilingual"):
            require(
                getattr(self.generation, name, None) is not None,
                f"the generation_config.json of `{parameter}` {place} has no {name}: "
                "take that of the Whisper that it was trained from",
            )

    def _load(self, package: Any, kind: str, parameter: str) -> None:
        require(
            kind == "whisper",
            f"`{parameter}` is {self.place}, a model of the type {kind}, and must be "
            "of the type whisper: run others as a program (--command)",
        )
        model = package.WhisperForConditionalGeneration
        self.model, info = model.from_pretrained(self.place, output_loading_info=True)
        missing = sorted(set(info["missing_keys"]) - {"proj_out.weight"})  # tied
        require(
            not missing,
            f"`{parameter}` is {self.place}, which lacks {len(missing)} parameters, "
            f"{missing[:1]} the first: copy or save it again",
        )
        self.tokenizer = package.WhisperTokenizerFast.from_pretrained(self.place)
        self.features = package.WhisperFeatureExtractor.from_pretrained(self.place)

    @property
    def vocabulary(self) -> Dict[str, int]:
        """The id of each token."""
        return self.tokenizer.get_vocab()


class Whisper:
    """A Whisper that turns windows of audio into tokens.

    Args:
      parts: The model.
      device: Where it runs.
      language: The code of the language that is spoken, such as ``en``; "" for one of a
        single language, or to let a multilingual one tell for each window.
      assistant: An :class:`icefall_kd.labels.assistant.Assistant`, or None.

    Raises:
      KDError: a language that the model does not know.
    """

    def __init__(
        self,
        parts: Parts,
        device: torch.device,
        language: str = "",
        assistant: Optional[Any] = None,
    ) -> None:
        self.parts, self.package = parts, need_transformers()
        self.device, self.assistant = device, assistant
        self.model = parts.model.to(device)
        self.languages: Dict[str, int] = {}
        if parts.generation.is_multilingual:
            ids = getattr(parts.generation, "lang_to_id", None) or {}
            self.languages = {token.strip("<|>"): i for token, i in ids.items()}
        known = self.languages or {"en": 0}
        require(
            not language or language in known,
            f"`language` is {language}, and the Whisper knows {len(known)}: "
            f"{', '.join(sorted(known)[:200])}",
        )
        self.language = language
        self.start = int(self.model.config.decoder_start_token_id)
        self.end = _one(parts.generation.eos_token_id)
        self.config = self._generation_config()
        self.no_speech = next(
            (parts.vocabulary[t] for t in NO_SPEECH if t in parts.vocabulary), None
        )

    def name(self) -> str:
        """The hash of all parameters."""
        return hash_state_dict(self.model.state_dict())

    def settings(self) -> Dict[str, Any]:
        """What the text depends on beside the parameters."""
        vocabulary = sorted(self.parts.vocabulary.items())
        text = json.dumps([vocabulary, self.config.suppress_tokens])
        language = self.language or ("detected" if self.languages else "en")
        return {
            "whisper": language,
            "tokens": hashlib.sha256(text.encode()).hexdigest()[:16],
        }

    def hear(self, windows: Sequence[np.ndarray]) -> List[Heard]:
        """Find the tokens of some windows, in one batch.

        Args:
          windows: (samples,) each, float32 at 16 kHz, 30 s at most.
        """
        features = self.parts.features(
            list(windows), sampling_rate=RATE, return_tensors="pt"
        ).input_features.to(self.device)
        with torch.no_grad(), quiet(self.package):
            encoded = self.model.get_encoder()(features).last_hidden_state
            prompts = self._prompts(encoded)
            rows = self._generate(features, encoded, prompts)
            return self._scored(encoded, prompts, rows)

    def text(self, tokens: List[int]) -> str:
        """The text of tokens.

        Args:
          tokens: Those of a window.
        """
        text = self.parts.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # Bytes that are no character, where a generation ended between two tokens.
        return " ".join(text.replace("\ufffd", " ").split())

    def _generation_config(self) -> Any:
        """Greedy, up to half the decoder's positions, as OpenAI's own code."""
        given, config = self.parts.generation, self.model.config
        first = self.end + 1  # behind the tokens of text
        last = min(given.no_timestamps_token_id + NUM_TIMES, config.vocab_size - 1)
        suppressed = {*(given.suppress_tokens or ()), *range(first, last + 1)}
        return self.package.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=config.max_target_positions // 2,
            suppress_tokens=sorted(suppressed),
            begin_suppress_tokens=given.begin_suppress_tokens,
            eos_token_id=self.end,
            pad_token_id=self.end,
            decoder_start_token_id=self.start,
        )

    def _prompts(self, encoded: torch.Tensor) -> torch.Tensor:
        """What the decoder is given first (N, 2 or 4): no language for .en models."""
        count, generation = len(encoded), self.parts.generation
        ids = [[self.start]] * count
        if self.languages:
            if self.language:
                languages = [self.languages[self.language]] * count
            else:
                logits = self._logits(encoded, torch.tensor(ids))[:, 0]
                codes = torch.tensor(sorted(self.languages.values()))
                best = logits[:, codes.to(logits.device)].argmax(1).cpu()
                languages = codes[best].tolist()
            task = generation.task_to_id["transcribe"]
            ids = [[self.start, language, task] for language in languages]
        end = generation.no_timestamps_token_id
        return torch.tensor([row + [end] for row in ids], device=self.device)

    def _logits(self, encoded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(
            encoder_outputs=as_output(encoded),
            decoder_input_ids=tokens.to(self.device),
            use_cache=False,
        ).logits

    def _generate(
        self, features: torch.Tensor, encoded: torch.Tensor, prompts: torch.Tensor
    ) -> List[List[int]]:
        """The tokens behind the prompts, with the end where there is one."""
        if self.assistant is None:
            return self._plain(encoded, prompts)
        rows, drafted = [], self.assistant.encode(features, encoded)
        for i in range(len(prompts)):  # transformers checks drafts one by one
            one = slice(i, i + 1)
            model = self.assistant.ready(drafted[one])
            more = {"inputs": features[one], "assistant_model": model}
            rows += self._plain(encoded[one], prompts[one], **more)
        return rows

    def _plain(
        self, encoded: torch.Tensor, prompts: torch.Tensor, **more: Any
    ) -> List[List[int]]:
        # Whisper's own `generate` adds a prompt, windows and fallbacks of its own.
        rows = self.package.GenerationMixin.generate(
            self.model,
            encoder_outputs=as_output(encoded),
            decoder_input_ids=prompts,
            generation_config=self.config,
            **more,
        )
        return [self._until_end(row[prompts.shape[1] :].tolist()) for row in rows]

    def _until_end(self, row: List[int]) -> List[int]:
        return row[: row.index(self.end) + 1] if self.end in row else row

    def _scored(
        self, encoded: torch.Tensor, prompts: torch.Tensor, rows: List[List[int]]
    ) -> List[Heard]:
        """Ask the decoder for the probability of each token."""
        longest = max(map(len, rows))
        padded = [row + [self.end] * (longest - len(row)) for row in rows]
        targets = torch.tensor(padded, device=self.device)
        tokens = torch.cat([prompts, targets], 1)[:, :-1]
        log_probs = self._logits(encoded, tokens).float().log_softmax(-1)
        behind = log_probs[:, prompts.shape[1] - 1 :]
        scores = behind.gather(-1, targets[..., None])[..., 0].cpu()
        heard = []
        for i, row in enumerate(rows):
            speech = None
            if self.no_speech is not None:
                p = log_probs[i, 0, self.no_speech].exp().item()
                speech = math.log(max(1e-9, 1 - p))
            text = [token for token in row if token != self.end]
            heard.append(Heard(text, scores[i, : len(row)].tolist(), speech))
        return heard


def as_output(encoded: torch.Tensor) -> Any:
    """An encoder's output as transformers takes it.

    Args:
      encoded: (N, T, d).
    """
    outputs = importlib.import_module("transformers.modeling_outputs")
    return outputs.BaseModelOutput(last_hidden_state=encoded)


def _one(ids: Any) -> int:
    """The id of the end, which some models have as a list."""
    return int(ids[0] if isinstance(ids, (list, tuple)) else ids)
