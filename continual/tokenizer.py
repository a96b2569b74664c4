"""Tokenizers: bytes (the default), a byte-level BPE trained on the spot, or any fast one of transformers.

What encodes documents with them is in encoder.py.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from continual.encoder import Encoder
from continual.folders import new_folder, only_one
from relora.errors import ConfigError

BYTES = "bytes"
EOS = "<eos>"
SMALLEST_BPE = 257
TRAINING_CHARACTERS = 128_000_000
"""Text a BPE is trained on, at most; its word counts must fit in memory."""


def check_tokenizer(name: str) -> None:
    """Refuse a `data.tokenizer` that cannot mean anything.

    Raises: ConfigError.
    """
    if not name:
        raise ConfigError("data.tokenizer must be bytes, bpe:VOCABULARY, or the name or folder of a tokenizer")
    if name.startswith("bpe:") and not (re.fullmatch(r"bpe:\d+", name) and int(name[4:]) >= SMALLEST_BPE):
        raise ConfigError(
            f"data.tokenizer must be bpe:VOCABULARY with a vocabulary of at least {SMALLEST_BPE}, such as "
            f"bpe:8192, got {name}"
        )


def bpe_vocabulary(name: str) -> int | None:
    """The vocabulary of a `bpe:VOCABULARY`; None for another tokenizer."""
    return int(name.removeprefix("bpe:")) if name.startswith("bpe:") else None


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens 0 to 255 are the bytes of UTF-8, and 256 the end."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    return _wrapped(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), use_regex=False)


def train_bpe(texts: list[Iterator[str]], vocab_size: int) -> Any:
    """A byte-level BPE of exactly this vocabulary, from one iterator for each source.

    Raises: ConfigError when the text has too few pairs for it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_equal_shares(texts), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ConfigError(
            f"data.tokenizer: the text gives a vocabulary of {found}, fewer than asked by bpe:{vocab_size}; "
            f"lower it to bpe:{found}, or give more text"
        )
    return _wrapped(tokenizer, use_regex=True)


def trained_bpe(
    texts: list[Iterator[str]], vocab_size: int, folder: Path, watch: Callable[[int], None] = lambda done: None
) -> Any:
    """The BPE in `folder`, trained and saved there first if it is not there; `watch` is told 0, then 1."""
    if not folder.is_dir():
        with only_one(folder.parent / "locks" / folder.name):
            if not folder.is_dir():
                watch(0)
                with new_folder(folder, within=folder.parent) as private:
                    train_bpe(texts, vocab_size).save_pretrained(private)
                watch(1)
    return load_tokenizer(str(folder))


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer with an end-of-sequence token, by name or folder.

    Raises: ConfigError.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(name).expanduser() if name.startswith("~") else name)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise ConfigError(
            f"data.tokenizer: no tokenizer {name} could be loaded ({reason}); give bytes, bpe:8192, a folder with "
            "a tokenizer, or the name of one on the Hub that can be reached or was loaded here before"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"data.tokenizer: {name} has no fast version (tokenizer.json); choose one that has")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"data.tokenizer: {name} has no end-of-sequence token, which separates documents; choose one that "
            "has, or save a copy with eos_token set"
        )
    return tokenizer


def encoder_of(tokenizer: Any, name: str) -> Encoder:
    """What prepares tokens exactly as the tokenizer would."""
    size = max(tokenizer.get_vocab().values()) + 1
    if name == BYTES:
        return Encoder(definition="", eos=tokenizer.eos_token_id, vocab_size=size)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return Encoder(definition=backend.to_str(), eos=tokenizer.eos_token_id, vocab_size=size)


def _wrapped(tokenizer: Any, *, use_regex: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)


def _letters_of_bytes() -> list[str]:
    """The printable letter that stands for each byte. Source: the tokenizer of GPT-2."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _equal_shares(texts: list[Iterator[str]]) -> Iterator[str]:
    """The beginning of each source, in bounded memory."""
    for source in texts:
        left = TRAINING_CHARACTERS // len(texts)
        while left > 0 and (text := next(source, None)) is not None:
            yield text
            left -= len(text)
