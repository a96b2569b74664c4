import numpy as np
import pytest
from transformers import AutoTokenizer

from continual.tokenizer import byte_tokenizer, check_tokenizer, encoder_of, load_tokenizer, train_bpe, trained_bpe
from relora.errors import ConfigError

TEXTS = [
    "plain words, twice: plain words",
    "\ttabs\r\n\n  spaces  ",
    "Größe \u4e2d\u6587 \U0001f600 \x00\x7f\x80",
    "a document may spell <eos> itself",
    "def f(x):\n    return x ** 2\n" * 20,
]


def bpe(vocab_size=300):
    return train_bpe([iter(TEXTS * 3)], vocab_size)


def through_transformers(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def test_bytes_are_their_own_tokens():
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer) == 257
    vocabulary = encoder_of(tokenizer, "bytes").encode(["".join(map(chr, range(128)))])[0]
    assert vocabulary.tolist() == [*range(128), 256]


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_encoder_gives_what_the_tokenizer_gives(name):
    tokenizer = byte_tokenizer() if name == "bytes" else bpe()
    encoder = encoder_of(tokenizer, name)
    assert encoder.vocab_size == len(tokenizer)
    for text, tokens in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        assert tokens.tolist() == through_transformers(tokenizer, text)
        assert tokens.dtype == np.uint16
        assert tokenizer.decode(tokens[:-1]) == text


@pytest.mark.parametrize("make", [byte_tokenizer, bpe])
def test_saved_tokenizer_is_the_same_for_transformers(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == "<eos>"
    for text in TEXTS:
        assert through_transformers(loaded, text) == through_transformers(tokenizer, text)


def test_text_never_makes_an_end_of_sequence():
    for name, tokenizer in [("bytes", byte_tokenizer()), ("bpe:300", bpe())]:
        tokens = encoder_of(tokenizer, name).encode(["<eos><eos>"])[0]
        assert (tokens == tokenizer.eos_token_id).sum() == 1


def test_training_a_bpe_twice_gives_the_same(tmp_path):
    assert encoder_of(bpe(), "bpe:300").fingerprint == encoder_of(bpe(), "bpe:300").fingerprint
    kept = trained_bpe([iter(TEXTS * 3)], 300, tmp_path / "bpe")
    again = trained_bpe([iter(())], 300, tmp_path / "bpe")
    assert again.get_vocab() == kept.get_vocab() == bpe().get_vocab()


def test_large_vocabularies_take_four_bytes():
    encoder = encoder_of(byte_tokenizer(), "bytes")
    assert encoder.dtype == np.uint16
    assert type(encoder)(definition="", eos=65536, vocab_size=65537).dtype == np.uint32


def test_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(ConfigError, match=r"gives a vocabulary of \d+, fewer than asked by bpe:5000"):
        train_bpe([iter(TEXTS)], 5000)


@pytest.mark.parametrize("name", ["", "bpe:", "bpe:256", "bpe:many"])
def test_tokenizer_names_without_meaning_are_refused(name):
    with pytest.raises(ConfigError, match=r"data\.tokenizer must be"):
        check_tokenizer(name)


def test_tokenizer_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no tokenizer nowhere/at-all could be loaded"):
        load_tokenizer("nowhere/at-all")


def test_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        load_tokenizer(str(tmp_path))
