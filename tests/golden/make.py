#!/usr/bin/env python3
"""Writes values.json: what PyTorch computes for small models, from the same weights and batches.

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch && /tmp/golden/bin/python tests/golden/make.py

Every case holds a model and a training job in the form that unisono's job has as JSON, the initial weights under the
names of nn.Sequential, a batch, and then PyTorch's outputs (in evaluation mode, before and after training), first gradient
and 20 losses. Where batches have ids, there are several, which come in turn; rows that they choose are as PyTorch's sparse
gradients and optimizers leave them. Tests read the file; they need no PyTorch.

Cases that the file has keep their numbers, since other machines round otherwise; those named after the program are made anew. What is
kept and is not what this machine computes, but for rounding, is named, and the exit status is 1: nothing old stays unseen. With
--check nothing is written.
"""

import fnmatch
import json
import math
import sys
import zlib
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
from torch_ddp import DLRM, GPT  # noqa: E402

torch.manual_seed(7)
torch.set_num_threads(1)
STEPS, ROWS = 20, 6
# The tolerance of golden.rs, to which numbers are compared.
ROUNDING = 1e-5


def redraw(name, model):
    """Weights, and what is drawn after them, as a function of the case's name: other cases do not change them."""
    torch.manual_seed(zlib.crc32(name.encode()))
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Positions(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x):
        return x + self.weight


