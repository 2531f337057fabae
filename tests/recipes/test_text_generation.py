"""The text recipe: readers, split, packing, tokenizers, model, cache, sampling, baselines, real runs."""

import argparse
import hashlib
import json
import math
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kaggle_mgpu import __main__ as command_line
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.launching import launch
from kaggle_mgpu.recipes import text_generation as tg
from kaggle_mgpu.recipes.text_generation import GPT, Config, TextGeneration, documents
from kaggle_mgpu.recipes.text_generation import corpus as corpus_file
from kaggle_mgpu.recipes.text_generation.corpus import TokenBlocks, choose_source, prepare
from kaggle_mgpu.recipes.text_generation.documents import (
    cut_at,
    digest_of,
    embedded_documents,
    plan_split,
    read_documents,
)
from kaggle_mgpu.recipes.text_generation.generation import probabilities
from kaggle_mgpu.recipes.text_generation.model import KVCache, _rotate
from kaggle_mgpu.recipes.text_generation.ngrams import Ngrams, ngram_losses
from kaggle_mgpu.recipes.text_generation.tokenizer import BPETokenizer, ByteTokenizer
from kaggle_mgpu.training import train

NON_ASCII = "naïve café — 数学 🙂 “quotes”\n\tdone"


@pytest.fixture(autouse=True)
def _no_inputs(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))


def small(tmp_path, **changes):
    values = {
        "tokenizer": "byte", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16,
        "global_batch_size": 8, "max_steps": 4, "output_dir": str(tmp_path / "run"), **changes,
    }  # fmt: skip
    return Config(**values)


