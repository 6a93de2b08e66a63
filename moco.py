"""Tensors and vectors: the encoder, the method that trains it, and the measures of what it learnt.

Takes views as float [B, 3, S, S] in [-1, 1] and gives a loss and unit vectors; takes unit vectors and gives figures with
intervals. Knows no parquet and no Hydra, and of files those that hold an encoder.

Measuring: `enrol` draws who is in the gallery, `build_gallery` makes templates, `search` ranks them for each probe, `count_pairs`
scores every probe against every template. `closed_set`, `verification` and `open_set` turn these into columns: a name and one
contribution a probe, whose mean is the figure. `rates` turns columns into figures with intervals, `measure` puts them together.

Papers: iResNet as in ArcFace (arXiv:1801.07698); MoCo (arXiv:1911.05722) and its v2 (arXiv:2003.04297); MarginNCE as in
USynthFace (arXiv:2211.07371) and, with the other sign, in Park et al. (arXiv:2211.01966); EMAN (arXiv:2101.08482). CMC, TPIR and
FPIR: ISO/IEC 19795-1, NISTIR 8271. Interval: Wilson 1927 with the effective sample size of Korn and Graubard 1998. Geometry:
Wang and Isola 2020 (arXiv:2005.10242), RankMe (arXiv:2210.02885).
"""

import copy
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger("sniperface")
EMBEDDING_DIM = 512
TIE = 1e-6  # cosines closer than this are equal: that far apart come the products of equal rows, in float32
GRID = 2**17  # impostor cosines are counted in steps of 1 / GRID = 7.6e-6, finer than any interval
PAIRS = 2**22  # scores that are held at a time: 16 MB
CMC_RANKS = range(1, 21)
NEIGHBOURS = 5  # nearest rows that are kept of each probe
MIN_ERRORS = 10  # a rate of false matches is quoted from at least so many: standard error a third of it, at best
Z95 = 1.959964  # two-sided 95 % of the normal distribution

Columns = dict[str, np.ndarray]

# ---- The encoder: iResNet ----


@dataclass
class BackboneConfig:
    name: str
    layers: list[int] = field(metadata={"at_least": 1})
    width: float = field(metadata={"above": 0, "at_most": 4})
    input_size: int = field(metadata={"at_least": 32, "at_most": 448})
    dropout: float = field(metadata={"at_least": 0, "below": 1})