class Attention(nn.Module):
    """Of rows of queries, keys and values; `base` is that of rotary embeddings, where they turn."""

    def __init__(self, heads, causal, base=None):
        super().__init__()
        self.heads, self.causal, self.base = heads, causal, base

    def turn(self, x):
        positions, d = x.shape[-2:]
        angles = torch.outer(torch.arange(positions), self.base ** (-torch.arange(0, d, 2) / d))
        turns = torch.polar(torch.ones_like(angles), angles)
        turned = torch.complex(x[..., : d // 2], x[..., d // 2:]) * turns
        return torch.cat([turned.real, turned.imag], -1)

    def forward(self, x):
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)
        q, k, v = map(split, x.chunk(3, 2))
        if self.base:
            q, k = self.turn(q), self.turn(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return y.transpose(1, 2).flatten(2)


class Bag(nn.EmbeddingBag):
    def __init__(self, vocabulary, width):
        super().__init__(vocabulary, width, mode="mean", padding_idx=0)


class Swiglu(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, -1)
        return F.silu(a) * b


class Tied(nn.Sequential):
    def __init__(self, vocabulary, width, *body):
        super().__init__(*body)
        self.weight = nn.Parameter(torch.empty(vocabulary, width))

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x):
        return super().forward(F.embedding(x, self.weight)) @ self.weight.T


class Lookup(nn.Embedding):
    """The rows of a batch's ids, which are in `places`; behind all rows is one of zeros, for ids that have none."""

    places = None

    def __init__(self, rows, width):
        super().__init__(rows + 1, width, padding_idx=rows, sparse=True)

    def forward(self, _):
        return super().forward(Lookup.places)


class Parallel(nn.ModuleList):
    def __init__(self, join, *branches):
        super().__init__(nn.Sequential(*branch) for branch in branches)
        self.join = join

    def forward(self, x):
        outs = [branch(x) for branch in self]
        return sum(outs) if self.join == "sum" else torch.cat([out.flatten(1) for out in outs], 1)


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(1)


class Slice(nn.Module):
    def __init__(self, start, length):
        super().__init__()
        self.part = slice(start, start + length)

    def forward(self, x):
        return x.flatten(1)[:, self.part]


class Products(nn.Module):
    """Of each two of a sample's vectors: (1, 0), (2, 0), (2, 1), ...; behind the first of them, or added up."""

    def __init__(self, width, add_up=False):
        super().__init__()
        self.width, self.add_up = width, add_up

    def forward(self, x):
        vectors = x.flatten(1).unflatten(1, (-1, self.width))
        i, j = torch.tril_indices(vectors.shape[1], vectors.shape[1], -1)
        products = (vectors[:, i] * vectors[:, j]).sum(2)
        return products.sum(1, keepdim=True) if self.add_up else torch.cat([vectors[:, 0], products], 1)


def perceptron(*sizes):
    parts = [part for pair in zip(sizes, sizes[1:]) for part in (nn.Linear(*pair), nn.ReLU())]
    return parts[:-1]


def wide(numbers, rows):
    return [[nn.Linear(numbers, 1)], [Lookup(rows, 1), Sum()]]


def vectors(rows, width):
    return Parallel("concat", [Lookup(rows, width)], [])


def deepfm(numbers, fields, rows, width, hidden):
    """Guo et al., "DeepFM", 2017, equations 1 to 4."""
    machine = [Slice(0, fields * width), Products(width, add_up=True)]
    both = Parallel("sum", machine, perceptron(fields * width + numbers, *hidden, 1))
    return nn.Sequential(Parallel("sum", *wide(numbers, rows), [vectors(rows, width), both]))


def dlrm(numbers, fields, rows, width, bottom, top, dot):
    """Naumov et al., "Deep Learning Recommendation Model", 2019; without products, the vectors one after another."""
    first = Parallel("concat", perceptron(numbers, *bottom, width), [Lookup(rows, width)])
    inputs = width + fields * (fields + 1) // 2 if dot else width * (fields + 1)
    return nn.Sequential(first, *[Products(width)] * dot, *perceptron(inputs, *top, 1))


def linear(inputs, units):
    return nn.Linear(inputs, units), {"op": "linear", "units": units, "bias": True, "init": None}


def attention(heads, causal, rotary=None):
    spec = {"op": "attention", "heads": heads, "causal": causal, "rotary": rotary}
    return Attention(heads, causal, rotary), spec


def embedding(vocabulary, width):
    return nn.Embedding(vocabulary, width), {"op": "embedding", "width": width, "init": None}


def tied(vocabulary, width, *body):
    spec = {"op": "tied-embedding", "width": width, "init": None, "layers": [s for _, s in body]}
    return Tied(vocabulary, width, *[m for m, _ in body]), spec


def conv(channels, filters, kernel, stride=1, padding=0, groups=1):
    spec = {"op": "conv2d", "filters": filters, "kernel": kernel, "stride": stride, "padding": padding, "bias": True}
    spec |= {"groups": groups} if groups > 1 else {}
    return nn.Conv2d(channels, filters, kernel, stride, padding, groups=groups), {**spec, "init": None}


def act(module, spec):
    return module, {"op": "activation", "activation": spec}


def flatten():
    return nn.Flatten(), {"op": "flatten"}


IMAGE = [2, 6, 7]
LAYERS = {
    "linear": ([5], [linear(5, 1)]),
    "conv2d": (IMAGE, [conv(2, 3, 3), flatten(), linear(60, 1)]),
    "conv2d-stride-padding": (IMAGE, [conv(2, 3, 3, 2, 1), flatten(), linear(36, 1)]),
    "max-pool2d": (IMAGE, [conv(2, 3, 1), (nn.MaxPool2d(2), {"op": "max-pool2d", "size": 2, "stride": 2}),
                           flatten(), linear(27, 1)]),
    "avg-pool2d": (IMAGE, [conv(2, 3, 1), (nn.AvgPool2d(3, 2), {"op": "avg-pool2d", "size": 3, "stride": 2}),
                           flatten(), linear(18, 1)]),
    "global-avg-pool": (IMAGE, [conv(2, 3, 3), (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                                                {"op": "global-avg-pool"}), linear(3, 1)]),
    "relu": ([5], [linear(5, 8), act(nn.ReLU(), "relu"), linear(8, 1)]),
    "leaky-relu": ([5], [linear(5, 8), act(nn.LeakyReLU(0.1), {"leaky-relu": {"slope": 0.1}}), linear(8, 1)]),
    "gelu": ([5], [linear(5, 8), act(nn.GELU(), "gelu"), linear(8, 1)]),
    "tanh": ([5], [linear(5, 8), act(nn.Tanh(), "tanh"), linear(8, 1)]),
    "sigmoid": ([5], [linear(5, 8), act(nn.Sigmoid(), "sigmoid"), linear(8, 1)]),
    "dropout-0": ([5], [linear(5, 8), (nn.Dropout(0.0), {"op": "dropout", "rate": 0.0}), linear(8, 1)]),
    "batch-norm": (IMAGE, [conv(2, 3, 3), (nn.BatchNorm2d(3), {"op": "batch-norm", "momentum": 0.1, "eps": 1e-5}),
                           flatten(), linear(60, 1)]),
    "batch-norm-flat": ([5], [linear(5, 8), (nn.BatchNorm1d(8, momentum=0.3),
                                             {"op": "batch-norm", "momentum": 0.3, "eps": 1e-5}), linear(8, 1)]),
    "layer-norm": ([5], [linear(5, 8), (nn.LayerNorm(8), {"op": "layer-norm", "eps": 1e-5}), linear(8, 1)]),
    "layer-norm-image": (IMAGE, [(nn.LayerNorm(IMAGE), {"op": "layer-norm", "eps": 1e-5}), flatten(), linear(84, 1)]),
    "residual": ([5], [(Residual(nn.Linear(5, 5), nn.Tanh()),
                        {"op": "residual", "layers": [linear(5, 5)[1], act(None, "tanh")[1]]}), linear(5, 1)]),
}

CLASSES = torch.tensor([0, 3, 1, 2, 3, 0])
BINARY = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
WEIGHTS = [0.5, 1.0, 2.0, 1.5]
LOSSES = {
    "cross-entropy": (4, CLASSES, nn.CrossEntropyLoss(),
                      {"kind": "cross-entropy", "label_smoothing": 0.0, "class_weights": None}),
    "cross-entropy-smooth-weighted": (4, CLASSES, nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=0.1),
                                      {"kind": "cross-entropy", "label_smoothing": 0.1, "class_weights": WEIGHTS}),
    "binary-cross-entropy": (1, BINARY, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.5)),
                             {"kind": "binary-cross-entropy", "positive_weight": 2.5}),
    "mse": (1, None, nn.MSELoss(), {"kind": "mse"}),
    "mae": (1, None, nn.L1Loss(), {"kind": "mae"}),
    "huber": (1, None, nn.HuberLoss(delta=0.7), {"kind": "huber", "delta": 0.7}),
    "hinge": (1, BINARY, lambda x, y: (1 - (2 * y - 1) * x).clamp(min=0).mean(), {"kind": "hinge"}),
    "hinge-multi": (4, CLASSES, nn.MultiMarginLoss(), {"kind": "hinge"}),
}