def tiny_gpt(**changes):
    torch.manual_seed(0)
    return GPT(**{"n_vocab": 257, "n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 24, **changes})


def lines(tmp_path, n=200):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of the only book\n" for i in range(n)), encoding="utf-8")
    return path


# Configuration
def test_config_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"n_embd: expected a multiple of 2 x n_head = 16 .* got 100"):
        Config(n_embd=100)
    with pytest.raises(ValueError, match=r"block_size: expected 2 or more, got 1"):
        Config(block_size=1)
    with pytest.raises(ValueError, match=r"val_fraction <= 0.5 .* got 0.7"):
        Config(val_fraction=0.7)


# Readers
def test_the_rate_falls_with_the_width_where_none_is_given(tmp_path: Path) -> None:
    assert Config().lr == 1e-3
    assert [Config(n_embd=width).lr for width in (64, 512, 4096)] == [4e-3, 5e-4, 1e-4], "no lower than min_lr"
    assert Config(n_embd=64, lr=2e-4).lr == 2e-4
    assert Config.from_dict({"n_embd": "128", "lr": "auto"}).lr == 2e-3, "as from papermill"
    assert Config().replace(n_embd=128).lr == 2e-3
    assert Config(lr=1e-3).replace(n_embd=128).lr == 1e-3
    (tmp_path / "run.yaml").write_text("n_layer: 2\n")
    given = argparse.Namespace(config=tmp_path / "run.yaml", make_variables=[], n_embd=128)
    assert command_line._config(given, Config).lr == 2e-3, "a flag beside a file without a rate"


def test_txt_and_folder_in_sorted_order_with_bom_and_windows_lines(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nline")
    (tmp_path / "a.TXT").write_text("first")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("not text for us")
    assert list(read_documents(tmp_path)) == ["first", "second\nline"]
    assert list(read_documents(tmp_path / "a.TXT")) == ["first"]


def test_txt_that_is_not_utf8_says_where(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8 text, got byte 0xe9 at position 3"):
        list(read_documents(tmp_path / "a.txt"))


def test_jsonl_reads_the_field_and_names_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "tw\\u00f6 \\ud800"}\n', encoding="utf-8")
    assert list(read_documents(path, "body")) == ["one", "twö ?"]
    for bad, message in {
        '{"body": "x"': r"a\.jsonl, line 2: not valid JSON",
        '{"text": "x"}': r"a\.jsonl, line 2: expected a JSON object with the field 'body' .* got the fields 'text'",
        "[1]": r"a\.jsonl, line 2: expected a JSON object .* got list",
        '{"body": 3}': r"a\.jsonl, line 2: expected a string in 'body', got int",
    }.items():
        path.write_text('{"body": "one"}\n' + bad + "\n")
        with pytest.raises(ValueError, match=message):
            list(read_documents(path, "body"))


def test_parquet_reads_the_column_and_names_a_bad_row(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"id": [1, 2], "text": ["one", "two"]}), path)
    assert list(read_documents(path)) == ["one", "two"]
    with pytest.raises(ValueError, match=r"a\.parquet: expected a column 'body' .* got the columns \['id', 'text'\]"):
        list(read_documents(path, "body"))
    parquet.write_table(arrow.table({"text": ["one", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: expected a string in 'text', got NoneType"):
        list(read_documents(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable \.parquet file: "):
        list(read_documents(path))


@pytest.mark.parametrize("package", ["pyarrow", "tokenizers"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    data = str(tmp_path / "a.parquet") if package == "pyarrow" else None
    with pytest.raises(ImportError, match=f"needs the package `{package}`: pip install {package}"):
        prepare(small(tmp_path, data_path=data, tokenizer="bpe"))


def test_auto_falls_back_to_bytes_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    task = TextGeneration(small(tmp_path, tokenizer="auto", data_path=str(lines(tmp_path))))
    assert "`tokenizers` is not installed" in task.describe()
    assert task.corpus.kind == "byte"


def test_paths_that_hold_no_text_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data_path: no \.txt, \.jsonl, \.parquet file in .*empty"):
        list(read_documents(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"data_path: no such file or folder: .*nowhere"):
        list(read_documents(tmp_path / "nowhere"))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match=r"data_path: expected a file ending in .* got .*a\.md"):
        list(read_documents(tmp_path / "a.md"))


@pytest.mark.parametrize("text", ["", "short"])
def test_too_little_text_is_an_error_at_once(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=r"a\.txt: too little text: .* block_size = 16 .* Give more text"):
        TextGeneration(small(tmp_path, data_path=str(tmp_path / "a.txt"))).model()


# Sources
def test_inputs_are_searched_and_the_largest_folder_of_text_wins(tmp_path):
    inputs = tmp_path / "kaggle" / "input" / "datasets" / "someone"
    for slug, files in {
        "small": {"a.txt": "a" * 600},
        "books": {"b.txt": "line\n" * 100, "C.TXT": "text\n" * 100},
        "earlier-run": {"metrics.jsonl": '{"kind": "train", "loss": 1.0}\n' * 500},
    }.items():
        (inputs / slug).mkdir(parents=True)
        for name, text in files.items():
            (inputs / slug / name).write_text(text)
    path, reason = choose_source(small(tmp_path))
    assert path == inputs / "books"
    assert reason == "of 2 input folders with .txt/.jsonl/.parquet text, the one with the most bytes"


def test_the_corpora_of_kaggles_image_come_before_the_embedded_text(tmp_path, monkeypatch):
    for module in (corpus_file, documents):
        monkeypatch.setattr(module, "NLTK", tmp_path)
    (tmp_path / "brown").mkdir()
    (tmp_path / "brown" / "README").write_text("About it.")
    (tmp_path / "brown" / "ca01").write_text("\n\tThe/at Fulton/np-tl and/or/cc ./.\n\nYes/rb ./.\n" * 50)
    path, reason = choose_source(small(tmp_path))
    assert path == tmp_path / "brown" and reason.endswith("; this corpus is on Kaggle's image")
    (text,) = read_documents(path)
    assert text.startswith("The Fulton and/or .\nYes .\n")
    assert prepare(small(tmp_path)).documents == 1
    (tmp_path / "gutenberg").mkdir()
    (tmp_path / "gutenberg" / "austen-emma.txt").write_text("Emma")
    assert choose_source(small(tmp_path))[0] == tmp_path / "gutenberg"


def test_what_an_earlier_session_prepared_is_used(tmp_path):
    text, where = lines(tmp_path), tmp_path / "kaggle" / "input" / "notebooks" / "ann" / "prepared" / "run"
    command = f"prepare text_generation --data-path {text} --tokenizer byte --block-size 16 --output-dir {where}"
    assert command_line.main(command.split()) == 0
    (made,) = (where / "data").iterdir()
    here = {"data_path": str(text), "output_dir": str(tmp_path / "here")}
    assert prepare(small(tmp_path, **here)).folder == str(made)
    assert not (tmp_path / "here").exists()
    assert Path(prepare(small(tmp_path, **here, val_fraction=0.2)).folder).parent == tmp_path / "here" / "data"


def test_embedded_text_is_english_and_repeats_no_long_paragraph():
    documents = embedded_documents()
    assert sum(len(d.encode()) for d in documents) > 200_000
    assert sum(d.count(" the ") for d in documents) > 2000
    paragraphs = [" ".join(p.split()) for d in documents for p in d.split("\n\n")]
    long = [p for p in paragraphs if len(p) > 200]
    assert len(set(long)) > 0.99 * len(long)


# Split
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 400)), min_size=1, max_size=30),
    st.floats(0, 0.5),
)
def test_split_holds_out_about_what_was_asked_and_cuts_one_document_at_most(documents, fraction):
    digests = [(f"{name}-{size}", size) for name, size in documents]
    cuts = plan_split(digests, fraction)
    sizes = [size for _, size in documents]
    held = sum(sizes) - sum(cuts)
    assert all(0 <= cut <= size for cut, size in zip(cuts, sizes, strict=True))
    assert int(fraction * sum(sizes)) / 2 <= held <= fraction * sum(sizes)
    assert sum(0 < cut < size for cut, size in zip(cuts, sizes, strict=True)) <= 1


def test_split_by_document_does_not_depend_on_their_order():
    documents = [(f"{i * 7919 % 100:02d}", 10 + i % 5) for i in range(100)]
    held = {d for d, cut in zip(documents, plan_split(documents, 0.1), strict=True) if cut == 0}
    again = documents[::-1]
    assert held == {d for d, cut in zip(again, plan_split(again, 0.1), strict=True) if cut == 0}
    assert 7 <= len(held) <= 10


def test_equal_documents_land_on_the_same_side():
    documents = [(name, 10) for name in "abcdefghijklmnopqrst" * 2]
    cuts = plan_split(documents, 0.19)  # room for seven documents: three pairs
    assert sum(cut == 0 for cut in cuts) == 6
    assert cuts[:20] == cuts[20:]


def cut_of_bytes(text: str, cut: int) -> int:
    """The same cut from the bytes of the whole text, which a long text has no room for."""
    data = text.encode("utf-8")
    if 0 < cut < len(data):
        line = data.rfind(b"\n", max(0, cut - 1000), cut) + 1
        cut = line or cut
        while data[cut] & 0xC0 == 0x80:
            cut -= 1
    return len(data[:cut].decode("utf-8"))


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.text(max_size=60), st.text("aé🙂\n", max_size=60), st.text("é ", min_size=490, max_size=520)),
    st.integers(0, 1100), st.integers(1, 70), st.booleans(),
)  # fmt: skip
def test_a_cut_is_that_of_the_bytes_in_slices_of_any_size(text: str, cut: int, slice_size: int, ends: bool) -> None:
    text = text.encode("utf-8", "replace").decode() + "\nx" * ends + "é" * 480 * ends
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SLICE", slice_size)
        assert cut_at(text, cut) == cut_of_bytes(text, cut)
        data = text.encode()
        assert digest_of(text) == (hashlib.sha256(data).hexdigest(), len(data))


def test_train_and_validation_share_no_byte_and_lose_none(tmp_path):
    path = lines(tmp_path)
    task = TextGeneration(small(tmp_path, data_path=str(path)))
    train, val = (task.corpus.blocks(part, 16).tokens for part in ("train", "val"))
    decode = ByteTokenizer().decode
    assert decode(train) + decode(val) == path.read_text()
    assert decode(train).endswith("book\n")
    assert 0.08 < len(val) / len(train) < 0.12
    assert train[0] == train[-1] == val[0] == val[-1] == ByteTokenizer.separator


# Packing
@settings(max_examples=80, deadline=None)
@given(st.integers(2, 200), st.integers(2, 40), st.integers(1, 7))
def test_blocks_predict_every_token_once_from_its_true_context(tmp_path_factory, n, block_size, batch_size):
    path = tmp_path_factory.mktemp("blocks") / "t.bin"
    stream = np.random.default_rng(n).integers(0, 257, n).astype("uint16")
    stream.tofile(path)
    blocks = TokenBlocks(path, "uint16", block_size)
    task = TextGeneration(Config(tokenizer="byte"))
    targets, count = [], 0
    for start in range(0, len(blocks), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(blocks)))
        x, y = batch = blocks.batch(indices)
        assert x.shape == y.shape == (len(indices), block_size)
        assert x.dtype == y.dtype == torch.int64
        for row, i in enumerate(indices.tolist()):
            real = int((y[row] != -100).sum())
            assert x[row, :real].tolist() == stream[i * block_size : i * block_size + real].tolist()
            assert torch.equal(blocks[i][1], y[row])
        targets += y[y != -100].tolist()
        count += task.count(batch)
    assert targets == stream[1:].tolist()
    assert count == n - 1


def test_a_pickled_dataset_carries_its_path_and_not_its_tokens(tmp_path):
    np.zeros(100_000, "uint16").tofile(tmp_path / "t.bin")
    blocks = TokenBlocks(tmp_path / "t.bin", "uint16", 8)
    blocks.batch(torch.tensor([0]))
    data = pickle.dumps(blocks)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data)[3][0], blocks[3][0])