class PReLUOnLines(torch.autograd.Function):
    """PReLU of x [B, C, H, W] with slopes [C], on lines [B*H, W*C], which are views where memory is channels last.

    The gradient of torch's own is not vectorised on the CPU: with ours `train` takes 1/1.3 of the time there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        b, c, h, w = x.shape
        lines = x.permute(0, 2, 3, 1).reshape(b * h, w * c)
        slopes = weight.to(x.dtype).repeat(w)  # [W*C]
        ctx.save_for_backward(lines, slopes)
        ctx.dtype = weight.dtype
        return F.prelu(lines, slopes).view(b, h, w, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        lines, slopes = ctx.saved_tensors
        b, c, h, w = gradient.shape
        gradient = gradient.permute(0, 2, 3, 1).reshape(b * h, w * c)
        above = torch.ops.aten.threshold_backward(gradient, lines, 0)  # the gradient where x > 0, else 0
        below = gradient - above
        of_x = torch.addcmul(above, below, slopes).view(b, h, w, c).permute(0, 3, 1, 2)
        return of_x, below.mul_(lines).sum(0).view(w, c).sum(0, dtype=ctx.dtype)


class PReLU(nn.PReLU):
    def forward(self, x: Tensor) -> Tensor:
        on_lines = x.device.type == "cpu" and not torch.compiler.is_exporting()  # to others it is one operation
        return PReLUOnLines.apply(x, self.weight) if on_lines else super().forward(x)


class IBasicBlock(nn.Module):
    """BN-conv-BN-PReLU-conv-BN with a shortcut and no activation after the sum, [B, C, H, W] -> [B, C', H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


class IResNet(nn.Module):
    """The face encoder of ArcFace: views [B, 3, S, S] in [-1, 1] -> embeddings [B, 512], not normalised.

    With layers (3, 4, 14, 3) or (3, 13, 30, 3), width 1 and input_size 112 the state dict has the names and shapes of the public
    ArcFace iResNet-50 and -100. A view of another size than `input_size` is resized inside, so that the data contract stays 112 px.
    """

    def __init__(self, layers: Iterable[int], width: float = 1.0, input_size: int = 112, dropout: float = 0.0):
        super().__init__()
        self.input_size = input_size
        channels = [max(8, round(width * c)) for c in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.prelu = PReLU(channels[0])
        previous, side = channels[0], input_size
        for number, (blocks, c) in enumerate(zip(layers, channels, strict=True), start=1):
            stage = [IBasicBlock(previous if i == 0 else c, c, stride=2 if i == 0 else 1) for i in range(blocks)]
            setattr(self, f"layer{number}", nn.Sequential(*stage))
            previous, side = c, (side + 1) // 2
        self.bn2 = nn.BatchNorm2d(previous)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(previous * side * side, EMBEDDING_DIM)
        self.features = nn.BatchNorm1d(EMBEDDING_DIM)
        self.features.weight.requires_grad = False  # the embedding's scale is fixed: only its direction counts
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def penultimate(self, x: Tensor) -> Tensor:
        """What the last layer sees, rows [B, 8C * (S/16)^2]: 25,088 values of the public networks."""
        if x.shape[-1] != self.input_size:
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", antialias=True)
        x = self.prelu(self.bn1(self.conv1(x)))  # [B, C, S, S]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 8C, S/16, S/16]
        return self.bn2(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(self.fc(self.dropout(self.penultimate(x))))  # [B, 512]


def iresnet50(**settings) -> IResNet:
    return IResNet((3, 4, 14, 3), **settings)


def build_backbone(cfg: BackboneConfig) -> IResNet:
    return IResNet(cfg.layers, cfg.width, cfg.input_size, cfg.dropout)


class ProjectionHead(nn.Module):
    """From the embedding [B, 512] to the contrastive space [B, dim]: `none` (USynthFace), or `mlp`, MoCo v2's two layers."""

    def __init__(self, kind: str = "none", dim: int = EMBEDDING_DIM):
        super().__init__()
        self.dim = dim if kind == "mlp" else EMBEDDING_DIM
        hidden = nn.Linear(EMBEDDING_DIM, EMBEDDING_DIM)
        self.layers = nn.Sequential(hidden, nn.ReLU(), nn.Linear(EMBEDDING_DIM, dim)) if kind == "mlp" else nn.Identity()

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding)


# ---- The loss: MarginNCE ----


def cosines(q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of unit rows: each query [B, D] with its own key [B, D] -> [B, 1] and with the queue [K, D] -> [B, K]."""
    return (q * k).sum(dim=1, keepdim=True), q @ queue.T


class MarginNCE(nn.Module):
    """InfoNCE whose positive must win by `margin` in cosine (USynthFace, arXiv:2211.07371), over a softmax of `temperature`.

    margin > 0 is stricter, margin < 0 (arXiv:2211.01966) forgives noisy positives, 0 is InfoNCE. Takes unit rows: queries [B, D],
    keys [B, D] of which row i is the positive of query i, and a queue [K, D] of negatives; or their cosines. Gives a loss [].
    """

    def __init__(self, temperature: float, margin: float):
        super().__init__()
        self.temperature, self.margin = temperature, margin

    def forward(self, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        return self.of_cosines(*cosines(q, k, queue))

    def of_cosines(self, positive: Tensor, negative: Tensor) -> Tensor:
        logits = torch.cat([positive - self.margin, negative], dim=1) / self.temperature  # [B, 1 + K]
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def chance_loss(queue_size: int, temperature: float, margin: float) -> float:
    """Loss of an encoder that knows nothing, all cosines equal: ln(1 + K e^(m/T))."""
    return math.log1p(queue_size * math.exp(margin / temperature))


# ---- The method: momentum contrast with a guard against the BatchNorm leak ----


@dataclass
class MocoConfig:
    queue_size: int = field(metadata={"at_least": 1, "at_most": 2**26})
    temperature: float = field(metadata={"at_least": 1e-3})
    margin: float = field(metadata={"at_least": -1, "at_most": 1})
    key_momentum: float = field(metadata={"at_least": 0, "at_most": 1})
    key_momentum_schedule: str = field(metadata={"one_of": ("constant", "cosine")})
    symmetric: bool
    guard: str = field(metadata={"one_of": ("shuffle", "eman", "none")})
    shuffle_groups: int = field(metadata={"at_least": 2})
    head: str = field(metadata={"one_of": ("none", "mlp")})
    head_dim: int = field(metadata={"at_least": 2})


class StepOutput(NamedTuple):
    """What one step gives. All are tensors on the device; reading one waits for it."""

    loss: Tensor  # []
    keys: Tensor  # [B, D] unit rows, float32 ([2B, D] with the symmetric loss), to enqueue after backward
    pos_sim: Tensor  # [] mean cosine of a query and its key
    neg_sim: Tensor  # [] mean cosine of a query and the queue
    neg_max: Tensor  # [] mean over the queries of their hardest negative's cosine
    instance_top1: Tensor  # [] share of the queries whose key beats the whole queue
    spread: Tensor  # [] of the queries: 1 is evenly spread over the sphere, 0 a collapse to one point


def spread_of(unit_rows: Tensor) -> Tensor:
    """Mean standard deviation per dimension times sqrt(D) of unit rows [B, D] -> []: 1 when spread evenly, 0 when collapsed."""
    return unit_rows.std(dim=0, correction=0).mean() * math.sqrt(unit_rows.shape[1])


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and a queue of keys (MoCo, arXiv:1911.05722), with MarginNCE.

    The key encoder must not cheat: where query and key are normalised by statistics of the same batch, they recognise each other
    by them. `guard` is what prevents it, on one GPU and on the CPU as well:
      shuffle  the key encoder sees the batch in a random order and in `shuffle_groups` sub-batches, each with its own statistics
      eman     the key encoder normalises by the moving average of the query encoder's statistics (arXiv:2101.08482)
      none     it does not: for comparison only
    """

    def __init__(
        self, backbone: nn.Module, head: ProjectionHead, loss: MarginNCE, queue_size: int, guard: str = "shuffle",
        shuffle_groups: int = 8, symmetric: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.query = nn.Sequential(OrderedDict(backbone=backbone, head=head))
        self.key = copy.deepcopy(self.query).requires_grad_(False)  # a copy: head and statistics included
        self.loss = loss
        self.guard, self.shuffle_groups, self.symmetric = guard, shuffle_groups, symmetric
        self.register_buffer("queue", torch.zeros(queue_size, head.dim))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))

    def encode_queries(self, views: Tensor) -> Tensor:
        """Views [B, 3, S, S] -> unit rows [B, D] in float32, with gradient."""
        return F.normalize(self.query(views).float())

    @torch.no_grad()
    def encode_keys(self, views: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Views [B, 3, S, S] -> unit rows [B, D] in float32, row i for view i; `generator` (CPU) draws the guard's shuffle."""
        self.key.train(self.guard != "eman")
        if self.guard != "shuffle" or not self.training:
            return F.normalize(self.key(views).float())
        order = torch.randperm(len(views), generator=generator).to(views.device)
        groups = max(1, min(self.shuffle_groups, len(views) // 2))  # BatchNorm cannot normalise one image
        keys = torch.cat([self.key(part) for part in views[order].tensor_split(groups)]).float()
        return F.normalize(torch.empty_like(keys).index_copy_(0, order, keys))

    def forward(self, view_q: Tensor, view_k: Tensor, generator: torch.Generator | None = None) -> StepOutput:
        """Two views [B, 3, S, S] of the same images in the same order -> loss and what the log wants to know."""
        pairs = [(view_q, view_k)] + ([(view_k, view_q)] if self.symmetric else [])
        losses, keys = [], []
        for for_query, for_key in pairs:
            k = self.encode_keys(for_key, generator)  # [B, D]
            q = self.encode_queries(for_query)  # [B, D]
            with torch.autocast(q.device.type, enabled=False):  # in bf16 a logit at T = 0.07 is off by up to 0.03
                positive, negative = cosines(q, k, self.queue)  # [B, 1], [B, K]
                losses.append(self.loss.of_cosines(positive, negative))
            keys.append(k)
        loss = torch.stack(losses).mean()
        with torch.no_grad():
            hardest = negative.amax(dim=1, keepdim=True)  # [B, 1]
            return StepOutput(
                loss=loss, keys=torch.cat(keys),
                pos_sim=positive.mean(), neg_sim=negative.mean(), neg_max=hardest.mean(),
                instance_top1=(positive > hardest).float().mean(), spread=spread_of(q),
            )  # fmt: skip

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """key <- momentum * key + (1 - momentum) * query, after the optimiser's step. EMAN averages the statistics likewise."""
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), 1 - momentum)
        if self.guard == "eman":
            pairs = zip(self.key.buffers(), self.query.buffers(), strict=True)
            key_stats, query_stats = zip(*[(k, q) for k, q in pairs if k.is_floating_point()], strict=True)
            torch._foreach_lerp_(list(key_stats), list(query_stats), 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys [B, D] over the oldest ones. The pointer is a tensor and wraps: no wait, no rule that B divides the queue.

        A key that is not finite, as an overflow in fp16 gives, leaves the old one in its place.
        """
        slots = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        keys = torch.where(keys.isfinite().all(dim=1, keepdim=True), keys, self.queue[slots])
        self.queue.index_copy_(0, slots, keys)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % len(self.queue))


def key_momentum_at(progress: float, base: float, schedule: str) -> float:
    """At `progress` in [0, 1] of the training: constant, or from `base` to 1 along a cosine (BYOL, arXiv:2006.07733)."""
    return base if schedule == "constant" else 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


def calibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the BatchNorm statistics of `model` to the plain average over `batches` of views; no weight changes."""
    torch.optim.swa_utils.update_bn(batches, model)


def build_moco(backbone: BackboneConfig, cfg: MocoConfig, seed: int) -> MoCo:
    """The untrained model: the same weights for the same seed. Raises ValueError where there is too little memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return MoCo(
                build_backbone(backbone), ProjectionHead(cfg.head, cfg.head_dim), MarginNCE(cfg.temperature, cfg.margin),
                cfg.queue_size, cfg.guard, cfg.shuffle_groups, cfg.symmetric,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:  # torch's word for too little memory
            raise ValueError(f"backbone and moco.queue_size={cfg.queue_size}: {str(error)[:200]}; lower them") from error


def load_weights(model: MoCo, weights: dict[str, Tensor]) -> None:
    """Put the weights of a checkpoint into `model`. Raises ValueError where they are those of another one."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights of this checkpoint do not fit its own settings: {told}") from error


# ---- Positives beyond the same picture ----

EXACT_ROWS = 200_000  # of more rows the nearest are found approximately
REFERENCE_ROWS, WHITEN_ROWS = 4096, 20_000  # train pictures that LBP and PCA, and an encoder's whitening, are fitted on, at most


@dataclass
class PositivesConfig:
    name: str = field(metadata={"one_of": ("self", "mutual")})
    p: float = field(metadata={"at_least": 0, "at_most": 1})
    neighbours: int = field(metadata={"at_least": 2, "at_most": 16})
    keep: float = field(metadata={"above": 0, "at_most": 1})
    every_epochs: int = field(metadata={"at_least": 1})


class Links(NamedTuple):
    """Pictures that stand in for each other as positives."""

    partners: Tensor  # int64 [N, neighbours] rows that a row is linked to, those that are none, -1, last
    closure: float  # share of the pairs of partners of one row that are linked themselves; NaN where no row has two
    least: float = math.inf  # cosine of the worst one
    right: float = math.nan  # of links that are found alike among validation pictures, the share within one person
    covered: float = math.nan  # the share of those pictures that are linked

    @property
    def count(self) -> int:
        return int((self.partners >= 0).sum()) // 2

    def __str__(self) -> str:
        linked = int((self.partners[:, 0] >= 0).sum())
        text = f"{self.count:,} links of {linked:,} pictures, {self.closure:.2f} of their triangles closed"
        return text + f"; of validation pictures {self.covered:.2f} are linked so, {self.right:.2f} rightly" * (self.covered >= 0)


def nearest_rows(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and row numbers [N, count] of the rows nearest to each of the unit rows [N, D], itself left out, by FAISS."""
    import faiss  # see `search`

    if len(vectors) <= EXACT_ROWS:
        index = faiss.IndexFlatIP(vectors.shape[1])
    else:
        index = faiss.index_factory(vectors.shape[1], f"IVF{4 * math.isqrt(len(vectors))},Flat", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = 64
        index.train(vectors[:: max(1, len(vectors) // EXACT_ROWS)])
    index.add(vectors)
    score, row = index.search(vectors, count + 1)
    other = row != np.arange(len(row))[:, None]
    other[other.all(axis=1), -1] = False  # of equal rows another one may stand where itself should
    return score[other].reshape(-1, count), row[other].reshape(-1, count)


def mutual_links(vectors: Tensor, neighbours: int, keep: float, at_least: "Links | None" = None) -> Links | None:
    """Link unit rows [N, D] each of which is among the other's nearest: the best-scoring share `keep` of such pairs.

    A right link's neighbours are linked themselves, so the closure tells, without labels, how many are right. With `at_least`, as
    many pairs are linked, up to three times those, as close no fewer triangles; None where even as many would close fewer.
    """
    score, row = mutual_neighbours(vectors, neighbours)
    falling = -np.sort(-score[row >= 0])  # each pair twice
    wanted = [max(1, round(keep * len(falling) / 2))] if at_least is None else [round(at_least.count * f) for f in (3, 2, 1.5, 1)]
    for pairs in wanted:
        least = falling[min(2 * pairs, len(falling)) - 1] if len(falling) else math.inf
        links = links_above(least, score, row)
        if at_least is None or links.closure >= at_least.closure:
            return links
    return None


def mutual_neighbours(vectors: Tensor, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and row numbers [N, neighbours] of the nearest of each unit row that it is among the nearest of; others are -1."""
    score, row = nearest_rows(vectors.numpy(), neighbours)
    return score, np.where((row[row] == np.arange(len(row))[:, None, None]).any(axis=2), row, -1)


def links_above(least: float, score: np.ndarray, row: np.ndarray) -> Links:
    """`mutual_neighbours` of at least that cosine, as links with their closure."""
    partners = -np.sort(-np.where(score >= least, row, -1), axis=1)
    closed = []
    for a, b in itertools.combinations(range(partners.shape[1]), 2):
        one, other = partners[partners[:, b] >= 0][:, [a, b]].T  # -1 stand last
        closed.append((partners[one] == other[:, None]).any(axis=1))
    closed = np.concatenate(closed)
    return Links(torch.from_numpy(partners), float(closed.mean()) if len(closed) else math.nan, float(least))


def join_vectors(parts: Iterable[Tensor]) -> Tensor:
    """Unit rows [N, D] of the same pictures by several encoders, as unit rows, whose cosines are the mean of theirs."""
    return F.normalize(torch.cat([*parts], dim=1))


def judge_links(links: Links, vectors: Tensor, person: np.ndarray) -> Links:
    """The links with a diagnosis: how many of those that are found alike among other unit rows [N, D] join one person [N]."""
    partners = links_above(links.least, *mutual_neighbours(vectors, links.partners.shape[1])).partners.numpy()
    one, place = np.nonzero(partners >= 0)
    right = (person[one] == person[partners[one, place]]).mean() if len(one) else math.nan
    return links._replace(right=float(right), covered=len(np.unique(one)) / len(partners))


# ---- Training: what a step changes, and the step ----

MONITOR_TEMPERATURE = 0.2


@dataclass
class TrainConfig:
    init: str | None
    epochs: int = field(metadata={"at_least": 1})
    batch_size: int = field(metadata={"at_least": 2})
    lr: float = field(metadata={"above": 0})
    lr_schedule: str = field(metadata={"one_of": ("cosine", "constant")})
    momentum: float = field(metadata={"at_least": 0, "below": 1})
    weight_decay: float = field(metadata={"at_least": 0})
    warmup_epochs: float = field(metadata={"at_least": 0})
    clip_grad_norm: float | None = field(metadata={"above": 0})
    amp: str = field(metadata={"one_of": ("auto", "bf16", "fp16", "fp32")})
    compile: bool
    max_steps: int | None = field(metadata={"at_least": 1})
    monitor_images: int = field(metadata={"at_least": 2})
    min_spread: float = field(metadata={"at_least": 0, "below": 1})
    min_gap: float = field(metadata={"at_least": 0, "below": 1})
    when_stuck: str = field(metadata={"one_of": ("warn", "stop")})
    probe_every_epochs: int | None = field(metadata={"at_least": 1})
    log_every: int = field(metadata={"at_least": 1})
    save_every_epochs: int = field(metadata={"at_least": 1})
    save_every_steps: int | None = field(metadata={"at_least": 1})
    keep_last: int = field(metadata={"at_least": 1})
    resume: str = field(metadata={"one_of": ("auto", "never", "must")})
    extend: bool


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises ValueError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name}: {str(error)[:200]}; choose auto, cpu, cuda, cuda:N or mps") from error
    return device


def computes_in_bf16() -> bool:
    """Whether this CPU multiplies faster in bf16 than in fp32: Intel's do with AMX alone, else at 0.66 of the rate; AMD's at 2."""
    intel = "intel" in torch.cpu.get_capabilities().get("cpu_name", "").lower()
    return torch.cpu._is_amx_tile_supported() if intel else torch.cpu._is_avx512_bf16_supported()


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast type: `auto` is bf16 where that is faster, else fp16 on a GPU, else fp32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and computes_in_bf16() else torch.float32


def warmup_steps(total_steps: int, steps_per_epoch: int, cfg: TrainConfig) -> float:
    """The steps of the warm-up: a tenth of them all where what was asked for leaves none for the cosine."""
    asked = cfg.warmup_epochs * steps_per_epoch
    return asked if asked < total_steps else total_steps / 10


def lr_at(step: int, total_steps: int, steps_per_epoch: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then the rate itself, or half a cosine to zero (arXiv:1608.03983)."""
    warmup = warmup_steps(total_steps, steps_per_epoch, cfg)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    if cfg.lr_schedule == "constant":
        return cfg.lr
    return cfg.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2


def build_optimizer(model: MoCo, cfg: TrainConfig, fused: bool) -> torch.optim.SGD:
    """SGD with momentum; no weight decay on what has one dimension: BatchNorm, PReLU and biases."""
    trained = [p for p in model.query.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=fused)


class Training:
    """All that a step changes and a checkpoint holds: the model, the optimiser, the scaler, the monitor and the step."""

    def __init__(self, model: MoCo, cfg: TrainConfig, device: torch.device):
        self.cfg, self.device, self.step = cfg, device, 0  # steps that are finished
        self.precision = pick_precision(cfg.amp, device)
        scaled = self.precision == torch.float16
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(model, cfg, fused=device.type in ("cpu", "cuda") and not scaled)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.first_bad_step = torch.tensor(-1, device=device)  # of the loss; set on the device, so that no step waits
        self.monitor: dict[str, float] = {"untrained": math.nan, "last": math.nan, "best": math.inf}
        self.links: dict[str, Links] = {}  # those in use, by what they were found

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "step": self.step, "monitor": dict(self.monitor), "links": {name: tuple(links) for name, links in self.links.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`. Raises ValueError where the weights are those of another model."""
        load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.monitor = state["step"], dict(state["monitor"])
        self.links = {name: Links(*links) for name, links in state.get("links", {}).items()}

    @property
    def links_in_use(self) -> tuple[str, Links]:
        """By what they were found, and the links."""
        return [*self.links.items()][-1]

    def link_figures(self) -> dict[str, float]:
        """Of the links in use, for the log; what nobody knows is left out."""
        if not self.links:
            return {}
        links = self.links_in_use[1]
        known = {name: round(value, 4) for name, value in zip(links._fields[1:], links[1:], strict=True) if math.isfinite(value)}
        return {"links": links.count} | {f"links_{name}": value for name, value in known.items()}

    def compile(self) -> None:
        for encoder in (self.model.query, self.model.key):
            encoder.compile()  # in place: the names in the checkpoint stay

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def take_step(
        self, view_q: Tensor, view_k: Tensor, lr: float, key_momentum: float, generator: torch.Generator
    ) -> tuple[StepOutput, Tensor]:
        """One step of the paper, each line of it a line; gives the loss and the like, and the gradient's norm [].

        view_q, view_k: float [B, 3, S, S] in [-1, 1] of the same pictures. `generator` (CPU) draws shuffle and dropout.
        """
        model, optimizer, scaler = self.model, self.optimizer, self.scaler
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(generator.initial_seed())  # dropout draws from torch's own generator
        with self.autocast():
            out = model(view_q, view_k, generator)
        scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer)
        limit = self.cfg.clip_grad_norm or math.inf  # inf only measures
        grad_norm = nn.utils.clip_grad_norm_(model.query.parameters(), limit)  # after backward
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.update_key_encoder(key_momentum)
        model.enqueue(out.keys)  # after backward: the queue needs no copy
        self.step += 1
        if not scaler.is_enabled():  # the scaler of fp16 skips a step that is not finite and goes on
            bad = ~(torch.isfinite(out.loss) & torch.isfinite(grad_norm)) & (self.first_bad_step < 0)
            self.first_bad_step = torch.where(bad, self.step, self.first_bad_step)
        return out, grad_norm

    def find_bad_step(self) -> int | None:
        """The step whose loss or gradient was not finite, or this one where fp16 has run out of scale; waits for the device."""
        bad = int(self.first_bad_step)
        if bad < 0 and self.scaler.is_enabled():  # a skipped step leaves the weights alone, but not BatchNorm's averages
            averages = torch.cat([b.flatten() for b in self.model.query.buffers() if b.is_floating_point()])
            bad = self.step if self.scaler.get_scale() < 1 or not averages.isfinite().all() else bad
        return None if bad < 0 else bad

    @torch.no_grad()
    def fill_queue(self, pairs: Iterable[tuple[Tensor, Tensor, torch.Generator]]) -> None:
        """Fill the queue before the first step with keys of two views [B, 3, S, S] a batch; a short supply is repeated."""
        model, queue, filled = self.model, self.model.queue, 0
        for view_q, view_k, generator in pairs:
            torch.manual_seed(generator.initial_seed())  # for dropout
            with self.autocast():
                if not filled and not self.cfg.init:  # cold statistics make worse keys than no guard at all
                    calibrate_batchnorm(model.query, [view_q])
                    model.key.load_state_dict(model.query.state_dict())
                keys = model.encode_keys(view_k, generator)
            model.enqueue(keys[: len(queue)])
            filled += len(keys)
        queue.copy_(queue[torch.arange(len(queue), device=queue.device) % filled])
        model.queue_ptr.zero_()

    @torch.no_grad()
    def renew_links(
        self, pictures: Callable[[], Iterable[Tensor]], rows: int, cfg: PositivesConfig,
        others: Callable[["Encoder"], Any] | None = None,
    ) -> None:  # fmt: skip
        """Link mutual neighbours: by LBP, or, from the second time on, by the encoder or both together, where these close as many
        triangles.

        pictures: gives all train pictures, so many rows, as views [n, 3, S, S] without augmentation, each time in the same order.
        others: gives `vectors` [n, D] and `names` of validation pictures, to judge links by, or None; nothing depends on it.
        """
        model = self.model.eval()

        def penultimate(views: Tensor) -> Tensor:
            with self.autocast():
                return model.query.backbone.penultimate(views).float()

        def some() -> Iterator[Tensor]:
            every, seen = -(-rows // REFERENCE_ROWS), 0
            for views in pictures():
                if len(part := views[-seen % every :: every]):
                    yield part
                seen += len(views)

        describers = {"lbp": lbp_histograms} | ({"encoder": penultimate} if self.links else {})
        encoders = {name: fit_whitened(with_mirrored(describe, flip=True), some()) for name, describe in describers.items()}
        vectors = {name: torch.cat([encode(views) for views in pictures()]) for name, encode in encoders.items()}
        links = mutual_links(vectors["lbp"], cfg.neighbours, cfg.keep)
        found = {("lbp",): links}
        for names in (("encoder",), ("lbp", "encoder")) if self.links else ():
            found[names] = mutual_links(join_vectors(vectors[name] for name in names), cfg.neighbours, cfg.keep, at_least=links)
        names = max(filter(found.get, found), key=lambda names: found[names].count * found[names].closure)  # many, and likely right
        links = found[names]
        if others and (faces := others(lambda views: join_vectors(encoders[name](views) for name in names))):
            links = judge_links(links, torch.from_numpy(faces.vectors), faces.names)
        self.links = {" and ".join(names): links}
        model.train()
        log.info("positives by %s: %s", *self.links_in_use)

    @torch.no_grad()
    def measure_monitor(self, parts: list[tuple[Tensor, Tensor]]) -> float:
        """A label-free figure that does not saturate: InfoNCE of fixed images under fixed hard views, each against all others.

        parts: two views [B, 3, S, S] each. In nats; ln(M) is chance for M images. The query encoder alone, and a temperature of
        its own, so that runs of any recipe can be compared.
        """
        model = self.model.eval()
        with self.autocast():
            q, k = (torch.cat([model.encode_queries(views[side]) for views in parts]) for side in (0, 1))
        model.train()
        return round(float(F.cross_entropy(q @ k.T / MONITOR_TEMPERATURE, torch.arange(len(q), device=q.device))), 6)


def compare_steps(one: Training, other: Training, view_q: Tensor, view_k: Tensor, seed: int) -> dict[str, float]:
    """How far apart the same step comes out of two states, on two devices maybe: loss and gradient norm relative, keys absolute."""
    found = []
    for training in (one, other):
        generator = torch.Generator().manual_seed(seed)
        views = (view.to(training.device, memory_format=torch.channels_last) for view in (view_q, view_k))
        out, norm = training.take_step(*views, lr=0.01, key_momentum=0.99, generator=generator)
        found.append((float(out.loss.detach()), float(norm), out.keys.cpu()))
    (loss, norm, keys), (other_loss, other_norm, other_keys) = found
    return {
        "loss": abs(loss - other_loss) / abs(loss), "grad_norm": abs(norm - other_norm) / norm,
        "keys": float((keys - other_keys).abs().max()),
    }  # fmt: skip


def signs_of_failure(entry: dict, untrained: float, cfg: TrainConfig, warmed_up: bool) -> dict[str, str]:
    """What a line of the log says of a run that will come to nothing: {cause: what was found and what to look at}.

    untrained: the monitor's loss before the first step.
    """
    found, gap = {}, entry["pos_sim"] - entry["neg_sim"]
    if entry["spread"] < cfg.min_spread:
        found["collapse"] = (
            f"all pictures get nearly the same vector: spread {entry['spread']:.3f} < train.min_spread={cfg.min_spread}; "
            "look at train.lr, moco.temperature and the norm of the gradient"
        )
    if warmed_up and gap < cfg.min_gap:
        found["no contrast"] = (
            f"a picture's own key is no nearer than others: cosines {entry['pos_sim']:.3f} and {entry['neg_sim']:.3f}, "
            f"less than train.min_gap={cfg.min_gap} apart; look at plots/views.png: are views of one picture still alike?"
        )
    # a NaN is no better either; weights that training starts from may be good already
    if warmed_up and not cfg.init and "monitor_loss" in entry and not entry["monitor_loss"] < untrained:
        found["not learning"] = (
            f"the monitor's loss {entry['monitor_loss']:.3f} is no better than untrained, {untrained:.3f}; "
            "look at train.lr, moco.key_momentum and the augmentation"
        )
    return found


# ---- Frozen encoders: the trained one, and what it must beat ----

Encoder = Callable[[Tensor], Tensor]  # views float [n, 3, S, S] in [-1, 1], on its device -> unit rows float32 [n, D]
PCA_SIDE_PX = 32
FEW_ROWS = 1000  # fewer are whitened less
WHITENING_POWER = 0.7  # 1 is whole, 0 is none; of encoders, LBP and PCA alike: a compromise of accuracy and Rank-1, see tests/bench


class Whitening(NamedTuple):
    """Features seen from the mean, along their principal directions, whose variances are brought nearer to each other."""

    mean: Tensor  # [D]
    matrix: Tensor  # [D, 512], zeros where there are fewer directions

    def __call__(self, features: Tensor) -> Tensor:
        """[n, D] -> unit rows float32 [n, 512]"""
        return F.normalize((features - self.mean) @ self.matrix)


def fit_whitening(features: Tensor) -> Whitening:
    """Fit to rows [N, D], without labels.

    Each of the 512 first directions is divided by its standard deviation to the power WHITENING_POWER: so little-varying directions
    count, and what a face encoder learns early lies in these. Takes O(min(N, D)^3): half a minute for 4,096. Raises ValueError
    for features that are not finite.
    """
    power = WHITENING_POWER * min(1, len(features) / FEW_ROWS)
    if len(features) < FEW_ROWS:
        log.warning("a whitening of %d pictures is rough: less is whitened", len(features))
    rows = features.double()  # the last directions have a thousandth of the first's variance, and less
    mean = rows.mean(0)
    if not mean.isfinite().all():
        raise ValueError("whitening: what the encoder says of the train pictures is not finite; use an earlier checkpoint")
    rows -= mean
    wide = rows.shape[1] > len(rows)
    gram = rows @ rows.T if wide else rows.T @ rows
    variance, vectors = (part.flip(-1)[..., :EMBEDDING_DIM] for part in torch.linalg.eigh(gram / len(rows)))
    kept = variance >= 1e-9 * variance[0]  # the others are noise of rounding
    variance, vectors = variance[kept].clamp(min=TIE**2), vectors[:, kept]
    directions = F.normalize(rows.T @ vectors, dim=0) if wide else vectors
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    matrix = directions * largest.sign() * variance ** (-power / 2)  # the order of the rows decides no sign
    return Whitening(mean.float(), F.pad(matrix.float(), (0, EMBEDDING_DIM - len(variance))))


def fit_whitened(describe: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Encoder:
    """Whitened features: of views [n, 3, S, S], `describe` gives rows [n, D]."""
    features = torch.cat([describe(views) for views in batches])
    whitening = Whitening(*(part.to(features.device) for part in fit_whitening(features.cpu())))
    return lambda views: whitening(describe(views)).cpu()


def with_mirrored(describe: Callable[[Tensor], Tensor], flip: bool) -> Callable[[Tensor], Tensor]:
    """Adds what `describe` says of the mirrored picture, with `flip`."""
    return (lambda views: describe(views) + describe(views.flip(3))) if flip else describe


class FrozenEncoder(nn.Module):
    """From pictures to unit rows float32 [n, 512], in fp32, so that a vector does not depend on its batch.

    With a whitening, this takes the place of the network's last layer: as a projection head does, the last layer throws away
    what the training's task does not ask for (arXiv:2002.05709, 2110.09348). Else the vectors are the network's embeddings.
    Takes views float [n, 3, S, S] in [-1, 1], or RGB pictures as they are decoded, uint8 [n, S, S, 3]; anything else raises
    ValueError. `flip` adds what is said of the mirrored picture.
    """

    def __init__(self, backbone: IResNet, flip: bool, whitening: Whitening | None = None):
        super().__init__()
        self.backbone, self.flip = backbone, flip
        self.register_buffer("mean", whitening and whitening.mean)
        self.register_buffer("matrix", whitening and whitening.matrix)
        self.eval().requires_grad_(False)

    def penultimate(self, views: Tensor) -> Tensor:
        """What a whitening is fitted to: views [n, 3, S, S] -> rows [n, D]."""
        return with_mirrored(self.backbone.penultimate, self.flip)(views).float()

    def forward(self, pictures: Tensor | np.ndarray) -> Tensor:
        pictures = torch.as_tensor(pictures)
        decoded, shape = pictures.dtype == torch.uint8, pictures.shape[1:]
        if len(shape) != 3 or shape != ((shape[1], shape[1], 3) if decoded else (3, shape[1], shape[1])):
            found = f"{pictures.dtype} {list(pictures.shape)}".removeprefix("torch.")
            raise ValueError(f"pictures: expected uint8 [n, S, S, 3] or float [n, 3, S, S] in [-1, 1], found {found}")
        views = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1 if decoded else pictures.float()
        if self.mean is None:
            return F.normalize(with_mirrored(self.backbone, self.flip)(views).float())
        return Whitening(self.mean, self.matrix)(self.penultimate(views))


def freeze(backbone: IResNet, device: torch.device, flip: bool, whitening: Whitening | None = None) -> FrozenEncoder:
    """The backbone itself, from now on without gradient, as an encoder on `device`."""
    return FrozenEncoder(backbone, flip, whitening).to(device, memory_format=torch.channels_last)


def grey_of(views: Tensor) -> Tensor:
    """Views [n, 3, S, S] -> luma [n, 1, S, S], on the CPU."""
    return views.cpu().mul(torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def small_grey(views: Tensor) -> Tensor:
    """Views [n, 3, S, S] -> small grey pictures as rows [n, PCA_SIDE_PX^2], for eigenfaces (Turk and Pentland 1991)."""
    small = F.interpolate(grey_of(views), size=(PCA_SIDE_PX, PCA_SIDE_PX), mode="bilinear", antialias=True)
    return small.flatten(1)


def lbp_histograms(views: Tensor) -> Tensor:
    """Square roots of local histograms of uniform binary patterns: views [n, 3, S, S] -> [n, 3 radii * 81 cells * 59] = [n, 14337].

    Local binary patterns of 8 neighbours on circles of 1, 2 and 3 px (Ojala et al. 2002), counted in 9 x 9 cells of 10 px (a face
    descriptor: Ahonen et al. 2006), in the middle 96 x 96 px of a picture of 112 x 112 px; others are resized first.
    """
    grey = F.interpolate(grey_of(views), size=(112, 112), mode="bilinear", antialias=True)[:, 0, 8:104, 8:104]  # [n, 96, 96]
    bits = [[byte >> i & 1 for i in range(8)] for byte in range(256)]
    uniform = [byte for byte in range(256) if sum(a != b for a, b in itertools.pairwise([*bits[byte], bits[byte][0]])) <= 2]
    label = torch.full((256,), len(uniform)).index_copy_(0, torch.tensor(uniform), torch.arange(len(uniform)))  # 58: all others
    cell = torch.arange(90) // 10
    first = (torch.arange(len(grey))[:, None, None] * 81 + 9 * cell[:, None] + cell) * 59  # [n, 90, 90] of the cell's histogram
    centre = grey[:, 3:93, 3:93] - TIE

    def histogram(radius: int) -> Tensor:
        code = torch.zeros(len(grey), 90, 90, dtype=torch.uint8)
        for bit in range(8):
            y, x = 3 - radius * math.sin(math.pi * bit / 4), 3 + radius * math.cos(math.pi * bit / 4)
            top, left = math.floor(y + 1e-9), math.floor(x + 1e-9)  # a whole pixel is one, whatever the rounding of sine
            rows = torch.lerp(grey[:, top : top + 90], grey[:, min(top + 1, 6) :][:, :90], y - top)
            neighbour = torch.lerp(rows[:, :, left : left + 90], rows[:, :, min(left + 1, 6) :][:, :, :90], x - left)
            code += (neighbour > centre).to(torch.uint8) << bit
        return torch.bincount((first + label[code.int()]).flatten(), minlength=len(grey) * 81 * 59).view(len(grey), -1)

    return torch.cat([histogram(radius) for radius in (1, 2, 3)], dim=1).float().sqrt()


# ---- Encoders in files: ours, the public ones, and out to others ----

PARITY = 1e-4  # by so much may a value of a unit vector differ outside torch
EXTRA = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}  # packages of each format
SEAL, DIGEST_BYTES = b"sha256:", 64


def seal(path: Path) -> None:
    """Append the SHA-256 of a file of `torch.save` to it, as the comment of its zip archive, which readers pass over.

    The checksums in the archive are not enough: a flipped bit in its directory can pass for other values.
    """
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)  # the archive ends with the length of its comment, 0 until now
        file.write((len(SEAL) + DIGEST_BYTES).to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(SEAL + digest.encode())


def check_seal(path: Path) -> None:
    """Raise ValueError if a file is not as it was when it was sealed, or was never sealed."""
    data = np.memmap(path, np.uint8, "r")
    told = bytes(data[-len(SEAL) - DIGEST_BYTES :])
    if told != SEAL + hashlib.sha256(data[: -len(told)]).hexdigest().encode():
        raise ValueError("does not match its checksum, or has none")


def need_extra(formats: Iterable[str]) -> None:
    """Raise ValueError, with what to type, where a package for one of `formats` is missing."""
    packages = (package for name in formats for package in EXTRA.get(name, ()))
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        told = "run with `uv run --extra export python sniperface.py ...`"
        raise ValueError(f"{', '.join(missing)}: not installed; {told}")


class Weights(NamedTuple):
    """The encoder that a file holds."""

    backbone: dict[str, Tensor]  # by the names of the public ArcFace iResNets, which are those of `IResNet`
    config: BackboneConfig  # as the file notes it, else as names and shapes tell
    flip: bool
    whitening: Whitening | None
    state: dict  # all that a checkpoint of ours holds; empty for other files


def tensors_in(state: object, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in nested dicts by their paths, such as model.query.backbone.conv1.weight."""
    found = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        found |= {f"{prefix}{key}": value} if isinstance(value, Tensor) else tensors_in(value, f"{prefix}{key}.")
    return found


def tell_backbone(weights: dict[str, Tensor]) -> BackboneConfig:
    """The network that weights under the public names are of: its blocks by their names, its width and side by their shapes."""
    layers = [len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)]
    channels = weights["bn2.weight"].numel() if "bn2.weight" in weights else 512
    pixels = weights["fc.weight"].numel() / EMBEDDING_DIM / channels if "fc.weight" in weights else 49  # of the last stage
    return BackboneConfig(f"iresnet{2 * sum(layers) + 2}", layers, channels / 512, 16 * round(math.sqrt(pixels)), 0.0)


def read_weights(path: str | Path) -> Weights:
    """Read a checkpoint of a run, weights of an ArcFace iResNet (.pt, .pth), or what `command=export` wrote (.safetensors).

    Tensors and plain values alone are read: nothing in the file is executed. Public files may hold the weights within others, as
    `state_dict` or below `module.`. Raises ValueError for a damaged file, for one that holds no such encoder, and where an extra
    is missing.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            need_extra(["safetensors"])
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                state, noted = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
            settings, ours = json.loads(noted.get("sniperface", "{}")), False
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings, ours = {}, isinstance(state, dict) and {"config", "meta"} <= state.keys()
            if ours:
                check_seal(path)
                settings = state["config"] | state["config"]["embed"]
        tensors = tensors_in(state)
        fitted = {name: tensors.pop(f"whitening.{name}", None) for name in ("mean", "matrix", "projection", "basis")}
        whitening = None if fitted["matrix"] is None else Whitening(fitted["mean"], fitted["matrix"])
        if fitted["mean"] is not None and not whitening:
            log.warning("%s: its whitening is of an older kind and is left out; command=train, then export, renew it", path)
        last = next((name for name in tensors if name.endswith("features.weight")), None)
        if last is None:
            raise ValueError("holds no weights of an iResNet (conv1, bn1, prelu, layer1.0.bn1, ..., bn2, fc, features)")
        prefix = last.removesuffix("features.weight")
        backbone = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        config = BackboneConfig(**settings["backbone"]) if settings else tell_backbone(backbone)
        return Weights(backbone, config, bool(settings.get("flip")), whitening, state if ours else {})
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, pickle, torch and safetensors raise a dozen types for damaged files
        told = str(error) if isinstance(error, ValueError) else f"damaged, or no state_dict of tensors ({type(error).__name__})"
        raise ValueError(f"{path}: cannot be used: {told}") from error


def put_weights(backbone: IResNet, weights: Weights, place: object) -> IResNet:
    """Put all of the weights into all of `backbone`. Raises ValueError, with what does not fit, where that cannot be."""
    needed = backbone.state_dict()
    found = {name: value for name, value in needed.items() if name.endswith("num_batches_tracked")}  # old files have no counters
    found |= weights.backbone
    shapes = ((name, list(found[name].shape), list(needed[name].shape)) for name in needed.keys() & found.keys())
    wrong = {
        "missing": [name for name in needed if name not in found],
        "unknown": [name for name in found if name not in needed],
        "of another shape": sorted(f"{name} {has}, which must be {needs}" for name, has, needs in shapes if has != needs),
    }
    if any(wrong.values()):
        told = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in wrong.items() if names)
        of = weights.config
        layers = ",".join(map(str, of.layers))
        like = f"backbone.layers=[{layers}] backbone.width={of.width:g} backbone.input_size={of.input_size}"
        raise ValueError(f"{place}: its weights do not fit this network: {told}. They look like those of {like}")
    backbone.load_state_dict(found)
    return backbone


def load_encoder(path: str | Path, flip: bool | None = None) -> FrozenEncoder:
    """The frozen encoder of a file that `read_weights` reads, on the CPU; `flip` as the file says unless given.

    A whitening is of what is said of mirrored pictures, too, or not: with the other `flip` than the file's, vectors stay raw, as
    those of a run's checkpoint without one do; both are told.
    """
    weights = read_weights(path)
    whitening = weights.whitening if flip in (None, weights.flip) else None
    if whitening is None and (weights.state or weights.whitening):
        log.warning("%s: no whitening for these vectors: they are raw embeddings; command=export writes one with it", path)
    backbone = put_weights(build_backbone(weights.config), weights, path)
    return freeze(backbone, torch.device("cpu"), weights.flip if flip is None else flip, whitening)


def public_weights(encoder: FrozenEncoder) -> dict[str, Tensor]:
    """The backbone's tensors under the names of the public ArcFace iResNets, on the CPU."""
    return {name: value.cpu().contiguous() for name, value in encoder.backbone.state_dict().items()}


def save_safetensors(encoder: FrozenEncoder, path: Path, note: dict[str, str]) -> None:
    """Write tensors and a note, from which `load_encoder` makes the same encoder."""
    from safetensors.torch import save

    white = {} if encoder.mean is None else {"whitening.mean": encoder.mean, "whitening.matrix": encoder.matrix}
    tensors = public_weights(encoder) | {name: value.cpu().contiguous() for name, value in white.items()}
    path.write_bytes(save(tensors, metadata=note))  # what `save_file` writes nobody else may read


class FromPixels(nn.Module):
    """An encoder of float pictures [n, 3, S, S] in 0..255."""

    def __init__(self, encoder: FrozenEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pictures: Tensor) -> Tensor:
        return self.encoder(pictures / 127.5 - 1)


def save_onnx(encoder: nn.Module, path: Path, pictures: Tensor, note: dict[str, str]) -> float:
    """Write the encoder as ONNX, for any number of pictures like `pictures`; gives the largest difference to torch on these.

    Input `pictures`, output `vectors`. Raises ValueError where onnxruntime gives values that differ by more than PARITY.
    """
    import onnxruntime

    for chatty in ("onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    two = pictures[:1].repeat(2, 1, 1, 1)  # of one, the exporter would make a constant
    batch = {0: torch.export.Dim("batch")}
    names = {"input_names": ["pictures"], "output_names": ["vectors"]}
    program = torch.onnx.export(encoder, (two,), dynamo=True, dynamic_shapes=(batch,), verbose=False, **names)
    program.model.metadata_props.update(note)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = (pictures[:1], pictures)
    theirs = np.concatenate([session.run(["vectors"], {"pictures": part.numpy()})[0] for part in parts])
    apart = float(np.abs(theirs - torch.cat([encoder(part) for part in parts]).numpy()).max())
    if not apart <= PARITY:
        raise ValueError(f"onnxruntime's vectors differ from torch's by up to {apart:.1e}, allowed is {PARITY:g}: not exported")
    return apart


# ---- Vectors and enrolment ----


def _parts(rows: np.ndarray, size: int = 2**15) -> Iterator[np.ndarray]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def check_vectors(embeddings: np.ndarray, place: str = "embeddings", foreign: bool = False) -> None:
    """Refuse float vectors [N, D] that would make every figure wrong: none, NaN or infinite, of no or another length, all equal.

    Those of a foreign program may have any length: they are brought to length 1 in place, and a line says so. Raises ValueError
    that says how many rows, which is the first, and what to do. Our own length may differ from 1 by 1e-3.
    """
    if embeddings.ndim != 2 or not embeddings.size:
        raise ValueError(f"{place}: expected vectors [N, D], found shape {embeddings.shape}; write them with command=embed")
    squared = [np.einsum("nd,nd->n", part, part, dtype=np.float64) for part in _parts(embeddings)]
    length = np.sqrt(np.concatenate(squared))  # [N], NaN stays NaN
    other = np.abs(length - 1) > 1e-3
    for bad, what, cure in (
        (~np.isfinite(length), "hold NaN or infinity", "leave these rows out, or embed an earlier checkpoint"),
        (length == 0, "are zero", "leave these rows out, or write them again"),
        (other & (not foreign), "are not of unit length", "the file is damaged: write it again with command=embed"),
    ):
        if bad.any():
            raise ValueError(f"{place}: {bad.sum()} of {len(bad)} vectors {what}, first row {bad.argmax()}; {cure}")
    if foreign:
        embeddings /= length[:, None]
    if other.any():
        log.info("%s: %d of %d vectors are not of unit length: each is divided by its length", place, other.sum(), len(other))
    if len(embeddings) > 1 and all((np.abs(part - embeddings[0]) < TIE).all() for part in _parts(embeddings)):
        raise ValueError(
            f"{place}: all {len(embeddings)} vectors are equal, so the encoder has collapsed; "
            "look at the spread in the training log and embed an earlier checkpoint"
        )


class Enrolment(NamedTuple):
    """Who is in the gallery. Rows are numbers into the file, ordered by (name, key) whatever the order of the file."""

    identity: np.ndarray  # [N] code of each row: place of its name among the sorted names
    enrolled: np.ndarray  # [R] rows in the gallery, rows of an identity side by side
    probes: np.ndarray  # [P] other rows of enrolled identities
    unknown: np.ndarray  # [U] all rows of identities that were left out of the gallery
    distractors: int  # identities enrolled whole: in the gallery, without a probe


def _draw(seed: int, purpose: str, *columns: np.ndarray) -> np.ndarray:
    """One uint64 [N] a row, hashed from the seed, the purpose and the row's strings: equal on every machine, in any order."""

    def number(*parts: str) -> int:
        text = "\x1f".join((str(seed), purpose, *parts)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")

    return np.fromiter(map(number, *(column.tolist() for column in columns)), np.uint64, len(columns[0]))


def enrol(names: np.ndarray, keys: np.ndarray, per_id: int, seed: int, open_set_share: float = 0.0) -> Enrolment:
    """Draw `per_id` enrolment images of each identity; the other images are its probes.

    names, keys: strings [N], the identity of a row and the name of its image (source and file), unique within the identity.
    An identity with at most per_id images is enrolled whole, as a distractor. round(open_set_share * identities) identities are
    not enrolled: all their images are unknown probes. Each draw hashes (seed, name, key) alone, so it does not depend on the
    order of the rows, and which images are enrolled not on who else is in the file. Raises ValueError for doubled images and
    where no probe is left.
    """
    names, keys = np.asarray(names, str), np.asarray(keys, str)
    people, identity = np.unique(names, return_inverse=True)
    order = np.lexsort((keys, identity))
    twice = np.flatnonzero((names[order][1:] == names[order][:-1]) & (keys[order][1:] == keys[order][:-1]))
    if len(twice):
        name, key = names[order[twice[0]]], keys[order[twice[0]]]
        raise ValueError(
            f"enrol: {len(twice)} rows repeat an image, first '{key}' of identity '{name}': it could be enrolled and probed with; "
            "write each image once"
        )
    left_out = np.zeros(len(people), bool)
    left_out[np.argsort(_draw(seed, "open", people))[: round(open_set_share * len(people))]] = True
    drawn = np.lexsort((_draw(seed, "enrol", names, keys), identity))  # per identity, images in the order of their draw
    count = np.bincount(identity)
    place = np.arange(len(drawn)) - np.repeat(np.cumsum(count) - count, count)  # 0, 1, ... within the identity
    in_gallery = np.zeros(len(names), bool)
    in_gallery[drawn[place < per_id]] = True
    is_unknown = left_out[identity[order]]
    first, rest = order[in_gallery[order] & ~is_unknown], order[~in_gallery[order] & ~is_unknown]
    if not len(rest):
        most = count[~left_out].max(initial=0)
        raise ValueError(
            f"enrol: no probes left: {per_id} images of each identity are enrolled and the largest of {(~left_out).sum()} "
            f"enrolled identities has {most}; {'lower eval.enroll_per_id or ' * int(most > 1)}embed more images of each"
        )
    distractors = int(((count <= per_id) & ~left_out).sum())
    return Enrolment(identity, first, rest, order[is_unknown], distractors)


class Gallery(NamedTuple):
    """Templates. `vectors` [R, D] has one row an identity (centroid) or its enrolled images side by side (best)."""

    vectors: np.ndarray  # float32 [R, D], unit rows
    identity: np.ndarray  # [G] code of each template, ascending
    owner: np.ndarray  # [R] template of each row

    def index(self, identity: np.ndarray) -> np.ndarray:
        """Template number of each identity code, -1 where it is not enrolled."""
        at = np.minimum(np.searchsorted(self.identity, identity), len(self.identity) - 1)
        return np.where(self.identity[at] == identity, at, -1)


def build_gallery(vectors: np.ndarray, identity: np.ndarray, template: str = "centroid") -> Gallery:
    """Templates from the enrolled unit rows [R, D] and their codes [R], ascending.

    centroid: mean of the unit vectors, then L2 norm. best: all images stay, a probe's score is its best among an identity's.
    Raises ValueError for another template, and for a centroid of length 0, which has no direction.
    """
    code, owner = np.unique(identity, return_inverse=True)
    if template == "best":
        return Gallery(np.ascontiguousarray(vectors, np.float32), code, owner)
    mean = np.zeros((len(code), vectors.shape[1]))
    for rows in _parts(np.arange(len(vectors))):
        torch.from_numpy(mean).index_add_(0, torch.from_numpy(owner[rows]), torch.from_numpy(vectors[rows].astype(np.float64)))
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    if (length < TIE).any():
        raise ValueError(
            f"gallery: {(length < TIE).sum()} centroids have no direction, their images cancel out; use eval.template=best"
        )
    return Gallery((mean / length).astype(np.float32), code, np.arange(len(code)))


# ---- Search and comparison ----


class Found(NamedTuple):
    """What `search` finds for P probes."""

    rank: np.ndarray  # [P] rank of the own template, 1 is best, ties against us; last_rank + 1 for all beyond last_rank
    row: np.ndarray  # [P, K] nearest rows of gallery.vectors, K = min(NEIGHBOURS, R)
    score: np.ndarray  # [P, K] their cosines, falling


def _first_of_each(owner: np.ndarray) -> np.ndarray:
    """True [B, K] where an owner stands for the first time in its row."""
    order = np.argsort(owner, axis=1, kind="stable")
    ordered = np.take_along_axis(owner, order, axis=1)
    starts, first = np.ones(owner.shape, bool), np.empty(owner.shape, bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    np.put_along_axis(first, order, starts, axis=1)
    return first


def search(vectors: np.ndarray, probes: np.ndarray, own: np.ndarray, gallery: Gallery, last_rank: int) -> Found:
    """Look every probe up among the templates by FAISS's `IndexFlatIP`, which is exact.

    vectors: unit rows [N, D]; probes: rows of them [P]; own: template of each [P], -1 for an unknown person, who is found at no
    rank. Ties count against us: a rank is the number of templates that score at least as high, so an encoder that maps all faces
    to one point has no Rank-1. A template of several rows scores by its best one.
    """
    import faiss  # here, not above: only eval needs it, and it brings an OpenMP runtime of its own

    index = faiss.IndexFlatIP(gallery.vectors.shape[1])
    index.add(gallery.vectors)
    rows_each = int(np.bincount(gallery.owner).max())
    near = min((last_rank + 1) * rows_each, len(gallery.vectors))  # so many rows hold at least last_rank + 1 templates
    ranks, rows, scores = [], [], []
    for part in _parts(np.arange(len(probes)), max(1, PAIRS // near)):
        score, row = index.search(np.ascontiguousarray(vectors[probes[part]], np.float32), near)  # [B, near]
        owner = gallery.owner[row]
        is_own = owner == own[part, None]
        own_score = np.where(is_own, score, -np.inf).max(axis=1, keepdims=True)
        ahead = (score >= own_score - np.float32(TIE)) & (_first_of_each(owner) if rows_each > 1 else True)
        ranks.append(np.where(is_own.any(axis=1), np.minimum(ahead.sum(axis=1), last_rank + 1), last_rank + 1))
        rows.append(row[:, :NEIGHBOURS])
        scores.append(score[:, :NEIGHBOURS])
    return Found(np.concatenate(ranks), np.concatenate(rows), np.concatenate(scores))


def step_of(score: np.ndarray) -> np.ndarray:
    """The step of the grid in which each cosine lies, int32 in [0, 2 GRID)."""
    return (np.asarray(score, np.float32) * GRID + GRID).clip(0, 2 * GRID - 1).astype(np.int32)


def count_scores(score: np.ndarray) -> np.ndarray:
    """How many cosines of any shape lie in each step of the grid, [2 GRID]."""
    return np.bincount(step_of(score).ravel(), minlength=2 * GRID)


@torch.no_grad()
def count_pairs(
    vectors: np.ndarray, probes: np.ndarray, own: np.ndarray, gallery: Gallery, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Score all pairs of a probe and a template, a block of PAIRS at a time, on `device`; arguments as of `search`, all known.

    Gives each probe's cosine with its own template [P], and the table of counts of all others: how many of them lie in each step
    of 1 / GRID from -1, [2 GRID]. No score is sampled or estimated.
    """
    templates, owner = torch.from_numpy(gallery.vectors).to(device), torch.from_numpy(gallery.owner).to(device)
    counts, genuine = torch.zeros(2 * GRID, dtype=torch.long, device=device), []
    for part in _parts(np.arange(len(probes)), max(1, PAIRS // len(templates))):
        score = torch.from_numpy(np.asarray(vectors[probes[part]], np.float32)).to(device) @ templates.T  # [B, R]
        if len(gallery.identity) < len(templates):  # the best row of each template, [B, G]
            best = torch.full((len(score), len(gallery.identity)), -1.0, device=device)
            score = best.scatter_reduce_(1, owner.expand(len(score), -1), score, "amax")
        genuine.append(score.gather(1, torch.from_numpy(own[part, None]).to(device)).cpu())
        step = score.mul_(GRID).add_(GRID).clamp_(0, 2 * GRID - 1).int()
        counts += torch.bincount(step.view(-1), minlength=2 * GRID)
    genuine = torch.cat(genuine).squeeze(1).numpy()
    return genuine, counts.cpu().numpy() - count_scores(genuine)


# ---- Figures as columns ----


def closed_set(rank: np.ndarray, ks: Iterable[int] = CMC_RANKS) -> Columns:
    """CMC columns rank<k> of ranks [P] that count from 1."""
    return {f"rank{k}": rank <= k for k in ks}


def _steps_at(impostors: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The lowest step at or above which lie at most a share `rates` of the impostors; 2 GRID is above all."""
    above = np.cumsum(impostors[::-1])  # of the highest 1, 2, ... steps
    return 2 * GRID - np.searchsorted(above, np.floor(rates * above[-1] + 1e-9), side="right")


def thresholds(impostors: np.ndarray, rates: list[float]) -> dict[float, float | None]:
    """The smallest threshold that holds each rate of false matches; None where the pairs cannot support the rate.

    impostors: table of counts [2 GRID]. Supported means that MIN_ERRORS false matches or more are allowed: below that the rate
    that the threshold really has could easily be twice or half the rate that is written beside it.
    """
    steps = _steps_at(impostors, np.array(rates))
    allowed = np.array(rates) * impostors.sum() + 1e-9
    return {r: float(at / GRID - 1) if n >= MIN_ERRORS else None for r, n, at in zip(rates, allowed, steps, strict=True)}


def is_match(score: np.ndarray, threshold: float) -> np.ndarray:
    """Whether scores reach a threshold, judged on the grid as the thresholds were; a threshold of 1 lies above all."""
    return step_of(score) >= round((threshold + 1) * GRID)


def equal_error(genuine: np.ndarray, impostors: np.ndarray) -> tuple[float, int, float]:
    """Where false matches and misses are equally frequent: the rate, on the line between points of the ROC, and its step.

    Third, by what share of a small rise of the miss rate that point rises, for the interval: from both curves' slopes around it.
    """
    false_match = 1 - np.concatenate([[0], np.cumsum(impostors)]) / impostors.sum()  # [2 GRID + 1] by step of the threshold
    missed = np.concatenate([[0], np.cumsum(count_scores(genuine))]) / len(genuine)
    at = int((missed >= false_match).argmax())  # at least 1: at step 0 all match
    before, after = false_match[at - 1] - missed[at - 1], missed[at] - false_match[at]
    rate = missed[at - 1] + (missed[at] - missed[at - 1]) * before / (before + after)
    left, right = max(at - GRID // 50, 0), min(at + GRID // 50, 2 * GRID)
    fall, rise = false_match[left] - false_match[right], missed[right] - missed[left]
    return float(rate), at, float(fall / (fall + rise)) if fall + rise > 0 else 1.0


def verification(genuine: np.ndarray, impostors: np.ndarray, fars: list[float]) -> tuple[Columns, dict[float, float | None]]:
    """TAR at each supported FAR, equal error rate and AUC from all genuine scores [N] and the table of impostor counts.

    Returns columns tar@<far>, auc, eer, and the threshold of each FAR, None where it is refused; of fewer than MIN_ERRORS impostors
    there is no column. Exact for scores on the grid; ties count half in the AUC. The impostors, and so the thresholds, are held
    fixed: intervals are those of the genuine side.
    """
    if not impostors.any():
        raise ValueError("verification: no impostor pairs, the gallery holds one identity; embed at least two")
    at = thresholds(impostors, fars)
    columns = {f"tar@{far:g}": is_match(genuine, at[far]) for far in fars if at[far] is not None}
    if impostors.sum() < MIN_ERRORS:
        return columns, at
    step, below = step_of(genuine), np.cumsum(impostors)
    columns["auc"] = (below[step] - impostors[step] / 2) / below[-1]
    rate, crossing, share = equal_error(genuine, impostors)
    missed = step < crossing
    columns["eer"] = rate + share * (missed - missed.mean())  # more misses move the crossing by a share of themselves
    return columns, at


def open_set(known: Found, unknown: Found, fpirs: list[float]) -> tuple[Columns, dict[float, float | None]]:
    """TPIR at each supported FPIR for rank 1: the right person comes first and reaches the threshold.

    At the threshold at most a share FPIR of the unknown probes finds anyone. Columns tpir@<fpir> have a row for each known
    probe, then for each unknown one: its row says how far that probe moves the threshold and with it the TPIR (delta method).
    Returns the thresholds too, None where fewer than MIN_ERRORS false alarms would be allowed.
    """
    first, genuine = known.rank == 1, known.score[:, 0]
    impostors = count_scores(unknown.score[:, 0])
    at = thresholds(impostors, fpirs)
    columns = {}
    for fpir in (fpir for fpir in fpirs if at[fpir] is not None):
        hit, alarm = first & is_match(genuine, at[fpir]), is_match(unknown.score[:, 0], at[fpir])
        around = np.array([fpir / 2, min(2 * fpir, 1)])
        low, high = ((first & (step_of(genuine) >= step)).mean() for step in _steps_at(impostors, around))
        slope = (high - low) / (np.log(around[1] / around[0]) * fpir)  # dTPIR / dFPIR
        moves = [(hit - hit.mean()) / len(hit), -slope * (alarm - alarm.mean()) / len(alarm)]
        columns[f"tpir@{fpir:g}"] = hit.mean() + np.concatenate(moves) * (len(hit) + len(alarm))
    return columns, at


class PairAccuracy(NamedTuple):
    mean: float
    standard_error: float  # of the mean over the folds
    accuracy: np.ndarray  # [F]
    threshold: np.ndarray  # [F] each chosen on the other folds


def _best_threshold(score: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the highest accuracy, half way between two scores; of several best ones the middle one."""
    if same.all() or not same.any():
        raise ValueError("pairs: the other folds hold only one kind of pair, same or different; mix both into each fold")
    value, where = np.unique(score, return_inverse=True)
    gain = np.bincount(where, np.where(same, -1, 1))  # of raising the threshold past a score
    right = same.sum() + np.concatenate([[0], np.cumsum(gain)])  # [V + 1]: threshold below value 0, 1, ... or above all
    edge = np.concatenate([[value[0] - 1], (value[:-1] + value[1:]) / 2, [value[-1] + 1]])
    best = np.flatnonzero(right == right.max())
    return float(edge[best[len(best) // 2]])


def pair_accuracy(score: np.ndarray, same: np.ndarray, fold: np.ndarray) -> PairAccuracy:
    """Accuracy of a pair protocol (LFW, Huang et al. 2007): each fold is judged by the threshold that is best on the others.

    score [N], same bool [N], fold int [N]. Raises ValueError for fewer than 2 folds, or without both kinds in the other folds.
    """
    folds = np.unique(fold)
    if len(folds) < 2:
        raise ValueError(f"pairs: {len(folds)} fold; the threshold comes from the other folds, so give at least 2 (LFW has 10)")
    threshold = np.array([_best_threshold(score[fold != one], same[fold != one]) for one in folds])
    accuracy = np.array([((score >= at) == same)[fold == one].mean() for at, one in zip(threshold, folds, strict=True)])
    return PairAccuracy(float(accuracy.mean()), float(accuracy.std(ddof=1) / np.sqrt(len(folds))), accuracy, threshold)


# ---- Intervals ----


class Rate(NamedTuple):
    value: float
    low: float  # of the 95 % interval
    high: float


def student_t(df: np.ndarray) -> np.ndarray:
    """97.5 % point of Student's t for df >= 4, to 1e-3 (Abramowitz and Stegun 26.7.5)."""
    return Z95 + 2.37227 / df + 2.82247 / df**2 + 2.55578 / df**3 + 1.58952 / df**4


def bootstrap(columns: list[np.ndarray], identity: np.ndarray, seed: int, draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of M columns [N], and how they vary when identities [N] are drawn again with replacement, the gallery fixed.

    Gives [M] each: the mean over all rows, its standard error, and the 97.5 % point of Student's t for its interval.

    Images of one person succeed or fail together, so it is persons that are drawn. A spread that rests on few of them is itself
    uncertain: its degrees of freedom are (sum r^2)^2 / sum r^4 over their residuals r, at least 4 (found by simulation).
    """
    person = np.unique(identity, return_inverse=True)[1]
    size = np.bincount(person).astype(np.float64)  # [J]
    total = np.stack([np.bincount(person, column) for column in columns], axis=1)  # [J, M]
    mean = total.sum(axis=0) / size.sum()
    generator, drawn = np.random.default_rng([seed, 95]), np.empty((draws, len(columns)))
    for here in _parts(np.arange(draws), 64):  # one product for many draws: 1.5 x
        people = (generator.integers(len(size), size=len(size)) for _ in here)
        weight = np.stack([np.bincount(drawn_people, minlength=len(size)) for drawn_people in people]).astype(np.float64)
        drawn[here] = weight @ total / (weight @ size)[:, None]
    residual = (total - size[:, None] * mean) ** 2
    carriers = residual.sum(axis=0) ** 2 / np.maximum((residual**2).sum(axis=0), 1e-300)
    return mean, drawn.std(axis=0, ddof=1), student_t(np.maximum(carriers, 4))


def wilson(rate: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval (1927) of a rate seen in so many independent trials, which need not be whole."""
    shrink = 1 + Z95**2 / trials
    middle = (rate + Z95**2 / (2 * trials)) / shrink
    half = Z95 * np.sqrt(rate * (1 - rate) / trials + (Z95 / (2 * trials)) ** 2) / shrink
    return np.round(middle - half, 12).clip(0, 1) + 0.0, np.round(middle + half, 12).clip(0, 1)  # + 0.0: no negative zero


def rates(columns: Columns, identity: np.ndarray, seed: int, draws: int = 1000, trials: int | None = None) -> dict[str, Rate]:
    """The mean of each column, a rate in [0, 1], with its 95 % interval; rows of one identity [N] stand and fall together.

    The first `trials` rows can succeed or fail, the others only move the figure, as unknown probes do; by default all can.

    Wilson's interval for as many independent trials as have the bootstrap's spread (Korn and Graubard 1998): it holds near 0
    and 1, where percentiles of the draws may cover only 60 %. Where no probe is missed at all, each identity counts as one trial.
    """
    if not columns:
        return {}
    if not len(identity):
        raise ValueError("rates: no probes in this part; leave it out of the report or choose a larger one")
    mean, error, quantile = bootstrap([np.asarray(column, np.float64) for column in columns.values()], identity, seed, draws)
    size = np.unique(identity[:trials], return_counts=True)[1].astype(np.float64)  # rows of each identity
    inner = np.clip(mean, 0.5 / size.sum(), 1 - 0.5 / size.sum())  # a rate of 1 may still have a moving threshold
    with np.errstate(divide="ignore"):
        effective = inner * (1 - inner) / error**2 * (Z95 / quantile) ** 2
    effective = np.where(error > 1e-12, effective, size.sum() ** 2 / (size**2).sum())  # identities, by share of the rows
    low, high = wilson(np.clip(mean, 0, 1), effective)
    return {name: Rate(*map(float, three)) for name, *three in zip(columns, mean, low, high, strict=True)}


def paired_difference(ours: np.ndarray, base: np.ndarray, identity: np.ndarray, seed: int, draws: int = 1000) -> Rate:
    """A rate of one run minus that of another: contributions [N] of the same probes in the same order, with its interval."""
    (mean,), (error,), (quantile,) = bootstrap([np.subtract(ours, base, dtype=np.float64)], identity, seed, draws)
    return Rate(float(mean), float(mean - quantile * error), float(mean + quantile * error))


# ---- Geometry of the space ----


def geometry_of_space(
    embeddings: np.ndarray, identity: np.ndarray, order: np.ndarray, seed: int, sample: int = 10_000
) -> dict[str, float]:
    """Alignment, uniformity (Wang and Isola 2020, both with exponent 2) and effective rank (RankMe) of unit rows [N, D].

    `order` [N] lists the rows in an order of their own, so that the draw of `sample` rows does not depend on the file's.
    alignment: mean squared distance of all genuine pairs, 0 is best, NaN if there is none. uniformity: log of the mean of
    exp(-2 distance^2) over all pairs of the sample; -4 is about the best. effective_rank: exp of the entropy of the singular
    values, 1 to D, not centred.
    """
    drawn = np.sort(np.random.default_rng([seed, 2]).permutation(len(order))[:sample])
    by_person = order[np.argsort(identity[order], kind="stable")]
    count = np.unique(identity, return_counts=True)[1]
    start = np.cumsum(count) - count
    pull = sum(
        (np.square(embeddings[by_person[a : a + n]].sum(axis=0, dtype=np.float64)).sum() - n)  # sum of cosines i != j
        for a, n in zip(start, count, strict=True)
    )
    pairs = float((count * (count - 1.0)).sum())
    parts = (embeddings[rows].astype(np.float64) for rows in _parts(order))
    gram = sum(part.T @ part for part in parts)  # [D, D]
    chosen = embeddings[order[drawn]]
    potential = sum(np.exp(4 * (part @ chosen.T) - 4).sum(dtype=np.float64) for part in _parts(chosen, 1024))
    share = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    share = share[share > 0] / share.sum()
    return {
        "alignment": 2 - 2 * pull / pairs if pairs else float("nan"),
        "uniformity": float(np.log((potential - len(chosen)) / (len(chosen) * (len(chosen) - 1.0)))),  # without i = j
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
    }


# ---- Evaluation: all figures of one table of vectors ----


@dataclass
class EvalConfig:
    embeddings: str | None
    enroll_per_id: int = field(metadata={"at_least": 1})
    enroll_sweep: list[int] = field(metadata={"at_least": 1})
    template: str = field(metadata={"one_of": ("centroid", "best")})
    repeats: int = field(metadata={"at_least": 1})
    open_set_share: float = field(metadata={"at_least": 0, "below": 1})
    fpirs: list[float] = field(metadata={"above": 0, "at_most": 1})
    fars: list[float] = field(metadata={"above": 0, "at_most": 1})
    pairs: list[str]
    seed: int = field(metadata={"at_least": 0})
    top_k: list[int] = field(metadata={"at_least": 1, "at_most": 1000})
    bootstrap: int = field(metadata={"at_least": 100})
    out: str | None


class Measured(NamedTuple):
    """Closed set and verification of one encoder."""

    rates: dict[str, Rate]  # rank1, rank5, ..., mrr, tar@<far>, auc, eer
    cmc: list[Rate]  # of CMC_RANKS
    roc: dict[float, Rate]  # TAR by FAR, as far as the impostors support it
    thresholds: dict[float, float | None]  # by FAR, None where it is refused
    impostors: np.ndarray  # [2 GRID], see `count_pairs`
    genuine: np.ndarray  # [P] cosines of the probes with their own templates
    drawn: Enrolment
    found: Found

    @property
    def people(self) -> np.ndarray:
        """Identity code of each probe [P]."""
        return self.drawn.identity[self.drawn.probes]

    def figures(self) -> dict:
        """As in metrics.json."""
        return as_figures(self.rates) | {
            "cmc": [rate.value for rate in self.cmc], "impostor_pairs": int(self.impostors.sum()),
            "thresholds": {f"far@{far:g}": at for far, at in self.thresholds.items() if at is not None},
            "refused": refused(self.rates, self.thresholds),
        }  # fmt: skip


def refused(found: Iterable[str], fars: Iterable[float]) -> list[str]:
    """Figures of `verification` that the impostor pairs could not support."""
    return [name for name in (*(f"tar@{far:g}" for far in fars), "auc", "eer") if name not in found]


def as_figures(rates: dict[str, Rate]) -> dict[str, object]:
    """{"rank1": Rate} -> {"rank1": 0.5, "rank1_ci": [0.4, 0.6]}"""
    return {key: value for name, rate in rates.items() for key, value in ((name, rate.value), (f"{name}_ci", [*rate[1:]]))}


def last_rank(cfg: EvalConfig) -> int:
    """Ranks beyond this one are not told apart."""
    return max(*CMC_RANKS, *cfg.top_k)


def draw_gallery(faces: Any, cfg: EvalConfig, per_id: int, seed: int, share: float = 0.0) -> tuple[Enrolment, Gallery, np.ndarray]:
    """One draw of the enrolment, its templates, and the template of each probe [P]."""
    drawn = enrol(faces.names, faces.keys, per_id, seed, share)
    gallery = build_gallery(faces.vectors[drawn.enrolled], drawn.identity[drawn.enrolled], cfg.template)
    return drawn, gallery, gallery.index(drawn.identity[drawn.probes])


def measure(faces: Any, cfg: EvalConfig, device: torch.device) -> Measured:
    """Rank-k, MRR, TAR at each FAR, AUC and EER of one encoder, each with its interval.

    faces: a row a picture, with str [N] `names` (the identity), `keys` (source and file name) and `sources`, and unit rows
    `vectors` [N, D]. MRR counts ranks beyond `last_rank` as that rank plus one.
    """
    drawn, gallery, own = draw_gallery(faces, cfg, cfg.enroll_per_id, cfg.seed)
    people = drawn.identity[drawn.probes]
    found = search(faces.vectors, drawn.probes, own, gallery, last_rank(cfg))
    genuine, impostors = count_pairs(faces.vectors, drawn.probes, own, gallery, device)
    verified, at = verification(genuine, impostors, cfg.fars)
    points = verification(genuine, impostors, np.geomspace(1e-6, 1, 37).tolist())[0]
    points = {float(name[4:]): column for name, column in points.items() if name.startswith("tar@")}
    columns = closed_set(found.rank, sorted({1, 5, 10, *cfg.top_k})) | {"mrr": 1 / found.rank} | verified
    shown, cmc, roc = (rates(part, people, cfg.seed, cfg.bootstrap) for part in (columns, closed_set(found.rank), points))
    return Measured(shown, list(cmc.values()), roc, at, impostors, genuine, drawn, found)


def closed_set_rates(faces: Any, cfg: EvalConfig, per_id: int, seed: int) -> dict[str, Rate]:
    """Rank-k of one enrolment draw."""
    drawn, gallery, own = draw_gallery(faces, cfg, per_id, seed)
    rank = search(faces.vectors, drawn.probes, own, gallery, last_rank(cfg)).rank
    return rates(closed_set(rank, sorted({1, *cfg.top_k})), drawn.identity[drawn.probes], cfg.seed, cfg.bootstrap)


def per_source(faces: Any, ours: Measured, cfg: EvalConfig) -> dict[str, dict]:
    """Rank-k of the probes of each source; the gallery is the same."""
    sources, figures = faces.sources[ours.drawn.probes], {}
    for source in np.unique(sources).tolist():
        here = sources == source
        found = rates(closed_set(ours.found.rank[here], cfg.top_k), ours.people[here], cfg.seed, cfg.bootstrap)
        figures[source] = as_figures(found) | {"probes": int(here.sum())}
    return figures


def enrolment_draws(faces: Any, ours: Measured, cfg: EvalConfig) -> dict:
    """Rank-1 over several draws of the enrolment pictures: how much is the luck of the draw."""
    hits = [ours.rates["rank1"].value]
    for n in range(1, cfg.repeats):
        drawn, gallery, own = draw_gallery(faces, cfg, cfg.enroll_per_id, cfg.seed + n)
        hits.append(float((search(faces.vectors, drawn.probes, own, gallery, 1).rank == 1).mean()))
    spread = float(np.std(hits, ddof=1)) if len(hits) > 1 else None
    return {"draws": len(hits), "rank1_mean": float(np.mean(hits)), "rank1_std": spread}


def open_set_figures(faces: Any, cfg: EvalConfig) -> dict:
    """TPIR at each FPIR when a share of the identities is not enrolled; empty where the share leaves nobody out."""
    try:
        drawn, gallery, own = draw_gallery(faces, cfg, cfg.enroll_per_id, cfg.seed, cfg.open_set_share)
    except ValueError as error:  # those with pictures to spare are left out: the closed set stands nevertheless
        log.warning("no open-set figures: %s", error)
        return {}
    if not len(drawn.unknown):
        return {}
    people, strangers = drawn.identity[drawn.probes], drawn.identity[drawn.unknown]
    known = search(faces.vectors, drawn.probes, own, gallery, 1)
    unknown = search(faces.vectors, drawn.unknown, np.full(len(strangers), -1), gallery, 1)
    columns, at = open_set(known, unknown, cfg.fpirs)
    found = rates(columns, np.concatenate([people, strangers]), cfg.seed, cfg.bootstrap, trials=len(people))
    return as_figures(found) | {
        "unknown_identities": len(np.unique(strangers)), "unknown_probes": len(strangers), "known_probes": len(people),
        "refused": [f"tpir@{rate:g}" for rate, threshold in at.items() if threshold is None],
    }  # fmt: skip


def pair_figures(score: np.ndarray, same: np.ndarray, fold: np.ndarray, fars: list[float]) -> dict:
    """Accuracy of a pair protocol over its folds, and TAR at each FAR; arguments as of `pair_accuracy`."""
    found = pair_accuracy(score, same, fold)
    columns, _ = verification(score[same], count_scores(score[~same]), fars)
    return {
        "pairs": len(score), "accuracy": found.mean, "standard_error": found.standard_error,
        "chance": float(max(same.mean(), 1 - same.mean())),
        **{name: float(column.mean()) for name, column in columns.items()}, "refused": refused(columns, fars),
    }  # fmt: skip


def evaluate(faces: Any, cfg: EvalConfig, device: torch.device) -> tuple[dict, Measured]:
    """All figures of one encoder, as in metrics.json, and what the pictures need besides."""
    ours = measure(faces, cfg, device)
    gallery = len(np.unique(ours.drawn.identity[ours.drawn.enrolled]))
    canonical = np.lexsort((faces.keys, faces.names))  # so that the order of the file decides nothing
    most = np.bincount(ours.drawn.identity).max() - 1  # enrolment pictures that leave a probe
    sweep = {str(n): as_figures(closed_set_rates(faces, cfg, n, cfg.seed)) for n in cfg.enroll_sweep if n <= most}
    return ours.figures() | {
        "identities": gallery, "gallery": gallery, "probes": len(ours.people), "distractors": ours.drawn.distractors,
        "chance_rank1": 1 / gallery, "enroll_per_id": cfg.enroll_per_id, "template": cfg.template, "seed": cfg.seed,
        "enrolment_draws": enrolment_draws(faces, ours, cfg), "per_source": per_source(faces, ours, cfg),
        "enroll_sweep": sweep,
        "open_set": open_set_figures(faces, cfg) if cfg.open_set_share else {},
        "geometry": geometry_of_space(faces.vectors, ours.drawn.identity, canonical, cfg.seed),
    }, ours  # fmt: skip
