"""A sentence encoder that is small enough to be trained in a moment, and sets of rows that it can learn."""

import gzip

import numpy as np
import pytest

WORDS = tuple(
    "cat dog bird fish runs sleeps eats sings red blue green old young house tree river stone cloud rain sun".split()  # noqa: SIM905
)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A saved sentence encoder: BERT of two layers and 32 features with random weights, one token a word."""
    library = pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    encoder = library.SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    encoder.save(str(folder / "encoder"))
    return str(folder / "encoder")


def write_tsv(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode("utf-8")))


def sentences(count, seed):
    """Different sentences of five words."""
    generator = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        found[" ".join(generator.choice(WORDS, 5))] = None
    return list(found)


def similar_pairs(count, seed):
    """Rows of two sentences and how many words they share, at most five."""
    generator, rows = np.random.default_rng(seed), []
    for sentence in sentences(count, seed):
        words = sentence.split()
        kept = int(generator.integers(6))
        other = words[:kept] + list(generator.choice(WORDS, 5 - kept))
        rows.append((sentence, " ".join(other), str(kept)))
    return rows


@pytest.fixture
def data_dir(tmp_path):
    """Two sets of pairs, of which one's training rows stand in part in the other's test rows, and one of classes."""
    folder = tmp_path / "data"
    train, other = similar_pairs(48, 0), similar_pairs(24, 1)
    header = "sentence1\tsentence2\tscore"
    splits = {"train": train, "dev": similar_pairs(16, 2), "test": similar_pairs(20, 3)}
    for split, rows in splits.items():
        write_tsv(folder / "near" / f"{split}.tsv.gz", [header, *map("\t".join, rows)])
    # The first five stand in the training rows of the other set: one turned round, one in capitals.
    leaked = [(train[0][1], train[0][0], "1"), (train[1][0].upper() + "!", train[1][1], "1"), *train[2:5]]
    write_tsv(folder / "far" / "test.tsv.gz", [header, *map("\t".join, [*leaked, *other])])
    texts = sentences(90, 4)
    for split, part in {"train": texts[:60], "dev": texts[60:72], "test": texts[72:]}.items():
        lines = [f"{text}\t{'animal' if text < 'h' else 'place'}" for text in part]
        write_tsv(folder / "kinds" / f"{split}.tsv.gz", ["text\tlabel", *lines])
    return folder


@pytest.fixture
def make_pairs():
    return similar_pairs
