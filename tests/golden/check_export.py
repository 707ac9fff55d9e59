#!/usr/bin/env python3
"""Checks exports: small models are trained, and what others compute with them is held against unisono's own answers.

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch numpy onnx onnxruntime safetensors
    cargo build --release && /tmp/golden/bin/python tests/golden/check_export.py target/release/unisono

For each model, `unisono export` writes both formats. PyTorch runs the same architecture with the weights of the safetensors
file, onnxruntime the ONNX file, and `unisono predict` (for language models `eval` of single windows, and `predict --generate`
without chance) the checkpoint. It prints a line for each with the largest differences, and ends with 1 where one is larger
than 1e-4. Data are made here, or are the embedded digits. Names after the program choose some of the models.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors.torch import load_file
from torch import nn

from make import (NO_ID, Attention, Bag, Lookup, Parallel, Positions, Products, Residual, Sum, Swiglu, Tied, deepfm, dlrm,
                  perceptron, vectors, wide)

TOLERANCE = 1e-4
ROWS, CONTEXT = 50, 24
# What columns of ids are called, and how many values each has, which the job says of all but HASHED.
HASHED = "kind"
SHOPS, RATINGS = {"shop": 40, "city": 12, "kind": 7}, {"user": 30, "film": 20}
WORDS = "a big red dog saw the small old cat near our house and ran away from it".split()


def toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def op(name, module, **keys):
    """A layer as the job has it, and as PyTorch has it."""
    return {"op": name, **keys}, module


def parallel(join, *branches):
    specs, modules = ([[part[i] for part in branch] for branch in branches] for i in range(2))
    return op("parallel", Parallel(join, *modules), join=join, branches=specs)


def lookup(rows, width):
    return op("lookup", Lookup(rows, width), width=width)


def residual(*parts):
    return op("residual", Residual(*[m for _, m in parts]), layers=[s for s, _ in parts])


def layers(*parts):
    return {"kind": "layers", "layers": [s for s, _ in parts]}, nn.Sequential(*[m for _, m in parts])


def linear(inputs, units, **keys):
    return op("linear", nn.Linear(inputs, units, **keys), units=units, **keys)


def gpt(vocabulary, positions, tie, feed_forward, norm):
    width, heads, hidden, blocks = 16, 2, 40, 2
    spec = {"kind": "gpt", "layers": blocks, "heads": heads, "width": width, "hidden": hidden, "positions": positions,
            "tie": tie, "feed_forward": feed_forward, "norm": norm}
    rotary = 10000.0 if positions == "rotary" else None
    normal = lambda: nn.LayerNorm(width) if norm == "layer-norm" else nn.RMSNorm(width, 1e-5)
    between = (2 * hidden, Swiglu) if feed_forward == "swiglu" else (hidden, nn.GELU)
    body = [] if rotary else [Positions(CONTEXT, width)]
    for _ in range(blocks):
        attention = nn.Linear(width, 3 * width), Attention(heads, True, rotary), nn.Linear(width, width)
        body += [Residual(normal(), *attention),
                 Residual(normal(), nn.Linear(width, between[0]), between[1](), nn.Linear(hidden, width))]
    body.append(normal())
    if tie:
        return spec, nn.Sequential(Tied(vocabulary, width, *body))
    return spec, nn.Sequential(nn.Embedding(vocabulary, width), *body, nn.Linear(width, vocabulary, bias=False))


class Projected(nn.Sequential):
    """A residual block whose input goes around it through layers of its own."""

    def __init__(self, layers, shortcut):
        super().__init__(*layers)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):
        *layers, shortcut = self
        y = x
        for layer in layers:
            y = layer(y)
        return y + shortcut(x)


def resnet(channels, depth, width, classes):
    """He et al., 2016, section 4.2: three stages, of which the later ones begin with a stride and a projection."""
    normed = lambda inputs, filters, kernel, stride: [
        nn.Conv2d(inputs, filters, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(filters)]
    body, inputs = [*normed(channels, width, 3, 1), nn.ReLU()], width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            filters, stride = width << stage, 2 if stage > 0 and block == 0 else 1
            layers = [*normed(inputs, filters, 3, stride), nn.ReLU(), *normed(filters, filters, 3, 1)]
            whole = Residual(*layers) if stride == 1 else Projected(layers, normed(inputs, filters, 1, stride))
            body, inputs = [*body, whole, nn.ReLU()], filters
    return {"kind": "resnet", "depth": depth, "width": width}, nn.Sequential(*body, Mean(), nn.Linear(inputs, classes))


class Mean(nn.Module):
    """Of each plane."""

    def forward(self, x):
        return x.mean((2, 3))


def mlp(inputs, outputs, activation, module):
    """Named, with dropout: its layers count."""
    spec = {"kind": "mlp", "hidden": [24, 16], "activation": activation, "dropout": 0.1}
    return spec, nn.Sequential(nn.Linear(inputs, 24), module(), nn.Dropout(), nn.Linear(24, 16), module(), nn.Dropout(),
                               nn.Linear(16, outputs))


def linear_of_images(inputs, outputs):
    """Images become rows without a layer of their own."""
    return {"kind": "linear"}, nn.Sequential(OrderedDict([("rows", nn.Flatten()), ("0", nn.Linear(inputs, outputs))]))


def sentence(draw):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(4, 12)))


def write_table(path, draw):
    """Numbers of very different sizes, a category, and a yes or no that they decide."""
    lines = ["size,colour,weight,answer"]
    for _ in range(400):
        size, colour, weight = draw.gauss(1000, 300), draw.choice(["red", "green", "blue"]), draw.gauss(0, 0.01)
        answer = (size - 1000) / 300 + (colour == "red") + weight * 50 + draw.gauss(0, 0.3) > 0.3
        lines.append(f"{size:.3f},{colour},{weight:.6f},{'yes' if answer else 'no'}")
    path.write_text("\n".join(lines) + "\n")


def purchase(draw):
    return {"price": draw.gauss(50, 20), "age": draw.gauss(40, 15), **{name: draw.randrange(n) for name, n in SHOPS.items()}}


def write_shops(path, draw):
    """Numbers and ids, each of which has a say in the answer."""
    rows = [purchase(draw) for _ in range(400)]
    answer = lambda row: (row["age"] - 40) / 15 + row["shop"] % 3 - row["city"] % 2 + (row["kind"] == 1) * row["shop"] % 2 > 0.7
    lines = [",".join(map(str, [*row.values(), "yes" if answer(row) else "no"])) for row in rows]
    path.write_text("\n".join([",".join([*rows[0], "answer"]), *lines]) + "\n")


def write_ratings(path, draw):
    pairs = [[draw.randrange(n) for n in RATINGS.values()] for _ in range(400)]
    lines = [f"{user},{film},{user % 3 + film % 2 + (user % 5) * (film % 4) / 4:.2f}" for user, film in pairs]
    path.write_text("\n".join([",".join([*RATINGS, "stars"]), *lines]) + "\n")


def write_texts(path, draw):
    texts = [sentence(draw) for _ in range(400)]
    label = lambda text: "pet" if "dog" in text or "cat" in text else "other"
    path.write_text("said\tkind\n" + "".join(f"{text}\t{label(text)}\n" for text in texts))


def write_book(path, draw):
    path.write_text("".join(sentence(draw) + ".\n" for _ in range(200)))


def hashed(columns, cells):
    """The id of cells in columns without a declared size (common/src/data/id.rs, common/src/rng.rs)."""
    gamma, low = 0x9E3779B97F4A7C15, lambda z: z & NO_ID

    def mix(z):
        z = low((z ^ z >> 30) * 0xBF58476D1CE4E5B9)
        z = low((z ^ z >> 27) * 0x94D049BB133111EB)
        return z ^ z >> 31

    key = mix(mix(gamma) ^ low(10 * gamma))
    for name in map(str.encode, [*columns, *cells]):
        for part in (len(name), *name):
            key = mix(key ^ low(mix(low(part + gamma)) * gamma))
    return min(key, NO_ID - 1)


class Program:
    def __init__(self, path, folder):
        self.path, self.folder = path.resolve(), folder

    def run(self, *arguments):
        done = subprocess.run([self.path, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"unisono {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout


class Exported:
    """A trained model as others see it."""

    def __init__(self, program, name, data, spec, module, train):
        self.program, self.name = program, name
        self.job = program.folder / f"{name}.toml"
        train = {"partitions": 4, "micro_batch": 8, "steps": 40, "optimizer": {"kind": "adamw", "lr": 1e-2}, **train}
        job = {"name": name, "seed": 7, "data": data, "model": spec, "train": train}
        self.job.write_text("".join(f"{key} = {toml(value)}\n" for key, value in job.items()))
        summary = json.loads(program.run("local", self.job, "--workers", 2, "--json", "--quiet").splitlines()[-1])
        self.prepared = json.loads((program.folder / summary["checkpoint"] / "manifest.json").read_text())["prepared"]
        weights, model = (program.folder / f"{name}.{end}" for end in ("safetensors", "onnx"))
        program.run("export", f"runs/{name}", "--format", "safetensors", "--out", weights)
        program.run("export", f"runs/{name}", "--format", "onnx", "--out", model)
        # The checker works out every shape, and holds it against those that the file notes.
        onnx.checker.check_model(onnx.load(model), full_check=True)
        self.session = onnxruntime.InferenceSession(model)
        self.notes = {k: json.loads(v) for k, v in self.session.get_modelmeta().custom_metadata_map.items()}
        tensors = load_file(weights)
        ids = tensors.pop("ids", torch.tensor([])).tolist()
        self.places = {id: place for place, id in enumerate(ids)}
        for path, part in module.named_modules():
            if isinstance(part, Lookup):
                tensors[f"{path}.weight"] = nn.functional.pad(tensors[f"{path}.weight"], (0, 0, 0, 1))
        unmatched = module.load_state_dict(tensors, strict=False)
        # PyTorch counts batches; nothing reads the count.
        if unmatched.unexpected_keys or any("num_batches" not in key for key in unmatched.missing_keys):
            sys.exit(f"{name}: PyTorch has other tensors: {unmatched}")
        if any((part.running_mean == 0).all() for part in module.modules() if hasattr(part, "running_mean")):
            sys.exit(f"{name}: a batch-norm has the statistics that it began with, which says nothing")
        self.module = module.eval()
        self.apart = 0.0

    def logits(self, inputs, *ids):
        """Of onnxruntime, from raw inputs; `apart` becomes the largest difference from PyTorch's."""
        given, *others = self.session.get_inputs()
        names = [value.name for value in (given, *others)]
        got = self.session.run(["logits"], dict(zip(names, (inputs, *ids), strict=True)))[0]
        for of_batch in ids:
            places = [[self.places.get(id, len(self.places)) for id in row] for row in of_batch.view(np.uint64).tolist()]
            Lookup.places = torch.tensor(places)
        with torch.no_grad():
            if given.name == "features":
                mean, inverse = (np.array(self.prepared[key], np.float32) for key in ("mean", "inv_std"))
                shape = inputs.shape[1:] if mean.size > 1 else ()
                inputs = (inputs - mean.reshape(shape)) * inverse.reshape(shape)
            want = self.module(torch.from_numpy(inputs)).numpy()
        if got.shape != want.shape:
            sys.exit(f"{self.name}: onnxruntime gives {got.shape}, PyTorch {want.shape}")
        self.apart = float(np.max([self.apart, np.abs(got - want).max()]))
        return got

    def predict(self, rows):
        path = self.program.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [json.loads(line) for line in self.program.run("predict", f"runs/{self.name}", path).splitlines()]

    def answers(self, inputs, rows, *ids):
        """The largest difference of predicted values, or of probabilities of the predicted class."""
        logits, answers = self.logits(inputs, *ids), self.predict(rows)
        if "classes" not in self.notes:
            return np.max([abs(row[0] - answer["prediction"]) for row, answer in zip(logits, answers, strict=True)])
        if logits.shape[1] == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], 1)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        at = [self.notes["classes"].index(answer["prediction"]) for answer in answers]
        return np.max([abs(share[i] - answer["probability"]) for share, i, answer in zip(shares, at, answers, strict=True)])

    def features(self):
        """Rows of numbers, of about the size that the data's have."""
        shape = self.prepared["shape"]
        spread = 1 / np.array(self.prepared["inv_std"]) if len(self.prepared["inv_std"]) == 1 else 1.0
        inputs = (np.random.default_rng(3).normal(size=(ROWS, *shape)) * spread).astype(np.float32)
        return self.answers(inputs, [{"features": row.ravel().tolist()} for row in inputs])

    def table(self):
        """Rows of a table: the features are called as the file says."""
        draw = random.Random(4)
        colours = ["red", "green", "blue"]
        rows = [{"size": draw.gauss(1000, 300), "colour": draw.choice(colours), "weight": draw.gauss(0, 0.01)}
                for _ in range(ROWS)]
        value = lambda row, name: row[name] if name in row else float(row[name.split("=")[0]] == name.split("=")[1])
        inputs = np.array([[value(row, name) for name in self.notes["features"]] for row in rows], np.float32)
        return self.answers(inputs, rows)

    def shops(self):
        """Rows with ids, some of which are missing: what they stand for counts as zeros."""
        draw = random.Random(8)
        return self.by_ids([{**purchase(draw), **{name: "?" for name in SHOPS if draw.random() < 0.1}} for _ in range(ROWS)])

    def ratings(self):
        draw = random.Random(9)
        return self.by_ids([{name: draw.randrange(n) for name, n in RATINGS.items()} for _ in range(ROWS)])

    def by_ids(self, rows):
        """Without numbers, a single 0 stands for them."""
        def id(field, cells):
            if "?" in cells:
                return NO_ID
            return hashed(field["columns"], map(str, cells)) if field["size"] is None else field["first"] + cells[0]

        ids = [[id(field, [row[name] for name in field["columns"]]) for field in self.prepared["ids"]] for row in rows]
        numbers = [[row[name] for name in self.notes.get("features", [])] or [0.0] for row in rows]
        return self.answers(np.array(numbers, np.float32), rows, np.array(ids, np.uint64).view(np.int64))

    def texts(self):
        """Texts of words, each one more than its place in the vocabulary; 0 fills up."""
        known = self.prepared["tokens"]["tokenizer"]["words"]
        draw = random.Random(5)
        rows = [sentence(draw) for _ in range(ROWS)]
        ids = [[1 + known.index(word) for word in text.split()] for text in rows]
        inputs = np.array([row + [0] * (CONTEXT - len(row)) for row in ids], np.int64)
        return self.answers(inputs, [{"said": text} for text in rows])

    def language(self):
        """The loss of single windows, and what is written where the likeliest token always comes next."""
        characters = self.prepared["tokens"]["tokenizer"]["characters"]
        draw, apart = random.Random(6), 0.0
        for _ in range(4):
            text = (sentence(draw) + ".\n" + sentence(draw) + ".\n" + sentence(draw))[: CONTEXT + 1]
            (self.program.folder / "window.txt").write_text(text)
            out = self.program.run("eval", f"runs/{self.name}", self.job, "--json", "--set", "data.test=window.txt")
            ids = np.array([[characters.index(c) for c in text]], np.int64)
            logits = torch.from_numpy(self.logits(ids[:, :-1]))[0]
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(ids[0, 1:])).item()
            apart = np.max([apart, abs(loss - json.loads(out.splitlines()[-1])["eval"]["loss"])])
        text = start = "the "
        for _ in range(40):
            seen = [characters.index(c) for c in text[-CONTEXT:]]
            logits = self.logits(np.array([seen + [0] * (CONTEXT - len(seen))], np.int64))
            text += characters[int(logits[0, len(seen) - 1].argmax())]
        ours = self.program.run("predict", f"runs/{self.name}", "--generate", start, "--tokens", 40, "--temperature", 0)
        return apart if ours == text + "\n" else math.inf


