"""What the tutorials print when they are trained to their best on one processor core, with R-Drop and without.

A page of `examples/` is run as it is, cell after cell. `PAGES` says which of its constants are replaced, and by what
its data: what a page downloads by default is too much for one core. Plain training is the same page with `ALPHA = 0`.

    python benchmarks/tutorial_results.py translation --data FOLDER

`FOLDER` has `multi30k`, `glue` and `wikitext2`, and `cifar10_15k.zip` with images in `train/CLASS` and `test/CLASS`.
Results are added to `benchmarks/results/tutorials.json`, and a run that is there is not repeated. What a page printed
goes to `docs/outputs/`. A run that was interrupted goes on where it was, if `--work` is the same.
"""

import argparse
import contextlib
import gzip
import os
import pathlib
import re
import shutil
import sys
import time
import types

import measure
from tasks import sequences, tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tutorials.json"
KINDS = ("plain", "rdrop")


def multi30k(folder, work):
    """Captions of photographs in English and German, 29,000 pairs."""
    import tensorflow as tf

    for split in ("train", "valid", "test"):
        german, english = tables.multi30k(folder, split)
        yield tf.data.Dataset.from_tensor_slices((english, german))


def mrpc(folder, work):
    """Pairs of sentences in the first split of MRPC, 3,576 to train on and 500."""
    import tensorflow as tf

    for split in ("train", "dev"):
        (first, second), labels = tables.glue(folder, "mrpc", split)
        yield tf.data.Dataset.from_tensor_slices({"sentence1": first, "sentence2": second, "label": labels})


def mrpc_scores(page, folder):
    """Those that the page prints, of the dev split, and those of the test split, which has no part in training."""
    from sklearn import metrics

    (texts, labels) = tables.glue(folder, "mrpc", "test")
    classes = page["classifier"].predict(texts, batch_size=page["BATCH_SIZE"], verbose=0).argmax(axis=-1)
    test = {"test accuracy": metrics.accuracy_score(labels, classes), "test F1": metrics.f1_score(labels, classes)}
    return {"accuracy": page["accuracy"], "F1": page["f1"], **test}


def minilm(folder, work, encoder):
    """A pretrained encoder of six layers."""
    return encoder


def wikitext2(folder, work):
    """Articles of Wikipedia: 214,000 words to train on. The words that the data set has left out are left out."""
    import tensorflow as tf

    for split in ("train", "valid", "test"):
        with gzip.open(folder / "wikitext2" / f"{split}.txt.gz", "rt", encoding="utf-8") as file:
            yield tf.data.Dataset.from_tensor_slices({"text": [file.read().replace("<unk>", "")]})


def small_gpt2(folder, work, encoder):
    """A GPT-2 of two layers with random weights, and a vocabulary learned from the text to train on."""
    import keras_hub

    text = next(wikitext2(folder, work)).as_numpy_iterator().next()["text"].decode()
    vocabulary, merges = sequences.byte_pairs(text.splitlines(), 4000)
    vocabulary["<|endoftext|>"] = len(vocabulary)  # Last, as in GPT-2's own: generation takes 0 for the end otherwise.
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges)
    backbone = keras_hub.models.GPT2Backbone(len(vocabulary), 2, 4, 128, 512, dropout=0.1, max_sequence_length=128)
    return saved(work / "preset", backbone, tokenizer)


def cifar10(folder, work):
    """Photographs of 32 by 32 pixels, 9,000 to train on, and what `with_info` gives."""
    import keras

    images = work / "images"
    shutil.unpack_archive(folder / "cifar10_15k.zip", images)
    options = {"image_size": (32, 32), "batch_size": None, "verbose": False}
    train, validation = keras.utils.image_dataset_from_directory(
        images / "train", validation_split=0.1, subset="both", seed=0, **options
    )
    test = keras.utils.image_dataset_from_directory(images / "test", shuffle=False, **options)
    label = types.SimpleNamespace(names=train.class_names)
    return (train, validation, test), types.SimpleNamespace(features={"label": label})