MORE_LOSSES = {
    "focal": (1, BINARY, lambda x, y: -(F.sigmoid(x).neg().add(1).pow(1.5) * F.logsigmoid(x) * y
                                        + F.sigmoid(x).pow(1.5) * F.logsigmoid(-x) * (1 - y)).mean(),
              {"kind": "focal", "gamma": 1.5}),
    "focal-multi": (4, CLASSES, lambda x, y: (lambda log: -((1 - log.exp()) ** 2 * log).mean())(
        F.log_softmax(x, 1).gather(1, y[:, None])), {"kind": "focal", "gamma": 2.0}),
}


def sgd(**options):
    spec = {"kind": "sgd", "lr": 0.05, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
    return torch.optim.SGD, {**spec, **options}, lambda s: {k: v for k, v in s.items() if k != "kind"}


def adam(kind, build, **options):
    spec = {"kind": kind, "lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, **options}
    return build, spec, lambda s: {"lr": s["lr"], "betas": (s["beta1"], s["beta2"]), "eps": s["eps"],
                                   "weight_decay": s["weight_decay"]}


class Lion(torch.optim.Optimizer):
    """Program 1 of Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023."""

    def __init__(self, parameters, lr, betas, weight_decay):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(b1 * m + (1 - b1) * p.grad)
                self.state[p]["m"] = b2 * m + (1 - b2) * p.grad
                p -= group["lr"] * (update + group["weight_decay"] * p)


LION = {"kind": "lion", "lr": 0.003, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}


def rmsprop(**options):
    spec = {"kind": "rmsprop", "lr": 0.01, "alpha": 0.95, "eps": 1e-6, "momentum": 0.0, "centered": False,
            "weight_decay": 0.0, **options}
    return torch.optim.RMSprop, spec, lambda s: {k: v for k, v in s.items() if k != "kind"}


ADAGRAD = {"kind": "adagrad", "lr": 0.1, "lr_decay": 0.01, "eps": 1e-10, "weight_decay": 0.02, "initial_accumulator": 0.1}
OPTIMIZERS = {
    "sgd": sgd(),
    "sgd-momentum-decay": sgd(momentum=0.9, weight_decay=0.1),
    "sgd-dampening": sgd(momentum=0.8, dampening=0.3),
    "sgd-nesterov": sgd(momentum=0.9, nesterov=True),
    "adam": adam("adam", torch.optim.Adam),
    "adam-decay": adam("adam", torch.optim.Adam, weight_decay=0.1),
    "adamw": adam("adamw", torch.optim.AdamW, weight_decay=0.1),
    "adagrad": (torch.optim.Adagrad, ADAGRAD, lambda s: {
        "lr": s["lr"], "lr_decay": s["lr_decay"], "eps": s["eps"], "weight_decay": s["weight_decay"],
        "initial_accumulator_value": s["initial_accumulator"]}),
    "rmsprop": rmsprop(),
    "rmsprop-centered-momentum": rmsprop(centered=True, momentum=0.5, weight_decay=0.01),
}


class RowAdagrad(torch.optim.Optimizer):
    """Mudigere et al., "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation Models",
    2022: one sum for each row, of the means of its gradients' squares."""

    def __init__(self, parameters, lr, eps, initial_accumulator):
        super().__init__(parameters, {"lr": lr, "eps": eps, "initial": initial_accumulator})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                sums = self.state[w].setdefault("sums", torch.full((len(w), 1), group["initial"]))
                rows, g = of_rows(w.grad)
                sums[rows] += g.square().mean(1, keepdim=True)
                w[rows] -= group["lr"] * g / (sums[rows].sqrt() + group["eps"])


class Ftrl(torch.optim.Optimizer):
    """Algorithm 1 of McMahan et al., "Ad Click Prediction: a View from the Trenches", 2013; `lr` is its alpha."""

    def __init__(self, parameters, lr, beta, l1, l2):
        super().__init__(parameters, {"lr": lr, "beta": beta, "l1": l1, "l2": l2})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alpha, beta, l1, l2 = (group[key] for key in ("lr", "beta", "l1", "l2"))
            for w in group["params"]:
                z, n = (self.state[w].setdefault(key, torch.zeros_like(w)) for key in "zn")
                rows, g = of_rows(w.grad)
                sigma = ((n[rows] + g**2).sqrt() - n[rows].sqrt()) / alpha
                z[rows] += g - sigma * w[rows]
                n[rows] += g**2
                beyond = z[rows] - z[rows].sign() * l1
                w[rows] = torch.where(z[rows].abs() <= l1, 0.0, -beyond / ((beta + n[rows].sqrt()) / alpha + l2))


def of_rows(gradient):
    """The rows of a sparse gradient, each once, and what it has of them."""
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


def without_kind(spec):
    return {k: v for k, v in spec.items() if k != "kind"}


ROW_OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"kind": "sgd", "lr": 0.5}, without_kind),
    "adagrad": (torch.optim.Adagrad, {"kind": "adagrad", "lr": 0.1, "eps": 1e-3, "initial_accumulator": 0.01}, lambda s: {
        "lr": s["lr"], "eps": s["eps"], "initial_accumulator_value": s["initial_accumulator"]}),
    "row-adagrad": (RowAdagrad, {"kind": "row-adagrad", "lr": 0.1, "eps": 1e-3, "initial_accumulator": 0.01}, without_kind),
    "lazy-adam": (torch.optim.SparseAdam, {"kind": "lazy-adam", "lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3},
                  lambda s: {"lr": s["lr"], "betas": (s["beta1"], s["beta2"]), "eps": s["eps"]}),
    "ftrl": (Ftrl, {"kind": "ftrl", "lr": 0.3, "beta": 0.5, "l1": 0.01, "l2": 0.1}, without_kind),
}


