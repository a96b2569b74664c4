import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from continual.data import DataConfig, open_data
from continual.mixture import BLOCK
from continual.tokenizer import byte_tokenizer
from relora.errors import ConfigError


def write(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text)
    return str(folder)


@pytest.fixture
def sources(tmp_path):
    """Two folders of text whose letters tell them apart."""
    large = write(tmp_path / "large", [f"{n:03d} " + "a" * 60 for n in range(200)])
    return large, write(tmp_path / "small", [f"{n:03d} " + "b" * 60 for n in range(50)])


@pytest.fixture
def configure(tmp_path, sources):
    def make(**settings):
        defaults = {"path": list(sources), "sequence_length": 16, "cache": str(tmp_path / "cache")}
        return DataConfig(**(defaults | settings))

    return make


def same(one, two):
    assert one.inputs.keys() == two.inputs.keys()
    return torch.equal(one.labels, two.labels) and all(
        torch.equal(one.inputs[key], two.inputs[key]) for key in one.inputs
    )


def test_batches_do_not_depend_on_how_positions_are_split(configure):
    train = open_data(configure(), seed=0).train
    whole = train.batch(1000, 64)
    for count in (1, 7, 32):
        pieces = [train.batch(at, min(count, 1064 - at)) for at in range(1000, 1064, count)]
        assert torch.equal(torch.cat([piece.inputs["input_ids"] for piece in pieces]), whole.inputs["input_ids"])


def test_opening_again_gives_the_same_batches_and_fingerprint(configure):
    one, two = open_data(configure(), seed=3), open_data(configure(), seed=3)
    assert one.fingerprint == two.fingerprint
    assert same(one.train.batch(77, 9), two.train.batch(77, 9))


def test_an_epoch_of_a_source_holds_each_of_its_sequences_once(configure, sources):
    train = open_data(configure(path=sources[0]), seed=0).train
    count = len(train.sources[0])
    epochs = [train.batch(epoch * count, count).inputs["input_ids"] for epoch in range(2)]
    everything = train.sources[0].stream.windows(np.arange(count))
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(everything.tolist())
    assert not torch.equal(*epochs)


def test_sources_of_one_size_go_in_orders_of_their_own(configure, sources):
    pair = [{"path": sources[1], "weight": 1}] * 2
    data = open_data(configure(path=pair, validation_fraction=0.0), seed=0)
    source, _ = data.train.mixture.locate(np.arange(100))
    tokens = data.train.batch(0, 100).inputs["input_ids"]
    one, two = (tokens[torch.from_numpy(source == number)][:20] for number in (0, 1))
    assert not torch.equal(one, two)


def test_sources_are_mixed_by_weight_or_by_size(configure, sources):
    by_size = open_data(configure(), seed=0)
    weighted = [{"path": sources[0], "weight": 1}, {"path": sources[1], "weight": 3}]
    by_weight = open_data(configure(path=weighted), seed=0)
    for data, share in (
        (by_size, len(by_size.train.sources[1]) / sum(map(len, by_size.train.sources))),
        (by_weight, 0.75),
    ):
        letters = data.train.batch(0, BLOCK).inputs["input_ids"]
        small = ((letters == ord("b")).sum(1) > (letters == ord("a")).sum(1)).float().mean()
        assert abs(float(small) - share) < 2 / BLOCK
        row = data.describe(10 * BLOCK)[1]
        assert row["source"] == "small"
        assert abs(row["share"] - share) < 1 / BLOCK
        assert row["epochs"] == pytest.approx(10 * BLOCK * row["share"] / row["sequences"])


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 17},
        {"document_mask": True},
        {"validation_fraction": 0.3},
        {"max_tokens": 3000},
        {"tokenizer": "bpe:260"},
    ],
)
def test_fingerprint_follows_what_decides_the_order(configure, change):
    base = open_data(configure(), seed=0).fingerprint
    assert open_data(configure(**change), seed=0).fingerprint != base
    assert open_data(configure(), seed=1).fingerprint != base


def test_fingerprint_and_order_do_not_depend_on_places(configure, sources, tmp_path):
    base = open_data(configure(), seed=0)
    moved = [str(Path(path).rename(tmp_path / f"{Path(path).name}_moved")) for path in sources]
    elsewhere = open_data(configure(path=moved, cache=str(tmp_path / "elsewhere"), workers=2), seed=0)
    assert elsewhere.fingerprint == base.fingerprint
    assert same(elsewhere.train.batch(5, 5), base.train.batch(5, 5))


def test_without_a_mask_labels_are_the_tokens(configure):
    batch = open_data(configure(), seed=0).train.batch(0, 8)
    assert torch.equal(batch.labels, batch.inputs["input_ids"])
    assert "position_ids" not in batch.inputs
    assert batch.targets == 8 * 15
    assert {batch.inputs["input_ids"].dtype, batch.labels.dtype} == {torch.int64}