def small_vit(folder, work, encoder):
    """A ViT of four layers with random weights."""
    import keras_hub

    converter = keras_hub.layers.ViTImageConverter(image_size=(32, 32), scale=1 / 127.5, offset=-1.0)
    preprocessor = keras_hub.models.ViTImageClassifierPreprocessor(converter)
    backbone = keras_hub.models.ViTBackbone((32, 32, 3), 4, 4, 4, 64, 128)
    return saved(work / "preset", keras_hub.models.ViTImageClassifier(backbone, 10, preprocessor))


def saved(folder, *parts):
    """Saves parts of a KerasHub task as a preset, once. Returns its folder."""
    if not folder.exists():
        for part in parts:
            part.save_to_preset(folder)
    return folder


# Of each page: data in place of those that it downloads, constants in place of its own, what gives it a preset, its
# scores, and how many seeds.
PAGES = {
    "translation": {
        "data": multi30k,
        "constants": {
            "ALPHA": 1.0,
            "EPOCHS": 8,
            "BATCH_SIZE": 64,
            "LEARNING_RATE": 2e-3,
            "VOCABULARY_SIZE": 2000,
            "MAX_LENGTH": 40,
            "MODEL": {"num_layers": 2, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512, "dropout": 0.1},
        },
        "scores": lambda page, folder: {"BLEU": page["bleu"].score},
        "seeds": 1,
    },
    "glue": {
        "data": mrpc,
        "preset": minilm,
        "constants": {"EPOCHS": 3, "BATCH_SIZE": 16, "LEARNING_RATE": 1e-4, "SEQUENCE_LENGTH": 48},
        "scores": mrpc_scores,
        "seeds": 3,
    },
    "language_model": {
        "data": wikitext2,
        "preset": small_gpt2,
        "constants": {
            "EPOCHS": 12,
            "LEARNING_RATE": 1e-3,
            "WORDS": 64,
            "SEQUENCE_LENGTH": 96,
        },
        "scores": lambda page, folder: {"perplexity": page["perplexity"]},
        "seeds": 1,
    },
    "vit_cifar100": {
        "data": cifar10,
        "preset": small_vit,
        "constants": {"DATASET, NUM_CLASSES": ("cifar10", 10), "EPOCHS": 40, "PATIENCE": 8, "LEARNING_RATE": 1e-3},
        "scores": lambda page, folder: {"accuracy": page["accuracy"], "loss": page["loss"]},
        "seeds": 1,
    },
}


def with_constants(source, constants):
    """The source of a page with other values of its constants, each of which stands on a line of its own."""
    for name, value in constants.items():
        line = f"{name} = {value!r}".replace("\\", r"\\")
        source, number = re.subn(rf"^{name} = .*$", line, source, flags=re.MULTILINE)
        if number != 1:
            raise ValueError(f"The page must have one line `{name} = …`. Received: {number} of them.")
    return source