WORDS = 11


class Lamb(torch.optim.Optimizer):
    """Algorithm 2 of You et al., "Large Batch Optimization for Deep Learning", 2020, with phi(z) = z."""

    def __init__(self, parameters, lr, beta1, beta2, eps, weight_decay):
        settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "decay": weight_decay}
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["beta1"], group["beta2"]
            for x in group["params"]:
                state, g = self.state[x], x.grad
                t = state["t"] = state.get("t", 0) + 1
                m = state["m"] = b1 * state.get("m", torch.zeros_like(x)) + (1 - b1) * g
                v = state["v"] = b2 * state.get("v", torch.zeros_like(x)) + (1 - b2) * g * g
                r = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
                u = r + group["decay"] * x
                x -= group["lr"] * x.norm() / u.norm() * u


LAMB = {"kind": "lamb", "lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}

MORE_OPTIMIZERS = {
    "lion": (Lion, LION, lambda s: {"lr": s["lr"], "betas": (s["beta1"], s["beta2"]), "weight_decay": s["weight_decay"]}),
    "lamb": (Lamb, LAMB, without_kind),
}


GROUPS = [{"params": ["biases"], "weight_decay": 0.0}, {"params": ["0.*"], "lr": 0.001}]


def more_layers():
    return {"silu": ([5], [linear(5, 8), act(nn.SiLU(), "silu"), linear(8, 1)])}


def of_tokens():
    """Of tokens, each of which has a target: the positions, and layers that give logits."""
    return {
        "embedding": (8, [embedding(WORDS, 6), linear(6, WORDS)]),
        "tied-embedding": (8, [tied(WORDS, 6, linear(6, 6), act(nn.Tanh(), "tanh"))]),
        "positions": (5, [embedding(WORDS, 6), (Positions(5, 6), {"op": "positions", "init": None}), linear(6, WORDS)]),
        "layer-norm-last": (5, [embedding(WORDS, 6), (nn.LayerNorm(6), {"op": "layer-norm", "dims": 1, "eps": 1e-5}),
                                linear(6, WORDS)]),
        "rms-norm": (5, [embedding(WORDS, 6), (nn.RMSNorm(6, 1e-5), {"op": "rms-norm", "dims": 1, "eps": 1e-5}),
                         linear(6, WORDS)]),
        "swiglu": (5, [embedding(WORDS, 6), linear(6, 8), (Swiglu(), {"op": "swiglu"}), linear(4, WORDS)]),
        "attention": (8, [embedding(WORDS, 6), linear(6, 18), attention(3, False), linear(6, WORDS)]),
        "attention-causal": (8, [embedding(WORDS, 6), linear(6, 18), attention(1, True), linear(6, WORDS)]),
        "attention-causal-long": (70, [embedding(WORDS, 4), linear(4, 12), attention(2, True), linear(4, WORDS)]),
        "attention-rotary": (8, [embedding(WORDS, 8), linear(8, 24), attention(2, True, 100.0), linear(8, WORDS)]),
    }


def of_images():
    return {
        "conv2d-grouped": ([4, 6, 7], [conv(4, 6, 3, 1, 1, groups=2), flatten(), linear(252, 1)]),
        "conv2d-depthwise": ([4, 6, 7], [conv(4, 8, 3, 2, 1, groups=4), act(nn.ReLU(), "relu"), flatten(), linear(96, 1)]),
    }


class Block(nn.Module):
    """He et al., 2016, section 4.2, with a projection where the shape changes."""

    def __init__(self, channels, filters, stride):
        super().__init__()
        conv = lambda inputs, kernel, stride: nn.Conv2d(inputs, filters, kernel, stride, kernel // 2, bias=False)
        self.conv1, self.bn1 = conv(channels, 3, stride), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = conv(filters, 3, 1), nn.BatchNorm2d(filters)
        self.around = nn.Sequential()
        if (channels, stride) != (filters, 1):
            self.around = nn.Sequential(conv(channels, 1, stride), nn.BatchNorm2d(filters))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.around(x))


class ResNet(nn.Module):
    def __init__(self, channels, depth, width, classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                blocks.append(Block(inputs, width << stage, 2 if stage > 0 and block == 0 else 1))
                inputs = width << stage
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, classes)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def flat(tensor):
    return [float(f"{v:.9g}") for v in tensor.detach().reshape(-1).tolist()]


def state(model):
    return {k: flat(v) for k, v in model.state_dict().items() if "num_batches" not in k}


def case(name, shape, parts, loss, optimizer, clip_norm=None, clip_value=None, own_numbers=False, **craft):
    model = nn.Sequential(*[module for module, _ in parts])
    _, targets, criterion, loss_spec = loss
    if own_numbers:
        redraw(name, model)
    x = torch.randn(ROWS, *shape)
    y = torch.randn(ROWS) if targets is None else targets
    single = lambda out: out.squeeze(1) if out.shape[1] == 1 else out
    about = {"name": name, "shape": shape, "model": {"kind": "layers", "layers": [s for _, s in parts]},
             "loss": loss_spec, "classes": targets is not None, "clip_norm": clip_norm, "clip_value": clip_value, **craft}
    return trained(about, model, x, y, lambda out: criterion(single(out), y), optimizer)


def bag():
    """Texts of several lengths, filled up with token 0."""
    model = nn.Sequential(Bag(WORDS, 6), nn.Linear(6, 4))
    layers = [{"op": "embedding-bag", "width": 6, "init": None}, linear(6, 4)[1]]
    _, y, criterion, loss_spec = LOSSES["cross-entropy"]
    redraw("layer embedding-bag", model)
    x = torch.randint(WORDS, (ROWS, 8)) * (torch.arange(8) < torch.randint(1, 9, (ROWS, 1)))
    about = {"name": "layer embedding-bag", "shape": [8], "vocabulary": WORDS, "one_target": True,
             "model": {"kind": "layers", "layers": layers}, "loss": loss_spec, "classes": True, "clip_norm": None,
             "clip_value": None}
    return trained(about, model, x, y, lambda out: criterion(out, y), sgd())


def sequences(name, positions, model, spec, optimizer, rename=lambda name: name):
    """Tokens in, logits of the next ones out."""
    _, _, criterion, loss_spec = LOSSES["cross-entropy"]
    redraw(name, model)
    x, y = torch.randint(WORDS, (2, ROWS, positions))
    about = {"name": name, "shape": [positions], "vocabulary": WORDS, "model": spec, "loss": loss_spec, "classes": True,
             "clip_norm": None, "clip_value": None}
    return trained(about, model, x, y, lambda out: criterion(out.flatten(0, 1), y.flatten()), optimizer, rename)


def trained(about, model, x, y, criterion, optimizer, rename=lambda name: name):
    """What becomes of a model in training; `rename` gives its tensors the names of nn.Sequential."""
    build, spec, translate = optimizer
    clip_norm, clip_value = about["clip_norm"], about["clip_value"]
    model.eval()
    weights = {rename(k): v for k, v in state(model).items()}
    out = {**about, "optimizer": spec, "weights": weights, "inputs": flat(x.float()), "targets": flat(y.float()),
           "outputs": flat(model(x)), "losses": []}
    model.train()
    stepper = build(parameter_groups(model, about.get("groups", [])), **translate(spec))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(about["ema"])) if "ema" in about else None
    for step in range(STEPS):
        stepper.zero_grad()
        value = criterion(model(x))
        value.backward()
        if step == 0:
            out["gradients"] = {rename(k): flat(p.grad) for k, p in model.named_parameters()}
        out["losses"].append(float(f"{value.item():.9g}"))
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        if clip_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), clip_value)
        stepper.step()
        if average is not None:
            average.update_parameters(model)
    final = average or model
    final.eval()
    out["trained_outputs"] = flat(final(x))
    return out