def test_with_a_mask_no_document_predicts_the_next(configure):
    batch = open_data(configure(document_mask=True), seed=0).train.batch(0, 200)
    begins = torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
    begins[:, 1:] = batch.inputs["input_ids"][:, :-1] == 256
    assert begins.any()
    assert (batch.labels[begins] == -100).all()
    assert (batch.inputs["position_ids"][begins] == 0).all()
    after = ~begins
    after[:, 0] = False
    assert torch.equal(batch.labels[after], batch.inputs["input_ids"][after])
    assert (batch.inputs["position_ids"][:, 1:] - batch.inputs["position_ids"][:, :-1])[after[:, 1:]].eq(1).all()
    assert batch.targets == int(after.sum())


def test_with_a_mask_a_document_is_read_as_if_it_stood_alone(configure):
    batch = open_data(configure(document_mask=True, sequence_length=100), seed=0).train.batch(0, 4)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        packed = model(
            input_ids=batch.inputs["input_ids"], position_ids=batch.inputs["position_ids"], use_cache=False
        ).logits
        begin = int((batch.inputs["position_ids"][0] == 0).nonzero()[1])
        end = next((at for at in range(begin + 1, 100) if batch.inputs["position_ids"][0, at] == 0), 100)
        alone = model(input_ids=batch.inputs["input_ids"][:1, begin:end], use_cache=False).logits
    assert 0 < begin < end - 1
    torch.testing.assert_close(packed[:1, begin:end], alone, atol=1e-5, rtol=1e-4)


def test_validation_is_whole_and_the_same_for_every_seed(configure):
    one, two = (
        open_data(configure(validation_fraction=0.2), seed=0),
        open_data(configure(validation_fraction=0.2), seed=1),
    )
    count = len(one.validation)
    assert count == sum(len(source) for source in one.validation.sources)
    assert same(one.validation.batch(0, count), two.validation.batch(0, count))
    assert len(set(zip(one.validation.source.tolist(), one.validation.index.tolist(), strict=True))) == count
    assert len(one.validation.batch(count - 3, 10)) == 3


def test_the_first_validation_sequences_are_a_fair_mix(configure, sources):
    weighted = [{"path": sources[0], "weight": 1}, {"path": sources[1], "weight": 1}]
    validation = open_data(configure(path=weighted, validation_fraction=0.3), seed=0).validation
    small = [validation.source[:count].mean() for count in (2, 10, len(validation))]
    assert small == pytest.approx([0.5, 0.5, 0.5], abs=0.05)
    assert len(np.unique(validation.index[validation.source == 0])) == (validation.source == 0).sum()


def test_validation_is_there_for_each_source(configure):
    by_source = open_data(configure(validation_fraction=0.3), seed=0).validation.by_source
    assert list(by_source) == ["large", "small"]
    for label, letter in (("large", "a"), ("small", "b")):
        tokens = by_source[label].batch(0, 1000).inputs["input_ids"]
        assert len(tokens) == len(by_source[label])
        assert (tokens == ord(letter)).any()
        assert not (tokens == ord({"a": "b", "b": "a"}[letter])).any()


def test_validation_of_its_own_is_taken_whole(configure, sources):
    data = open_data(configure(path=sources[0], validation_path=sources[1]), seed=0)
    assert data.train.sources[0].counts.documents == 200
    assert data.validation.sources[0].counts.documents == 50
    assert list(data.validation.by_source) == ["small"]


def test_no_validation_where_none_is_asked(configure):
    assert open_data(configure(validation_fraction=0.0), seed=0).validation is None


def test_bytes_per_token_count_the_text(configure, sources):
    data = open_data(configure(validation_fraction=0.3), seed=0)
    assert data.validation.bytes_per_token == pytest.approx(64 / 65)
    data = open_data(configure(validation_fraction=0.3, tokenizer="bpe:260"), seed=0)
    assert data.validation.bytes_per_token > 1.5


def test_equal_names_stay_apart(configure, tmp_path, sources):
    again = write(tmp_path / "more", ["c" * 70] * 20)
    (tmp_path / "deep").mkdir()
    again = str(Path(again).rename(tmp_path / "deep" / "small"))
    data = open_data(configure(path=[sources[1], again], validation_fraction=0.0), seed=0)
    assert [row["source"] for row in data.describe()] == ["small", "small#2"]


