import dataclasses
import itertools
import json

import numpy
import pytest
import torch

from ssr_deepspeed.pretrain import data
from ssr_deepspeed.pretrain.config import DataConfig
from ssr_deepspeed.pretrain.model import IGNORED
from ssr_deepspeed.pretrain.prepare import prepare
from ssr_deepspeed.pretrain.text import read_documents
from ssr_deepspeed.pretrain.tokenizer import END


@pytest.fixture(scope="module")
def speeches(tmp_path_factory):
    return read_documents(DataConfig())


def corpus_of(config):
    return data.open_corpus(prepare(config), dataclasses.replace(config, sequence_length=8))


def write_documents(folder, count=20):
    texts = [f"Document {i}: " + "añ ß 漢 " * (i + 1) for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return texts


def split_at(tokens, end):
    places = numpy.flatnonzero(tokens[:] == end)
    return [part.tolist() for part in numpy.split(tokens[:], places + 1)[:-1]]


def test_bytes_hold_every_document_whole_and_each_on_one_side_of_the_split(tmp_path):
    texts = write_documents(tmp_path)
    corpus = corpus_of(DataConfig(source=str(tmp_path), heldout=0.2, cache=str(tmp_path / "cache")))
    sides = [{bytes(part[:-1]).decode() for part in split_at(side, 256)} for side in (corpus.training, corpus.heldout)]
    assert sides[0] | sides[1] == set(texts)
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 4
    assert corpus.vocabulary == 257


def test_tokens_are_mapped_from_their_file_and_not_read_into_memory(tmp_path):
    write_documents(tmp_path)
    corpus = corpus_of(DataConfig(source=str(tmp_path), heldout=0.2, cache=str(tmp_path / "cache")))
    for side in (corpus.training, corpus.heldout):
        assert isinstance(side[5:9], numpy.memmap)
        assert [side[5:9].filename] == side.files


def test_a_trained_bpe_gives_the_text_back_and_knows_the_bytes_of_each_token(tmp_path):
    texts = write_documents(tmp_path)
    config = DataConfig(source=str(tmp_path), tokenizer="bpe", vocabulary=300, cache=str(tmp_path / "cache"))
    corpus = corpus_of(config)
    folder = prepare(config)
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    found = {}
    for side in (corpus.training, corpus.heldout):
        for part in split_at(side, end):
            found[tokenizer.decode(part[:-1])] = int(corpus.bytes_per_token[part].sum())
    assert found == {text: len(text.encode()) for text in texts}


def test_the_default_text_is_the_installed_speeches(speeches):
    assert len(speeches) == 249
    assert sum(len(text) for text in speeches["text"]) > 11_000_000


def test_json_lines_are_read_by_column(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(json.dumps({"body": f"text {i}"}) for i in range(5)))
    assert read_documents(DataConfig(source=str(file), column="body"))["body"] == [f"text {i}" for i in range(5)]


def test_a_second_preparation_finds_the_first(tmp_path):
    write_documents(tmp_path)
    config = DataConfig(source=str(tmp_path), cache=str(tmp_path / "cache"))
    folder = prepare(config)
    stamp = (folder / "index.json").stat().st_mtime_ns
    assert prepare(config) == folder
    assert (folder / "index.json").stat().st_mtime_ns == stamp
    assert prepare(DataConfig(source=str(tmp_path), cache=str(tmp_path / "cache"), seed=1)) != folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "/nowhere/x.txt"}, "no such file"),
        ({"source": "{tmp}/*.txt"}, "matches no file"),
        ({"source": "{tmp}"}, "without .txt files"),
        ({"source": "{tmp}/one.text"}, "holds 1 document"),
        ({"source": "{tmp}/two.jsonl", "column": "body"}, r"data.column = 'body'.*\['text'\]"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tmp_path, settings, words):
    (tmp_path / "one.text").write_text("only one")
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    settings["source"] = settings["source"].replace("{tmp}", str(tmp_path))
    with pytest.raises(ValueError, match=words):
        read_documents(DataConfig(**settings))


@pytest.mark.parametrize("length", [7, 10, 33])
def test_windows_predict_every_token_once(length):
    tokens = numpy.arange(100, dtype=numpy.uint16)
    sequences = data.Sequences(tokens, length, whole=False)
    inputs, labels, used = (
        torch.stack(part) for part in zip(*(sequences[i] for i in range(len(sequences))), strict=True)
    )
    assert labels[used].tolist() == list(range(1, 100))
    assert torch.equal(inputs[used], labels[used] - 1)
    assert (labels[~used] == IGNORED).all()


def numbered(tokens=500):
    array = numpy.arange(tokens, dtype=numpy.uint16)
    return data.Corpus(array, array, tokens, torch.ones(tokens))


def samples_of(ranks, micro, first_sample, batches, **settings):
    """First tokens of the sequences that all ranks take, in the order of the run's samples."""
    config = DataConfig(sequence_length=10, **settings)
    options = {"first_sample": first_sample, "micro_batch": micro, "ranks": ranks}
    streams = [data.training_batches(numbered(), config, rank=rank, **options) for rank in range(ranks)]
    groups = itertools.islice(zip(*streams, strict=True), batches)
    return [start for group in groups for batch in group for start in batch[0][:, 0].tolist()]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (1, 3), (4, 4), (4, 1), (3, 5)])
def test_other_ranks_and_batch_sizes_go_on_at_the_exact_sample(ranks, micro):
    """Two ranks stop after 72 samples; what all ranks read before and after is the uninterrupted sequence."""
    whole = samples_of(1, 1, 0, 200)
    before = samples_of(2, 4, 0, 9)
    assert before == whole[:72]
    batches = 120 // (ranks * micro)
    assert samples_of(ranks, micro, 72, batches) == whole[72 : 72 + batches * ranks * micro]
    for epoch in range(4):
        assert sorted(whole[epoch * 49 : epoch * 49 + 49]) == list(range(0, 490, 10))


def test_loader_processes_change_nothing():
    assert samples_of(2, 4, 5, 4, workers=2) == samples_of(2, 4, 5, 4)


def test_an_epochs_order_is_a_permutation_of_its_own_and_never_changes():
    orders = [data.epoch_order(1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    # Published figures were trained in this order.
    assert data.epoch_order(10, 0, 0).tolist() == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
    assert data.epoch_order(1000, 7, 3)[:6].tolist() == [822, 564, 215, 687, 724, 520]
    assert data.epoch_order(1000, 0, 0).dtype == numpy.int32


@pytest.mark.parametrize("limit", [0, 5])
def test_held_out_sequences_are_shared_out_without_loss_and_in_equal_numbers(limit):
    corpus = numbered(100)
    options = {"limit": limit, "micro_batch": 2, "ranks": 3}
    by_rank = [list(data.heldout_batches(corpus, DataConfig(sequence_length=9), rank=r, **options)) for r in range(3)]
    assert len({len(batches) for batches in by_rank}) == 1
    targets = torch.cat([labels[used] for batches in by_rank for _, labels, used in batches])
    assert len(targets.unique()) == len(targets) == (99 if limit == 0 else 45)