def image(shape):
    return {"format": "synthetic", "task": "classification", "shape": shape, "classes": 4, "samples": 512,
            "test_samples": 64, "normalize": True}


TABLE = {"format": "csv", "train": "table.csv", "target": "answer", "categorical": ["colour"]}
TEXTS = {"format": "csv", "train": "texts.tsv", "separator": "\t", "target": "kind", "text": "said", "context": CONTEXT,
         "tokenizer": {"kind": "words", "ngrams": 1}}
BOOK = {"format": "text", "train": "book.txt", "test": "book.txt", "tokenizer": "characters", "context": CONTEXT}
def of_ids(columns, **data):
    ids = [name if name == HASHED else {"column": name, "size": size} for name, size in columns.items()]
    return {"format": "csv", "ids": ids, **data}


VALUES = {**image([6]), "task": "regression"}
VALUES.pop("classes")


def models(words, letters):
    """Name: data, the model, what of training is its own, and how it is compared."""
    conv = lambda i, o, kernel, stride=1, padding=0, **keys: op(
        "conv2d", nn.Conv2d(i, o, kernel, stride, padding, **keys), filters=o, kernel=kernel, stride=stride, padding=padding,
        **keys)
    yield "mlp", {"format": "digits"}, mlp(64, 10, "gelu", nn.GELU), {}, Exported.features
    yield "mlp-table", TABLE, mlp(5, 1, "silu", nn.SiLU), {"loss": "binary-cross-entropy"}, Exported.table
    yield "linear-image", image([2, 5, 4]), linear_of_images(40, 4), {}, Exported.features
    yield "cnn", image([3, 12, 10]), layers(
        conv(3, 8, 3, bias=False), op("batch-norm", nn.BatchNorm2d(8)), op("relu", nn.ReLU()),
        op("max-pool2d", nn.MaxPool2d(2), size=2),
        residual(conv(8, 8, 3, padding=1), op("leaky-relu", nn.LeakyReLU(0.1), slope=0.1)),
        op("layer-norm", nn.LayerNorm([8, 5, 4])), conv(8, 6, 2, 2, 1), op("avg-pool2d", nn.AvgPool2d(2, 1), size=2, stride=1),
        op("global-avg-pool", Mean()), linear(6, 4)), {}, Exported.features
    yield "cnn-flat", image([1, 9, 9]), layers(
        conv(1, 4, 3, 2), op("sigmoid", nn.Sigmoid()), op("flatten", nn.Flatten()), linear(64, 16),
        op("batch-norm", nn.BatchNorm1d(16)), op("tanh", nn.Tanh()), op("dropout", nn.Dropout(), rate=0.2),
        linear(16, 4)), {}, Exported.features
    yield "resnet", image([3, 13, 10]), resnet(3, 8, 4, 4), {}, Exported.features
    yield "values", VALUES, layers(
        linear(6, 16), op("rms-norm", nn.RMSNorm(16, 1e-5)), op("swiglu", Swiglu()),
        residual(linear(8, 8), op("gelu", nn.GELU())), linear(8, 1)), {"loss": "mse"}, Exported.features
    yield "text-classifier", TEXTS, (
        {"kind": "text-classifier", "width": 12, "hidden": [8]},
        nn.Sequential(Bag(words, 12), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))), {}, Exported.texts
    yield "text-attention", TEXTS, layers(
        op("embedding", nn.Embedding(words, 8), width=8), op("positions", Positions(CONTEXT, 8)), linear(8, 24),
        op("attention", Attention(2, False), heads=2, causal=False), op("rms-norm", nn.RMSNorm([CONTEXT, 8], 1e-5)),
        op("batch-norm", nn.BatchNorm1d(CONTEXT)), linear(8, 6), op("silu", nn.SiLU()), op("flatten", nn.Flatten()),
        linear(6 * CONTEXT, 2)), {}, Exported.texts
    # Every id comes, so that each has a row; behind them is one of zeros.
    shops, rows = of_ids(SHOPS, train="shops.csv", target="answer"), sum(SHOPS.values())
    tables = {"loss": "binary-cross-entropy", "tables": {"optimizer": {"kind": "adagrad", "lr": 0.1}}}
    yield "wide-deep", shops, (
        {"kind": "wide-deep", "width": 6, "hidden": [12]},
        nn.Sequential(Parallel("sum", *wide(2, rows), [vectors(rows, 6), *perceptron(20, 12, 1)]))), tables, Exported.shops
    yield "deepfm", shops, (
        {"kind": "deepfm", "width": 6, "hidden": [12, 8]}, deepfm(2, 3, rows, 6, [12, 8])), tables, Exported.shops
    for interaction in ("dot", "concat"):
        spec = {"kind": "dlrm", "width": 6, "bottom": [10], "top": [12, 8], "interaction": interaction}
        module = dlrm(2, 3, rows, 6, [10], [12, 8], interaction == "dot")
        yield f"dlrm-{interaction}", shops, (spec, module), tables, Exported.shops
    ratings, rows = of_ids(RATINGS, train="ratings.csv", target="stars", task="regression"), sum(RATINGS.values())
    yield "matrix-factorization", ratings, layers(parallel(
        "sum", [linear(1, 1)], [lookup(rows, 1), op("sum", Sum())],
        [lookup(rows, 6), op("factorization-machine", Products(6, add_up=True), width=6)])), {
            **tables, "loss": "mse"}, Exported.ratings
    # One partition: a single window is a whole test set.
    one = {"partitions": 1, "micro_batch": 16, "steps": 100}
    for positions, tie, feed_forward, norm in [
        ("learned", False, "gelu", "layer-norm"), ("rotary", True, "swiglu", "rms-norm"),
        ("learned", True, "swiglu", "layer-norm"), ("rotary", False, "gelu", "rms-norm"),
    ]:
        name = f"gpt-{positions}-{'tied' if tie else 'untied'}-{feed_forward}"
        yield name, BOOK, gpt(letters, positions, tie, feed_forward, norm), one, Exported.language


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path, help="the unisono program, as target/release/unisono")
    parser.add_argument("only", nargs="*", help="models to check [default: all]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong, seen = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_table(folder / "table.csv", random.Random(1))
        write_texts(folder / "texts.tsv", random.Random(1))
        write_book(folder / "book.txt", random.Random(1))
        write_shops(folder / "shops.csv", random.Random(1))
        write_ratings(folder / "ratings.csv", random.Random(1))
        program = Program(options.program, folder)
        # A token for each word, one for all others, and 0.
        words, letters = len(WORDS) + 2, len(set((folder / "book.txt").read_text()))
        for name, data, (spec, module), train, compare in models(words, letters):
            if options.only and name not in options.only:
                continue
            exported = Exported(program, name, data, spec, module, train)
            from_predict = compare(exported)
            right = exported.apart <= TOLERANCE and from_predict <= TOLERANCE
            wrong, seen = wrong + (not right), seen + 1
            print(f"{name:28} onnxruntime - PyTorch {exported.apart:.1e}, onnxruntime - unisono {from_predict:.1e}"
                  f"  {'ok' if right else 'DIFFERENT'}", flush=True)
    if wrong or not seen:
        sys.exit(f"{wrong} of {seen} models differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