def run(name, kind, seed, folder, work, encoder=None):
    """Runs a page. Returns what it scored and the text that it printed."""
    import keras
    import tensorflow_datasets as tfds

    page = PAGES[name]
    constants = {**page["constants"], "SEED": seed, **({"ALPHA": 0.0} if kind == "plain" else {})}
    work.mkdir(parents=True, exist_ok=True)
    resumed = any(work.iterdir())
    keras.utils.set_random_seed(seed)  # For the weights of a preset that is made here.
    preset = {"PRESET": str(page["preset"](folder, work, encoder))} if "preset" in page else {}
    path = ROOT / "examples" / f"{name}.py"
    source = with_constants(path.read_text(encoding="utf-8"), {**constants, **preset})
    tfds.load = lambda *args, **kwargs: tuple(page["data"](folder, work))
    variables = {"__name__": "__main__"}
    start, start_of_process = time.perf_counter(), time.process_time()
    with (
        contextlib.chdir(work),
        open("printed.txt", "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(Tee(sys.stdout, file)),
    ):
        exec(compile(source, str(path), "exec"), variables)
    losses = variables["history"].history["val_loss"]
    result = {
        "backend": keras.backend.backend(),
        "constants": constants,
        "scores": {score: float(value) for score, value in page["scores"](variables, folder).items()},
        "epochs": len(losses),
        "best_epoch": 1 + losses.index(min(losses)),
        "val_loss": min(losses),
        "seconds": None if resumed else round(time.perf_counter() - start),
        "processor_seconds": None if resumed else round(time.process_time() - start_of_process),
    }
    return result, (work / "printed.txt").read_text(encoding="utf-8")


def cells(name, kind, runs):
    """The cells of a table on the page: epochs, the best of them, minutes of a core, and scores, means over seeds."""
    kind = "plain" if kind == "plain" else "rdrop"
    chosen = [run for key, run in runs.items() if key.startswith(f"{name}, {kind}, ")]
    columns = [[run["epochs"] for run in chosen], [run["best_epoch"] for run in chosen]]
    minutes = [run["processor_seconds"] / 60 for run in chosen if run["processor_seconds"] is not None]
    columns = [measure.mean_and_deviation(column, ".3g", ".1g") for column in (*columns, minutes)]
    scores = [[run["scores"][score] for run in chosen] for score in chosen[0]["scores"]]
    return columns + [measure.mean_and_deviation(column, ".3g", ".1g") for column in scores]


class Tee:
    """Writes to a stream, and to a file each line as it is when it ends: a progress bar overwrites its own."""

    def __init__(self, stream, file):
        self.stream, self.file, self.line = stream, file, ""

    def write(self, text):
        self.stream.write(text)
        *ended, self.line = (self.line + text).split("\n")
        for line in ended:
            line = re.sub(r"\x1b\[[0-9;]*m|\x08", "", line).rstrip("\r").rpartition("\r")[2]
            self.file.write(line.rstrip() + "\n")
        self.flush()

    def flush(self):
        self.stream.flush()
        self.file.flush()


def main():
    parser = argparse.ArgumentParser(description="Runs tutorials on other data, with R-Drop and without.")
    parser.add_argument("pages", nargs="+", choices=sorted(PAGES))
    parser.add_argument("--data", type=pathlib.Path, required=True, metavar="FOLDER")
    parser.add_argument("--encoder", type=pathlib.Path, metavar="FOLDER", help="with MiniLM, for glue")
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path("runs"), metavar="FOLDER", help="(%(default)s)"
    )
    args = parser.parse_args()
    for name in args.pages:
        for seed in range(PAGES[name]["seeds"]):
            for kind in KINDS:
                key = f"{name}, {kind}, seed {seed}"
                if key not in measure.read_runs(RESULTS):
                    one_run(key, args)


def one_run(key, args):
    """Makes one run in a process of its own, so that none inherits what another left behind."""
    name, kind, seed = re.fullmatch(r"(\w+), (\w+), seed (\d+)", key).groups()
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        if status:
            raise SystemExit(f"{key} failed.")
        return
    work = args.work.resolve() / f"{name}-{kind}-{seed}"
    result, printed = run(name, kind, int(seed), args.data.resolve(), work, args.encoder and args.encoder.resolve())
    shown = [(args.data, "FOLDER"), (args.encoder, "ENCODER"), (args.work, "runs")]
    runs = measure.read_runs(RESULTS)
    measure.write_runs(RESULTS, {**runs, key: {**result, "provenance": measure.provenance(shown)}})
    if kind == "rdrop" and seed == "0":
        outputs = ROOT / "docs" / "outputs"
        outputs.mkdir(exist_ok=True)
        (outputs / f"{name}.txt").write_text(printed, encoding="utf-8")
    shutil.rmtree(work)
    os._exit(0)


if __name__ == "__main__":
    main()
