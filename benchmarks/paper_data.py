"""The arrays that `paper.py` trains on, made from tables of texts: what trains needs no tokenizer.

`prepare` writes for each task `NAME.npz`, with arrays called `SPLIT/WHAT`. The tables are in a folder of data as
`README.md` here describes it. It needs `tokenizers`, and for GLUE a `vocab.txt` of word pieces.
"""

import gzip

import numpy as np

from tasks import tables
from tasks.sequences import byte_pairs

GLUE = ("cola", "mrpc", "rte", "stsb", "sst2")
TASKS = ("multi30k", *GLUE)
WITHOUT_TEST = ("cola", "rte")  # Tested on `dev`, as in the paper; rows of training stand in for it.
NUM_VALIDATION = 500  # At most a tenth of the rows of training.
VOCABULARY_SIZE = 10_000
PADDING, START, END = range(3)
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
LONGEST_CAPTION, LONGEST_ROW = 40, 128  # Tokens of Multi30k's captions and of GLUE's rows. Longer ones are cut.


def prepare(data, encoder, arrays):
    """Writes the arrays of all tasks to the folder `arrays`."""
    arrays.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        content = multi30k(data) if name == "multi30k" else glue(data, name, encoder / "vocab.txt")
        np.savez_compressed(arrays / f"{name}.npz", **content)
        print(f"{name}: " + ", ".join(f"{key} {array.shape}" for key, array in content.items() if "source" not in key))


# ## Translation, German to English
SPLITS = {"train": "train", "validation": "valid", "test": "test"}


def multi30k(data):
    """`source`, `target` and the `reference` of each split, and the bytes of each piece of the shared vocabulary."""
    texts = {split: tables.multi30k(data, name) for split, name in SPLITS.items()}
    german, english = texts["train"]
    vocabulary, merges = byte_pairs(german + english, VOCABULARY_SIZE, SPECIALS)
    tokenizer = tokenizer_of(vocabulary, merges)
    result = {"pieces": np.array([pieces_as_bytes(piece) for piece in sorted(vocabulary, key=vocabulary.get)])}
    for split, columns in texts.items():
        for what, column in zip(("source", "target"), columns):
            rows = [[START, *row.ids[: LONGEST_CAPTION - 2], END] for row in tokenizer.encode_batch(column)]
            result[f"{split}/{what}"] = padded(rows, LONGEST_CAPTION)
        result[f"{split}/reference"] = np.array(columns[1])
    return result


def tokenizer_of(vocabulary, merges):
    import tokenizers

    return tokenizers.ByteLevelBPETokenizer(vocabulary, [tuple(pair.split(" ")) for pair in merges])


def pieces_as_bytes(piece):
    """The bytes that a piece stands for: byte-level encoding writes each byte as a printable character."""
    if piece in SPECIALS:
        return b""
    return bytes(BYTE_OF[character] for character in piece)


def _byte_of():
    """GPT-2's map from printable characters to bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of()


def text_of(tokens, pieces):
    """The text of a row of tokens up to its end."""
    tokens = list(tokens)
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    return b"".join(pieces[token] for token in tokens).decode("utf-8", errors="replace").strip()


# ## GLUE
def glue(data, name, vocabulary):
    """`token_ids`, `segment_ids` and the `label` of each split; without a test split `dev` is tested."""
    import tokenizers

    tokenizer = tokenizers.BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    tokenizer.enable_truncation(LONGEST_ROW)
    train, dev = (tables.glue(data, name, split) for split in ("train", "dev"))
    if name in WITHOUT_TEST:
        order = np.random.RandomState(0).permutation(len(train[1]))
        held_out = min(NUM_VALIDATION, len(order) // 10)
        splits = {"train": chosen(train, order[held_out:]), "validation": chosen(train, order[:held_out]), "test": dev}
    else:
        splits = {"train": train, "validation": dev, "test": tables.glue(data, name, "test")}
    encoded = {}
    for split, (texts, _) in splits.items():
        encoded[split] = tokenizer.encode_batch(list(zip(*texts)) if len(texts) > 1 else texts[0])
    length = max(len(row.ids) for rows in encoded.values() for row in rows)
    result = {}
    for split, rows in encoded.items():
        result[f"{split}/token_ids"] = padded([row.ids for row in rows], length)
        result[f"{split}/segment_ids"] = padded([row.type_ids for row in rows], length)
        result[f"{split}/label"] = splits[split][1]
    return result


def chosen(split, rows):
    texts, labels = split
    return tuple([column[row] for row in rows] for column in texts), labels[rows]


def padded(rows, length):
    result = np.full((len(rows), length), PADDING, "int32")
    for row, tokens in zip(result, rows):
        row[: len(tokens)] = tokens
    return result


# ## Small tables, for `--tiny`
def write_tiny_tables(folder, num_rows=24):
    """Tables of nonsense in the form of the real ones, and a vocabulary of its words."""
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bdfgklmn" for b in ("a", "e", "i", "o")]

    def write(path, columns, firsts=None):
        """A table whose first column is `firsts`; the others have sentences."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ["\t".join(columns)]
        for i in range(num_rows):
            sentences = [" ".join(rng.choice(words, 4)) for _ in columns]
            lines.append("\t".join(sentences if firsts is None else [str(firsts[i]), *sentences[1:]]))
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    for split in SPLITS.values():
        write(folder / "multi30k" / f"{split}.tsv.gz", ("en", "de"))
    for name in GLUE:
        label = "score" if name == "stsb" else "label"
        columns = ("sentence1", "sentence2") if name in tables.GLUE_PAIRS else ("sentence",)
        for split in ("train", "dev", "test"):
            write(folder / "glue" / name / f"{split}.tsv.gz", (label, *columns), [i % 2 for i in range(num_rows)])
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), "utf-8")