@pytest.mark.parametrize("name", ["bpe:300", "saved"])
def test_any_tokenizer_goes_with_the_data(configure, name, tmp_path):
    if name == "saved":
        byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
        name = str(tmp_path / "tokenizer")
    data = open_data(configure(tokenizer=name, path="python_reference", sequence_length=64), seed=0)
    assert data.vocab_size == len(data.tokenizer)
    tokens = data.train.batch(0, 4).inputs["input_ids"]
    assert tokens.max() < data.vocab_size
    assert len(data.tokenizer.decode(tokens[0]).split()) > 3


def test_a_source_that_is_found_nowhere_is_named(configure):
    with pytest.raises(ConfigError, match=r"data\.path: someone/something is no embedded corpus, file or folder"):
        open_data(configure(path="someone/something"), seed=0)


def test_hub_data_sets_are_streamed_shard_by_shard(configure, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"row {n} " + "x" * 50 for n in range(40)]})
    calls = []

    def load_dataset(path, **settings):
        calls.append((path, settings))
        return rows.to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    path = {"path": "someone/something", "name": "en", "split": "dev"}
    config = configure(path=path, tokenizer="bpe:270", validation_fraction=0.0)
    first = open_data(config, seed=0)
    assert first.train.sources[0].counts.documents == 40
    assert calls[0] == ("someone/something", {"name": "en", "split": "dev", "revision": None, "streaming": True})
    calls.clear()
    assert open_data(config, seed=0).fingerprint == first.fingerprint
    assert not calls


def test_too_little_text_for_one_sequence_is_refused(configure, sources, tmp_path):
    path = write(tmp_path / "little", ["word " * 10, "other " * 10])
    with pytest.raises(ConfigError, match=r"data\.sequence_length must be at most the tokens for train in little, \d+"):
        open_data(configure(path=path, sequence_length=500), seed=0)
    with pytest.raises(
        ConfigError, match=r"for validation in large, .* raise data\.validation_fraction to about 0\.\d+"
    ):
        open_data(configure(path=sources[0], sequence_length=3000), seed=0)


def test_damaged_tokens_are_refused_by_name(configure, tmp_path):
    data = open_data(configure(), seed=0)
    path = next((tmp_path / "cache").glob("large-*/train/tokens.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"data\.cache: .*large-.*/train is damaged .* delete .*large-"):
        open_data(configure(), seed=0)
    assert data.train.batch(0, 1).inputs["input_ids"].shape == (1, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 1}, r"data\.sequence_length must be at least 2, got 1"),
        ({"workers": -1}, r"data\.workers must be at least 0, got -1"),
        ({"max_tokens": 0}, r"data\.max_tokens must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction must be at least 0 and below 1, got 1\.0"),
        ({"validation_fraction": 0.1, "validation_path": "x"}, "has no effect beside data.validation_path"),
        ({"path": []}, r"data\.path must be"),
        ({"validation_path": [{"pth": "x"}]}, r"data\.validation_path\[0\]\.pth .* did you mean path"),
        ({"tokenizer": "bpe:1"}, r"data\.tokenizer must be bpe:VOCABULARY"),
        ({"text_field": ""}, "must not be empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_a_cache_that_cannot_be_made_is_refused(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache: .* cannot be made"):
        open_data(configure(cache=str(tmp_path / "file" / "cache")), seed=0)


def test_configuration_passes_through_omegaconf():
    tree = OmegaConf.merge(
        OmegaConf.structured(DataConfig), {"path": ["a.txt", {"path": "b", "weight": 2}], "max_tokens": 5}
    )
    with pytest.raises(ConfigError, match=r"data\.path: every source or none must have a weight"):
        OmegaConf.to_object(tree)
    tree.path = [{"path": "a.txt", "weight": 1}, {"path": "b", "weight": 2}]
    config = OmegaConf.to_object(tree)
    assert isinstance(config, DataConfig)
    assert config.path == [{"path": "a.txt", "weight": 1}, {"path": "b", "weight": 2}]
    assert type(config.path) is list


@pytest.mark.parametrize("option", ["embedded", "text", "c4"])
def test_options_compose_into_the_typed_configuration(option, monkeypatch):
    monkeypatch.setenv("ACCRETE_CACHE", "/somewhere")
    conf = str(Path(__file__).parents[2] / "conf")
    with initialize_config_dir(version_base="1.3", config_dir=conf):
        tree = compose(
            "train", [f"data={option}", "training.tokens=7000", *(["data.path=a.txt"] if option == "text" else [])]
        )
    config = DataConfig(**OmegaConf.to_container(tree.data, resolve=True))
    assert config.cache == "/somewhere"
    assert config.max_tokens == (7000 if option == "c4" else None)


def test_embedded_text_is_ready_in_seconds(tmp_path):
    data = open_data(DataConfig(cache=os.fspath(tmp_path)), seed=0)
    assert data.describe()[0]["tokens"] > 5_000_000
    assert len(data.validation) > 200