def test_a_second_run_reuses_the_files_and_a_changed_text_gets_new_ones(tmp_path):
    config = small(tmp_path, data_path=str(lines(tmp_path)), tokenizer="bpe", vocab_size=300)
    pytest.importorskip("tokenizers")
    first = prepare(config)
    before = {f: f.stat().st_mtime_ns for f in Path(first.folder).iterdir()}
    assert {f.name for f in before} == {"train.bin", "val.bin", "corpus.json", "tokenizer.json"}
    half = Path(first.folder).with_suffix(".tmp")
    half.mkdir()
    assert prepare(config.replace(block_size=32)) == first
    assert {f: f.stat().st_mtime_ns for f in Path(first.folder).iterdir()} == before
    assert prepare(config.replace(val_fraction=0.2)).folder != first.folder
    assert prepare(config.replace(tokenizer="byte")).folder != first.folder
    lines(tmp_path, 201)
    assert prepare(config).folder != first.folder


def test_text_in_many_batches_gives_the_same_tokens_and_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, data_path=str(lines(tmp_path)), tokenizer="bpe", vocab_size=280)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    want = prepare(config)
    assert "tokenising" not in capsys.readouterr().out
    monkeypatch.setattr(corpus_file, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(corpus_file, "FIRST_SECONDS", 0)
    monkeypatch.setattr(corpus_file, "PROGRESS_SECONDS", 0)
    found = prepare(config.replace(output_dir=str(tmp_path / "other")))
    assert (found.digest, found.train_tokens, found.val_bytes) == (want.digest, want.train_tokens, want.val_bytes)
    said = capsys.readouterr().out
    assert [line in said for line in ("reading: 0 MB", "learning a vocabulary: 0 of 0", "tokenising: 0 of 0 MB")] == [
        True
    ] * 3
    assert os.environ.get("TOKENIZERS_PARALLELISM") == "false", "as before: loader processes are forked"


@pytest.mark.parametrize("word", ["word ", "слово ", "数学 "])
def test_learning_a_vocabulary_counts_up_to_its_total(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    made: list[corpus_file.Progress] = []

    class Kept(corpus_file.Progress):
        def __init__(self, doing: str, total: int | None = None) -> None:
            super().__init__(doing, total)
            made.append(self)

    monkeypatch.setattr(corpus_file, "Progress", Kept)
    monkeypatch.setattr(corpus_file, "SAMPLE_CHARACTERS", 100)
    text = word * 200
    size = len(text.encode())
    assert "".join(corpus_file._samples(iter([(text, len(text))]), size)) == text
    assert (made[0].done, made[0].total) == (size, size)
    # with a limit of characters, the total is the bytes of these characters
    monkeypatch.setattr(corpus_file, "MOST_CHARACTERS", limit := len(text) // 2)
    characters = 0
    for piece in corpus_file._samples(iter([(text, len(text))]), size):
        characters += len(piece)
        if characters >= limit:
            break
    assert made[1].total is not None
    assert abs(made[1].total - size / 2) < 20
    assert 0 <= made[1].total - made[1].done <= len(piece.encode()) + 20, "the last piece is not counted yet"


def test_what_a_killed_preparation_left_is_replaced(tmp_path):
    config = small(tmp_path, data_path=str(lines(tmp_path)))
    folder = Path(prepare(config).folder)
    want = (folder / "train.bin").read_bytes()
    folder.rename(folder.with_suffix(".tmp"))
    (folder.with_suffix(".tmp") / "train.bin").write_bytes(b"half")
    assert (Path(prepare(config).folder) / "train.bin").read_bytes() == want
    assert not folder.with_suffix(".tmp").exists()


# Tokenizers
@settings(max_examples=50, deadline=None)
@given(st.text(max_size=50).filter(lambda t: t.isprintable()))
def test_bytes_round_trip(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_bytes_decode_skips_separators_and_broken_characters():
    assert ByteTokenizer().decode([256, 104, 256, 0xE9, 105]) == "h\ufffdi"


def test_bpe_round_trip_with_text_it_never_saw(tmp_path):
    pytest.importorskip("tokenizers")
    corpus = prepare(small(tmp_path, data_path=str(lines(tmp_path)), tokenizer="bpe", vocab_size=280))
    tokenizer = corpus.tokenizer()
    assert tokenizer.n_vocab == corpus.n_vocab <= 280
    ids = tokenizer.encode(NON_ASCII)
    assert max(ids) < tokenizer.separator == tokenizer.n_vocab - 1
    assert tokenizer.decode([tokenizer.separator, *ids]) == NON_ASCII
    assert len(tokenizer.encode("the only book")) < len("the only book")
    path = tmp_path / "again.json"
    BPETokenizer.train(iter(["line 1 of the only book\n"] * 3), 280, path)
    first = path.read_bytes()
    BPETokenizer.train(iter(["line 1 of the only book\n"] * 3), 280, path)
    assert path.read_bytes() == first


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("ab  \n\n\t\x1c\xa0é'sx1.🙂"), max_size=80), st.integers(0, 80), st.integers(1, 9))
def test_words_learnt_from_pieces_are_those_of_the_whole(text: str, end: int, size: int) -> None:
    """As before long texts were cut, so that a text has the tokenizer that it had."""
    tokenizers = pytest.importorskip("tokenizers")
    end = min(end, len(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_file, "SAMPLE_CHARACTERS", size)
        pieces = list(corpus_file._samples(iter([(text, end)]), 100))
    assert "".join(pieces) == text[:end]
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert [word for piece in pieces for word, _ in split(piece)] == [word for word, _ in split(text[:end])]


def test_the_tokens_are_those_of_a_text_that_is_learnt_from_and_encoded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = "\n\n".join(embedded_documents()[:6]) + NON_ASCII
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    BPETokenizer.train(iter([text]), 400, tmp_path / "whole.json")
    monkeypatch.setattr(corpus_file, "SAMPLE_CHARACTERS", 700)
    config = small(tmp_path, data_path=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=400, val_fraction=0)
    corpus = prepare(config)
    assert (Path(corpus.folder) / "tokenizer.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "whole.json")).encode(text).ids
    assert np.fromfile(Path(corpus.folder) / "train.bin", np.uint16).tolist() == [399, *ids, 399]


def test_bpe_is_not_trained_on_held_out_text(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("line of words\n" * 90 + "zyxwvut zyxwvut\n" * 9)
    corpus = prepare(small(tmp_path, data_path=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=280))
    assert len(corpus.tokenizer().encode("zyxwvut")) == 7
    assert len(corpus.tokenizer().encode("line of words")) < 7


def test_long_texts_are_encoded_in_pieces_that_join_up(tmp_path):
    text = "x" * 1_500_000 + "\n" + "a line\n" * 100_000
    (tmp_path / "a.txt").write_text(text)
    corpus = prepare(small(tmp_path, data_path=str(tmp_path / "a.txt"), val_fraction=0))
    assert ByteTokenizer().decode(corpus.blocks("train", 16).tokens) == text


# Model
def test_default_size_and_initial_loss():
    config = Config()
    torch.manual_seed(0)
    model = GPT(2048, config.n_layer, config.n_head, config.n_embd, config.block_size)
    per_layer = 4 * 256**2 + 3 * 256 * 1024 + 2 * 256
    assert sum(p.numel() for p in model.parameters()) == 8 * per_layer + 2048 * 256 + 256
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    x = torch.randint(0, 2048, (1, 64))
    logits = model(x)
    assert logits.shape == (1, 64, 2048)
    loss = torch.nn.functional.cross_entropy(logits[0], torch.randint(0, 2048, (64,)))
    assert abs(loss.item() - math.log(2048)) < 0.2


def test_state_dict_has_each_storage_once(tmp_path):
    model = tiny_gpt()
    state = model.state_dict()
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    save_file(state, tmp_path / "m.safetensors")
    other = tiny_gpt()
    torch.nn.init.normal_(other.embedding.weight)
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    x = torch.randint(0, 257, (2, 9))
    assert torch.equal(model(x), other(x))


def test_rotary_positions_turn_by_distance_alone():
    model = tiny_gpt()
    q, k = torch.randn(16), torch.randn(16)

    def score(i, j):
        return torch.dot(*(_rotate(x, model.cos[at], model.sin[at]) for x, at in ((q, i), (k, j)))).item()

    assert score(9, 4) == pytest.approx(score(20, 15), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)
    assert score(0, 0) == pytest.approx(torch.dot(q, k).item(), abs=1e-5)


def test_the_future_is_not_seen_and_order_matters():
    model = tiny_gpt()
    x = torch.randint(0, 257, (1, 12))
    changed = x.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 257
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 8:], b[:, 8:])
    swapped = x[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(a[:, -1], model(swapped)[:, -1], atol=1e-6)
    with pytest.raises(ValueError, match="at most block_size = 24 tokens, got 25"):
        model(torch.zeros(1, 25, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_a_finite_loss_near_the_exact_one(tmp_path, dtype):
    task = TextGeneration(small(tmp_path, data_path=str(lines(tmp_path))))
    torch.manual_seed(0)
    model = task.model()
    batch = task.train_data().batch(torch.arange(64) % len(task.train_data()))
    with torch.autocast("cpu", dtype):
        loss = task.loss(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert loss.item() == pytest.approx(task.loss(model, batch).item(), rel=0.01)


def test_gradient_checkpointing_gives_the_same_gradients():
    x, grads = torch.randint(0, 257, (2, 24)), []
    for enable in (False, True):
        model = tiny_gpt(dropout=0.1)
        if enable:
            model.gradient_checkpointing_enable()
        calls = []
        # before, not after: the recomputation stops as soon as it has what backward needs
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        # autograd.grad, which reentrant checkpointing (the kind that fails under DDP) does not allow
        grads.append(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))
        assert len(calls) == 1 + enable
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_loss_is_a_sum_and_ignores_padding(tmp_path):
    task = TextGeneration(small(tmp_path, data_path=str(lines(tmp_path))))
    torch.manual_seed(0)
    model, val = task.model(), task.val_data()
    whole = val.batch(torch.arange(len(val)))
    parts = [val.batch(torch.tensor([i])) for i in range(len(val))]
    assert task.count(whole) == sum(map(task.count, parts)) == val.n_tokens - 1
    total = task.loss(model, whole).item()
    assert total == pytest.approx(sum(task.loss(model, part).item() for part in parts), rel=1e-5)
    row, targets = whole[0][:1], whole[1][:1]
    logp = model(row).log_softmax(-1)
    by_hand = -sum(logp[0, t, int(targets[0, t])] for t in range(16))
    assert task.loss(model, (row, targets)).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_summary_reports_perplexity_and_bits_per_byte(tmp_path):
    task = TextGeneration(small(tmp_path, data_path=str(lines(tmp_path))))
    got = task.summary({"loss": torch.tensor(math.log(256))})
    assert got["perplexity"] == pytest.approx(256, rel=1e-5)
    # one separator more than there are bytes
    assert got["bits_per_byte"] == pytest.approx(8 * (1 + 1 / task.corpus.val_bytes), rel=1e-5)
    assert task.summary({"loss": torch.tensor(1e9)})["perplexity"] < math.inf


# Generation
@pytest.mark.parametrize("steps", [[24], [1] * 24, [5, 1, 1, 9, 8]])
def test_cached_logits_equal_the_uncached_forward(steps):
    model = tiny_gpt().eval()
    x = torch.randint(0, 257, (2, 24))
    cache, parts, at = KVCache(model, batch_size=2), [], 0
    with torch.no_grad():
        for step in steps:
            parts.append(model(x[:, at : at + step], cache))
            at += step
        assert (torch.cat(parts, 1) - model(x)).abs().max() < 1e-5
    assert cache.length == 24


@pytest.mark.parametrize("prompt", ["", "ab", "a prompt that is far longer than the context of 24"])
def test_greedy_text_equals_full_recomputation_beyond_the_context(prompt):
    model, tokenizer = tiny_gpt(), ByteTokenizer()
    # weights large enough that every layer has a say in which token comes next
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    got = tg.generate(model, tokenizer, prompt, max_new_tokens=60, temperature=0)
    tokens, start = [256, *prompt.encode()], 0
    with torch.no_grad():
        for _ in range(60):
            if len(tokens) - start > 24:
                start = len(tokens) - 12
            token = int(model.eval()(torch.tensor([tokens[start:]]))[0, -1].argmax())
            if token == 256:
                break
            tokens.append(token)
    assert len(tokens) > 40
    assert len(set(tokens)) > 8
    assert got == tokenizer.decode(tokens)


def test_sampling_repeats_with_its_seed_and_leaves_the_model_as_it_was():
    model = tiny_gpt().train()
    state = torch.random.get_rng_state()
    texts = [tg.generate(model, ByteTokenizer(), "x", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(TypeError, match=r"expected a model of class GPT, .* got Linear"):
        tg.generate(torch.nn.Linear(1, 1), ByteTokenizer())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=12, unique=True),
    st.integers(1, 12),
    st.floats(0.05, 1.0),
    st.floats(0.1, 3.0),
)
def test_top_k_and_top_p_keep_the_likeliest_and_their_proportions(values, top_k, top_p, temperature):
    logits = torch.tensor(values)
    full = probabilities(logits, temperature)
    assert torch.allclose(full, (logits / temperature).softmax(0), atol=1e-6)
    p = probabilities(logits, temperature, top_k, top_p)
    kept = p > 0
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert 1 <= kept.sum() <= top_k
    assert p[logits.argmax()] > 0
    assert not (~kept).any() or full[kept].min() >= full[~kept].max()
    assert torch.allclose(p[kept] / p[kept].sum(), full[kept] / full[kept].sum(), atol=1e-5)
    only_p = probabilities(logits, temperature, None, top_p)
    held = full[only_p > 0]
    assert held.sum() >= top_p - 1e-5
    assert held.sum() - held.min() < top_p + 1e-5


def test_temperature_zero_is_greedy_and_nonsense_is_refused():
    assert probabilities(torch.tensor([0.0, 3.0, 1.0]), 0).tolist() == [0, 1, 0]
    for options in ((-1.0,), (1.0, 0), (1.0, None, 0.0), (1.0, None, 1.5)):
        with pytest.raises(ValueError, match="expected temperature >= 0, top_k >= 1 and 0 < top_p <= 1"):
            probabilities(torch.zeros(3), *options)


# Baselines
def test_ngrams_by_hand():
    tables = Ngrams(np.array([0, 1, 0, 1, 1], "uint16"), n_vocab=3)
    # targets 1 0 1 1: p(0) = 2/7, p(1) = 4/7, p(2) = 1/7 with k = 1; pairs 01 twice, 10 once, 11 once
    unigram, bigram = tables.losses(np.array([0, 1, 2], "uint16"), k=1.0, m=2.0)
    assert unigram == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)
    p_01, p_12 = (2 + 2 * 4 / 7) / (2 + 2), (0 + 2 * 1 / 7) / (2 + 2)
    assert bigram == pytest.approx(-(math.log(p_01) + math.log(p_12)) / 2)
    every = np.array([[a, b] for a in range(3) for b in range(3)])
    for a in range(3):
        losses = [tables.losses(pair, 1.0, 2.0) for pair in every[every[:, 0] == a]]
        assert sum(math.exp(-u) for u, _ in losses) == pytest.approx(1)
        assert sum(math.exp(-b) for _, b in losses) == pytest.approx(1)


def test_a_bigram_table_learns_a_chain_that_a_unigram_cannot():
    stream = np.tile(np.arange(50, dtype="uint16"), 40)
    unigram, bigram = ngram_losses(stream, stream[:500], 50)
    assert unigram == pytest.approx(math.log(50), rel=0.01)
    assert bigram < 0.1


def test_baselines_use_the_tasks_own_validation_tokens(tmp_path):
    task = TextGeneration(small(tmp_path, data_path=str(lines(tmp_path))))
    got = tg.baselines(task)
    assert got["bigram"] < got["unigram"] < math.log(257)
    assert got["bigram_bits_per_byte"] == pytest.approx(task.corpus.bits_per_byte(got["bigram"]))
    with pytest.raises(ValueError, match="expected held-out text, got val_fraction=0"):
        tg.baselines(TextGeneration(task.config.replace(val_fraction=0)))


# The whole
def test_a_model_learns_in_a_few_plain_steps_and_speaks(tmp_path):
    task = tg.task(small(tmp_path, data_path=str(lines(tmp_path))))
    torch.manual_seed(0)
    model, data, losses = task.model(), task.train_data(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = data.batch((torch.arange(8) + 8 * step) % len(data))
        loss = task.loss(model, batch) / task.count(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(257), rel=0.1)
    assert losses[-1] < tg.baselines(task)["unigram"] - 0.5
    text = task.sample(model, "line ", max_new_tokens=10)
    assert text.startswith("line ")
    assert len(text) > 5


def test_the_trainer_trains_it_and_reports_what_the_task_says(tmp_path):
    config = small(tmp_path, data_path=str(lines(tmp_path)), lr=1e-2, warmup_steps=2, max_steps=30, log_every=5)
    task = TextGeneration(config)
    result = train(config, task)
    assert result.finished
    assert result.metrics["loss"] < tg.baselines(task)["unigram"]
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))
    assert result.metrics["bits_per_byte"] == pytest.approx(task.corpus.bits_per_byte(result.metrics["loss"]))
    records = [r for r in result.records() if r["kind"] == "train"]
    assert records[0]["loss"] == pytest.approx(math.log(257), rel=0.1)
    assert "tokens_per_s" in records[-1]
    model = result.load(task.model())
    by_hand = task.loss(model, task.val_data().batch(torch.arange(len(task.val_data())))).item()
    assert by_hand / (task.corpus.val_tokens - 1) == pytest.approx(result.metrics["loss"], rel=1e-4)


def test_two_processes_share_one_preparation_and_give_the_weights_of_one(tmp_path):
    config = small(tmp_path, data_path=str(lines(tmp_path)), max_steps=6, eval_every=3, strategy="ddp", nproc=2)
    two = launch(train, config, TextGeneration(config))
    assert two.world_size == 2
    task = TextGeneration(config)
    samples = {record["step"]: record["sample"] for record in two.records() if record["kind"] == "eval"}
    assert [*samples] == [3, 6]
    assert samples[6] == task.sample(two.load(task.model()), "The ", max_new_tokens=40) != samples[3]
    assert pickle.loads(pickle.dumps(task)).__dict__["_trained"] is None, "weights do not travel with a launch"
    assert len(list((tmp_path / "run" / "data").iterdir())) == 1
    alone = config.replace(strategy="single", nproc=1, output_dir=str(tmp_path / "alone"))
    one = train(alone, TextGeneration(alone))
    assert two.metrics == pytest.approx(one.metrics, rel=1e-5)
    assert samples == {record["step"]: record["sample"] for record in one.records() if record["kind"] == "eval"}
    a, b = (load_file(Path(run.output_dir) / "model.safetensors") for run in (one, two))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_two_processes_both_hear_of_a_bad_file(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    config = small(tmp_path, data_path=str(tmp_path / "a.txt"), strategy="ddp", nproc=2)
    with pytest.raises(ValueError, match="too little text"):
        launch(train, config, TextGeneration(config))


def test_a_checkpoint_of_another_text_is_refused(tmp_path):
    config = small(tmp_path, data_path=str(lines(tmp_path)), max_steps=2, save_every=1)
    train(config, TextGeneration(config))
    lines(tmp_path, 150)
    with pytest.raises(CheckpointError, match=r"TextGeneration [0-9a-f]{16}"):
        train(config.replace(max_steps=4), TextGeneration(config))


def test_pickled_tasks_keep_what_was_prepared(tmp_path):
    task = TextGeneration(small(tmp_path, data_path=str(lines(tmp_path))))
    description = task.describe()
    assert str(tmp_path / "book.txt") in description
    assert "byte, 257 ids" in description
    copy = pickle.loads(pickle.dumps(task))
    (tmp_path / "book.txt").unlink()
    assert copy.describe() == description
    facts = json.loads((Path(copy.corpus.folder) / "corpus.json").read_text())
    assert facts["train_tokens"] == copy.train_data().n_tokens