def parameter_groups(model, groups):
    """PyTorch's groups, of the parameters that each of ours names first."""
    left = dict(model.named_parameters())
    sets = []
    for group in groups:
        of = {name: left.pop(name) for pattern in group["params"] for name in list(left)
              if pattern == "biases" and name.endswith("bias") or fnmatch.fnmatch(name, pattern)}
        sets.append({"params": list(of.values()), **{k: v for k, v in group.items() if k != "params"}})
    return [*sets, {"params": list(left.values())}]


def gpt():
    """The peers' model, under the names that its layers have here."""
    positions, width, heads, layers = 8, 12, 3, 2
    inside = {"l1": "0.0", "qkv": "0.1", "proj": "0.3", "l2": "1.0", "f1": "1.1", "f2": "1.3"}

    def rename(name):
        path = name.split(".")
        if path[0] != "b":
            return {"te": "0", "pe": "1", "ln": str(2 + 2 * layers), "head": str(3 + 2 * layers)}[path[0]] + "." + path[1]
        part, at = inside[path[2]].split(".")
        return f"{2 + 2 * int(path[1]) + int(part)}.{at}.{path[3]}"

    spec = {"kind": "gpt", "layers": layers, "heads": heads, "width": width, "hidden": 4 * width, "feed_forward": "gelu",
            "norm": "layer-norm", "positions": "learned", "bias": True, "tie": False, "dropout": 0.0}
    model = GPT(vocab=WORDS, T=positions, d=width, h=heads, L=layers)
    return sequences("gpt", positions, model, spec, OPTIMIZERS["adamw"], rename)


def resnet():
    """A whole residual network, under the names that its layers have here."""
    depth, width, shape = 8, 4, [3, 12, 12]
    inside = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "around": "shortcut"}

    def rename(name):
        part, *path = name.split(".")
        if part == "blocks":
            block, layer, *rest = path
            return ".".join([str(3 + 2 * int(block)), inside[layer], *rest])
        return ".".join([{"conv": "0", "bn": "1", "head": str(4 + 2 * (depth - 2) // 2)}[part], *path])

    model = ResNet(shape[0], depth, width, 4)
    _, y, criterion, loss_spec = LOSSES["cross-entropy"]
    redraw("resnet", model)
    about = {"name": "resnet", "shape": shape, "model": {"kind": "resnet", "depth": depth, "width": width},
             "loss": loss_spec, "classes": True, "clip_norm": None, "clip_value": None}
    x = torch.randn(ROWS, *shape)
    return trained(about, model, x, y, lambda out: criterion(out, y), OPTIMIZERS["sgd-momentum-decay"], rename)


NO_ID = 2**64 - 1
SOME_IDS = [*range(0, 50, 3), 10**12, 2**63, NO_ID - 1]


def noise(seed, shape):
    """From -1 to below 1, by whole numbers alone: tests draw the same, and the file does not hold them."""
    low = lambda x: x & 0xFFFFFFFF
    x = low((torch.arange(math.prod(shape)) + seed) * 0x9E3779B1)
    x = low((x ^ x >> 15) * 0x85EBCA77)
    return ((x ^ x >> 13) >> 8).float().div(2**23).sub(1).reshape(shape)


def thin(tensor, most=600):
    """All values of a tensor, or of a large one some, at equal distances."""
    return flat(tensor.detach().reshape(-1)[:: -(-tensor.numel() // most)])


def batches_of_ids(name, count, numbers, fields, ids, per_field=False, nothing=0.0):
    """Numbers, places of ids, low ones more often, and targets; each field has ids of its own, or all have the same."""
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    random = lambda *shape: torch.rand(*shape, generator=draw)
    for _ in range(count):
        places = (random(ROWS, fields) ** 2 * ids).long() + (torch.arange(fields) * ids if per_field else 0)
        places[random(ROWS, fields) < nothing] = ids
        yield torch.randn(ROWS, numbers, generator=draw), places, (random(ROWS) < 0.5).float()


OTHERS = 2


def candidates(name, count, ids):
    """Samples of implicit feedback: a user with its own item, then with others."""
    each = 1 + OTHERS
    for x, places, _ in batches_of_ids(name, count, 1, 2, ids, per_field=True):
        user, item = places[::each].repeat_interleave(each, 0).T
        places = torch.stack([user, ids + (item + torch.arange(ROWS) % each) % ids], 1)
        yield 0 * x, places, (torch.arange(ROWS) % each == 0).float()


def bpr(out, _):
    """Rendle et al., "BPR", 2009, equation 6."""
    out = out.unflatten(0, (-1, 1 + OTHERS))
    return -F.logsigmoid(out[:, :1] - out[:, 1:]).mean()


BY_CLASSES = nn.BCEWithLogitsLoss(), {"kind": "binary-cross-entropy", "positive_weight": 1.0}, True


def by_ids(name, model, spec, batches, optimizer, row_optimizer, known=SOME_IDS, steps=STEPS, zeros=False,
           rename=lambda name: name, run=None, loss=BY_CLASSES):
    """What becomes of a model whose batches come in turn, and of the rows that their ids choose."""
    def through(x, places):
        Lookup.places = places
        return model(x)

    run, batches = run or through, list(batches)
    criterion, loss_spec, classes = loss
    ids = [*known, NO_ID]
    tables = [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    first = {"weights": {}, "rows": {}}
    with torch.no_grad():
        for path, p in model.named_parameters():
            shape = (len(known), p.shape[1]) if path in tables else p.shape
            # A power of two: products with it are exact.
            bound = 0.0 if zeros and path in tables else 0.5 ** round(math.log2(p.shape[-1]) / 2)
            seed = zlib.crc32(f"{name} {path}".encode())
            p[: shape[0]] = bound * noise(seed, shape)
            first["rows" if path in tables else "weights"][rename(path)] = {"seed": seed, "bound": bound}
    all_of = lambda values: [value for batch in batches for value in values(*batch)]
    out = {"name": name, "shape": [batches[0][0].shape[1]], "fields": batches[0][1].shape[1], "model": spec,
           "loss": loss_spec, "classes": classes, "clip_norm": None,
           "clip_value": None, "optimizer": optimizer[1], "row_optimizer": row_optimizer[1], "known": known, **first,
           "inputs": all_of(lambda x, _, __: flat(x)), "targets": all_of(lambda _, __, y: flat(y)),
           "ids": all_of(lambda _, places, __: [ids[place] for place in places.reshape(-1).tolist()])}
    outputs = lambda: flat(run(*batches[0][:2]))
    out |= {"outputs": outputs(), "losses": []}
    of_tables, others = ([p for path, p in model.named_parameters() if (path in tables) == is_table]
                         for is_table in (True, False))
    steppers = [build(parameters, **translate(about)) for parameters, (build, about, translate) in
                ((others, optimizer), (of_tables, row_optimizer))]
    for step in range(steps):
        x, places, y = batches[step % len(batches)]
        for stepper in steppers:
            stepper.zero_grad()
        value = criterion(run(x, places)[:, 0], y)
        value.backward()
        if step == 0:
            gradient = lambda path, p: p.grad.to_dense()[: len(known)] if path in tables else p.grad
            out["gradients"] = {rename(path): thin(gradient(path, p)) for path, p in model.named_parameters()}
        out["losses"].append(float(f"{value.item():.9g}"))
        for stepper in steppers:
            stepper.step()
    return out | {"trained_outputs": outputs(),
                  "trained_rows": {rename(path): thin(model.get_parameter(path)[: len(known)]) for path in tables}}


def of_ids():
    """Models with sparse tables, and optimizers of rows, each step of which changes some of them."""
    both = sgd(lr=0.2), ROW_OPTIMIZERS["sgd"]
    spec = lambda *specs: {"kind": "layers", "layers": [*specs, linear(1, 1)[1]]}
    lookup = {"op": "lookup", "width": 3, "init": "zeros"}
    name, rows = "layer lookup", 5
    yield by_ids(name, nn.Sequential(vectors(rows, 3), nn.Linear(14, 1)),
                 spec({"op": "parallel", "join": "concat", "branches": [[lookup], []]}),
                 batches_of_ids(name, 3, 2, 4, rows, nothing=0.2), *both, SOME_IDS[-rows:])
    for kind, row_optimizer in ROW_OPTIMIZERS.items():
        name, rows = f"row optimizer {kind}", len(SOME_IDS)
        yield by_ids(name, nn.Sequential(Lookup(rows, 3), nn.Flatten(), nn.Linear(6, 1)), spec(lookup, {"op": "flatten"}),
                     batches_of_ids(name, 12, 1, 2, rows, nothing=0.1), both[0], row_optimizer, steps=24,
                     zeros=kind == "ftrl")
    name, fields, each = "deepfm", 3, 4
    yield by_ids(name, deepfm(2, fields, fields * each, 4, [8]),
                 {"kind": "deepfm", "width": 4, "hidden": [8], "dropout": 0.0},
                 batches_of_ids(name, 2, 2, fields, each, per_field=True), *both, [*range(fields * each)])
    factors = lambda rows, width: nn.Sequential(
        Parallel("sum", *wide(1, rows), [Lookup(rows, width), Products(width, add_up=True)]))
    of_candidates = {
        "bpr": (bpr, {"kind": "bpr"}, False),
        "binary-cross-entropy of candidates": (
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor(1.5)), {"kind": "binary-cross-entropy", "positive_weight": 1.5}, False),
    }
    for kind, loss in of_candidates.items():
        name = f"loss {kind}"
        yield by_ids(name, factors(2 * each, 4), {"kind": "matrix-factorization", "width": 4}, candidates(name, 3, each), *both,
                     [*range(2 * each)], loss=loss)
    name, numbers = "dlrm dot", 5
    of_dlrm = {"kind": "dlrm", "width": 4, "bottom": [8], "top": [16], "interaction": "dot"}
    yield by_ids(name, dlrm(numbers, fields, fields * each, 4, [8], [16], True), of_dlrm,
                 batches_of_ids(name, 2, numbers, fields, each, per_field=True), *both, [*range(fields * each)])
    name, fields = "dlrm", 26
    peer = DLRM(fields=fields, vocab=each)

    def rename(path):
        for theirs, ours in (("bot.net", "0.0"), ("emb", "0.1.0"), ("top.net.0", "1"), ("top.net.2", "3"), ("top.net.4", "5")):
            path = path.replace(theirs, ours)
        return path

    yield by_ids(name, peer, {**of_dlrm, "width": 16, "bottom": [64], "top": [256, 64], "interaction": "concat"},
                 batches_of_ids(name, 4, 13, fields, each, per_field=True), *both, [*range(fields * each)],
                 rename=rename, run=lambda x, places: peer(x, places - peer.off)[:, None])


def schedules(total=60):
    def factors(build):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = build(optimizer)
        values = []
        for _ in range(total):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return values

    known = [
        ({"kind": "step", "every": 7, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
        ({"kind": "multi-step", "milestones": [5, 20, 33], "gamma": 0.3},
         lambda o: lr_scheduler.MultiStepLR(o, [5, 20, 33], 0.3)),
        ({"kind": "exponential", "gamma": 0.97}, lambda o: lr_scheduler.ExponentialLR(o, 0.97)),
        ({"kind": "cosine", "min_factor": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, total, 0.1)),
        ({"kind": "linear", "end_factor": 0.2}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total)),
        ({"kind": "polynomial", "power": 2.0, "end_factor": 0.0}, lambda o: lr_scheduler.PolynomialLR(o, total, 2.0)),
        ({"kind": "one-cycle", "start_fraction": 0.3, "div_factor": 25.0, "final_div_factor": 1e4},
         lambda o: lr_scheduler.OneCycleLR(o, 1.0, total, cycle_momentum=False)),
    ]
    values = [{"schedule": {"kind": s, "warmup_steps": 0}, "factors": factors(b)} for s, b in known]

    def after_warmup(steps, build):
        def both(optimizer):
            rise = lr_scheduler.LinearLR(optimizer, 1 / steps, 1.0, steps - 1)
            return lr_scheduler.SequentialLR(optimizer, [rise, build(optimizer)], [steps])
        return both

    warm = [
        ({"kind": "constant"}, 5, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
        ({"kind": "step", "every": 7, "gamma": 0.5}, 9, lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
        ({"kind": "cosine", "min_factor": 0.1}, 10, lambda o: lr_scheduler.CosineAnnealingLR(o, total - 10, 0.1)),
        ({"kind": "linear", "end_factor": 0.2}, 6, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total - 6)),
        ({"kind": "polynomial", "power": 2.0, "end_factor": 0.0}, 4,
         lambda o: lr_scheduler.PolynomialLR(o, total - 4, 2.0)),
    ]
    values += [{"schedule": {"kind": s, "warmup_steps": w}, "factors": factors(after_warmup(w, b))} for s, w, b in warm]
    # Vaswani et al., 2017, section 5.3, scaled to 1 at its peak.
    root = lambda o: lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 8, (8 / (s + 1)) ** 0.5))
    values.append({"schedule": {"kind": {"kind": "inverse-sqrt"}, "warmup_steps": 8}, "factors": factors(root)})
    metrics = [1.0, 0.9, 0.95, 0.91, 0.9, 0.93, 0.8, 0.8, 0.81, 0.82, 0.83, 0.79, 0.9, 0.9, 0.9, 0.9]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=1e-3)
    rates = []
    for metric in metrics:
        plateau.step(metric)
        rates.append(optimizer.param_groups[0]["lr"])
    return {"total": total, "known": values, "plateau": {"factor": 0.5, "patience": 1, "threshold": 1e-3,
                                                         "metrics": metrics, "rates": rates}}


def differences(old, new, where=""):
    """Where two of JSON's values are not the same; numbers in lists may differ by rounding, in units of the largest."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [found for key in old for found in differences(old[key], new[key], f"{where}.{key}".lstrip("."))]
    is_list = lambda value: isinstance(value, list) and all(isinstance(x, (int, float)) for x in value)
    if is_list(old) and is_list(new) and len(old) == len(new):
        scale = max(map(abs, [0.02, *old]))
        apart = max((abs(a - b) / scale for a, b in zip(old, new)), default=0.0)
        return [f"{where} differs by {apart:.2g}"] if apart > ROUNDING else []
    return [] if old == new else [f"{where or 'its keys'} differ"]


def main():
    mse, plain = LOSSES["mse"], sgd()
    cases = [case(f"layer {n}", shape, parts, mse, plain) for n, (shape, parts) in LAYERS.items()]
    cases += [case(f"loss {n}", [5], [linear(5, l[0])], l, plain) for n, l in LOSSES.items()]
    mlp = lambda: [linear(5, 8), act(nn.Tanh(), "tanh"), linear(8, 1)]
    cases += [case(f"optimizer {n}", [5], mlp(), mse, o) for n, o in OPTIMIZERS.items()]
    cases += [case("clip by norm", [5], mlp(), mse, OPTIMIZERS["sgd-momentum-decay"], clip_norm=0.3),
              case("clip by value", [5], mlp(), mse, OPTIMIZERS["sgd-momentum-decay"], clip_value=0.05)]
    # Later cases draw numbers of their own, so that none changes another.
    own = {"own_numbers": True}
    cases += [case(f"layer {n}", shape, parts, mse, plain, **own) for n, (shape, parts) in more_layers().items()]
    cases += [case(f"loss {n}", [5], [linear(5, l[0])], l, plain, **own) for n, l in MORE_LOSSES.items()]
    cases += [case(f"optimizer {n}", [5], mlp(), mse, o, **own) for n, o in MORE_OPTIMIZERS.items()]
    cases += [case("average of the weights", [5], mlp(), mse, OPTIMIZERS["adamw"], ema=0.9, **own),
              case("average of the weights, lamb", [5], mlp(), mse, MORE_OPTIMIZERS["lamb"], ema=0.7, **own),
              case("parameter groups", [5], mlp(), mse, OPTIMIZERS["adamw"], groups=GROUPS, **own)]
    of_layers = lambda parts: (nn.Sequential(*[m for m, _ in parts]), {"kind": "layers", "layers": [s for _, s in parts]})
    cases += [sequences(f"layer {n}", t, *of_layers(parts), plain) for n, (t, parts) in of_tokens().items()]
    cases += [bag(), gpt()]
    cases += [case(f"layer {n}", shape, parts, mse, plain, **own) for n, (shape, parts) in of_images().items()]
    cases += [resnet(), *of_ids()]
    path = Path(__file__).with_name("values.json")
    before = json.loads(path.read_text()) if path.exists() else {"cases": []}
    check, anew = "--check" in sys.argv[1:], set(sys.argv[1:]) - {"--check"}
    # As they will be read: without tuples.
    made = json.loads(json.dumps({about["name"]: about for about in cases} | {"schedules": schedules()}))
    known = {about["name"]: about for about in before["cases"]}
    known |= {"schedules": before["schedules"]} if "schedules" in before else {}
    kept = {name: known[name] for name in made if name in known and name not in anew}
    wrong = [f"there is no case {name!r}" for name in anew - made.keys()]
    wrong += [f"{name}: is in the file, and no longer made" for name in known.keys() - made.keys()]
    wrong += [f"{name}: {what}" for name, old in kept.items() for what in differences(old, made[name])]
    wrong += [f"{name}: is not in the file" for name in made if check and name not in known]
    if not check:
        now = {**made, **kept}
        values = {"torch": torch.__version__, "rows": ROWS, **before,
                  "cases": [now[about["name"]] for about in cases], "schedules": now["schedules"]}
        path.write_text(json.dumps(values, separators=(",", ":")) + "\n")
    if wrong:
        sys.exit("\n".join(wrong) + "\nto make cases anew, name them: make.py 'layer linear' ...")


if __name__ == "__main__":
    main()
