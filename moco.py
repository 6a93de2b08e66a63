"""Tensors and vectors: the encoder, the method that trains it, and the measures of what it learnt.

Takes views as float [B, 3, S, S] in [-1, 1] and gives a loss and unit vectors; takes unit vectors and gives figures with
intervals. Knows no files, no parquet, no Hydra.

Measuring: `enrol` draws who is in the gallery, `build_gallery` makes templates, `search` scores every probe against every one and
keeps ranks, the nearest and counts. `closed_set`, `open_set` and `verification` turn ranks and scores into columns: a name and one
contribution a probe, whose mean is the figure. `rates` turns columns, or any part of their rows, into figures with intervals.

Papers: iResNet as in ArcFace (arXiv:1801.07698); MoCo (arXiv:1911.05722) and its v2 (arXiv:2003.04297); MarginNCE as in
USynthFace (arXiv:2211.07371) and, with the other sign, in Park et al. (arXiv:2211.01966); EMAN (arXiv:2101.08482). CMC, TPIR and
FPIR: ISO/IEC 19795-1, NISTIR 8271. Interval: Wilson 1927 with the effective sample size of Korn and Graubard 1998. Geometry:
Wang and Isola 2020 (arXiv:2005.10242), RankMe (arXiv:2210.02885).
"""

import copy
import hashlib
import itertools
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

EMBEDDING_DIM = 512
TIE = 1e-6  # cosines closer than this are equal: that far apart come the products of equal rows, in float32
GRID = 2**17  # cosines are counted in steps of 1 / GRID = 7.6e-6: finer than any interval, and the table stays in the cache
NEIGHBOURS = 5  # nearest rows that are kept of each probe
PROBES, TILE = 512, 1024  # probes and rows of the gallery that are scored in one product: large ones miss the cache, 0.65 x
MIN_ERRORS = 10  # a rate of false matches is quoted from at least so many: standard error a third of it, at best
Z95 = 1.959964  # two-sided 95 % of the normal distribution

Columns = dict[str, np.ndarray]

# ---------------------------------------------------------------------------------------------------------------------
# The encoder: iResNet
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class BackboneConfig:
    name: str
    layers: list[int] = field(metadata={"at_least": 1})
    width: float = field(metadata={"above": 0, "at_most": 4})
    input_size: int = field(metadata={"at_least": 32, "at_most": 448})
    dropout: float = field(metadata={"at_least": 0, "below": 1})


class PReLUOnLines(torch.autograd.Function):
    """PReLU of x [B, C, H, W] with slopes [C], on lines [B*H, W*C], which are views where memory is channels last.

    torch's own takes C values at a time and its gradient is not vectorised: ours is 3 to 25 times as fast on the CPU.
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
        return PReLUOnLines.apply(x, self.weight) if x.device.type == "cpu" else super().forward(x)


class InGroups:
    """BatchNorm that in training normalises each of `groups` parts of the batch by statistics of its own.

    The same as running the network on each part, but the convolutions see the whole batch: keys of `tiny` 1.4 times as fast.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1 or not self.training:
            return super().forward(x)
        return torch.cat([super(InGroups, self).forward(part) for part in x.tensor_split(self.groups)])


class BatchNorm1d(InGroups, nn.BatchNorm1d):
    pass


class BatchNorm2d(InGroups, nn.BatchNorm2d):
    pass


class IBasicBlock(nn.Module):
    """BN-conv-BN-PReLU-conv-BN with a shortcut and no activation after the sum, [B, C, H, W] -> [B, C', H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels)
        self.prelu = PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, BatchNorm2d(channels))

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
        self.bn1 = BatchNorm2d(channels[0])
        self.prelu = PReLU(channels[0])
        previous, side = channels[0], input_size
        for number, (blocks, c) in enumerate(zip(layers, channels, strict=True), start=1):
            stage = [IBasicBlock(previous if i == 0 else c, c, stride=2 if i == 0 else 1) for i in range(blocks)]
            setattr(self, f"layer{number}", nn.Sequential(*stage))
            previous, side = c, (side + 1) // 2
        self.bn2 = BatchNorm2d(previous)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(previous * side * side, EMBEDDING_DIM)
        self.features = BatchNorm1d(EMBEDDING_DIM)
        self.features.weight.requires_grad = False  # the embedding's scale is fixed: only its direction counts
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.input_size:
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", antialias=True)
        x = self.prelu(self.bn1(self.conv1(x)))  # [B, C, S, S]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 8C, S/16, S/16]
        x = self.dropout(self.bn2(x))
        return self.features(self.fc(x.flatten(1)))  # [B, 512]


def iresnet18(**settings) -> IResNet:
    return IResNet((2, 2, 2, 2), **settings)


def iresnet50(**settings) -> IResNet:
    return IResNet((3, 4, 14, 3), **settings)


def iresnet100(**settings) -> IResNet:
    return IResNet((3, 13, 30, 3), **settings)


def build_backbone(cfg: BackboneConfig) -> IResNet:
    return IResNet(cfg.layers, cfg.width, cfg.input_size, cfg.dropout)


class ProjectionHead(nn.Module):
    """From the embedding [B, 512] to the contrastive space [B, dim]: `none` (USynthFace), or `mlp`, MoCo v2's two layers."""

    def __init__(self, kind: str = "none", dim: int = EMBEDDING_DIM):
        super().__init__()
        if kind not in ("none", "mlp"):
            raise ValueError(f"projection head {kind!r}: choose none or mlp")
        self.dim = dim if kind == "mlp" else EMBEDDING_DIM
        hidden = nn.Linear(EMBEDDING_DIM, EMBEDDING_DIM)
        self.layers = nn.Sequential(hidden, nn.ReLU(), nn.Linear(EMBEDDING_DIM, dim)) if kind == "mlp" else nn.Identity()

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding)


# ---------------------------------------------------------------------------------------------------------------------
# The loss: MarginNCE
# ---------------------------------------------------------------------------------------------------------------------


def cosines(q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of unit rows: each query [B, D] with its own key [B, D] -> [B, 1] and with the queue [K, D] -> [B, K]."""
    return (q * k).sum(dim=1, keepdim=True), q @ queue.T


def cross_entropy_of(positive: Tensor, negative: Tensor, temperature: float, margin: float) -> Tensor:
    """Mean cross-entropy of picking the positive [B, 1] among itself, lowered by `margin`, and the negatives [B, K]."""
    logits = torch.cat([positive - margin, negative], dim=1) / temperature  # [B, 1 + K]
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def margin_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float, margin: float) -> Tensor:
    """InfoNCE whose positive must win by `margin` in cosine (USynthFace, arXiv:2211.07371).

    q, k: unit rows [B, D], row i of k is the positive of row i of q. queue: unit rows [K, D], the negatives.
    margin > 0 is stricter, margin < 0 (arXiv:2211.01966) forgives noisy positives, 0 is InfoNCE.
    """
    return cross_entropy_of(*cosines(q, k, queue), temperature, margin)


def chance_loss(queue_size: int, temperature: float, margin: float) -> float:
    """Loss of an encoder that knows nothing, all cosines equal: ln(1 + K e^(m/T))."""
    return math.log1p(queue_size * math.exp(margin / temperature))


class MarginNCE(nn.Module):
    """`margin_nce` with its two settings, of (q [B, D], k [B, D], queue [K, D]) or of their cosines -> loss []."""

    def __init__(self, temperature: float, margin: float):
        super().__init__()
        self.temperature, self.margin = temperature, margin

    def forward(self, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        return self.of_cosines(*cosines(q, k, queue))

    def of_cosines(self, positive: Tensor, negative: Tensor) -> Tensor:
        return cross_entropy_of(positive, negative, self.temperature, self.margin)


# ---------------------------------------------------------------------------------------------------------------------
# The method: momentum contrast with a guard against the BatchNorm leak
# ---------------------------------------------------------------------------------------------------------------------


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
    queue_ptr: Tensor  # [] where the next key goes
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
        self.query = nn.Sequential()
        self.query.add_module("backbone", backbone)
        self.query.add_module("head", head)
        self.key = copy.deepcopy(self.query).requires_grad_(False)  # a copy: head and statistics included
        self.key_norms = [module for module in self.key.modules() if isinstance(module, _BatchNorm)]
        if guard == "shuffle" and not all(isinstance(norm, InGroups) for norm in self.key_norms):
            raise ValueError(
                "guard=shuffle: the backbone's BatchNorms must be moco.BatchNorm1d or 2d, which can work in sub-batches"
            )
        self.loss = loss
        self.guard, self.shuffle_groups, self.symmetric = guard, shuffle_groups, symmetric
        self.register_buffer("queue", torch.zeros(queue_size, head.dim))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))

    def encode_queries(self, views: Tensor) -> Tensor:
        """Views [B, 3, S, S] -> unit rows [B, D] in float32, with gradient."""
        return F.normalize(self.query(views).float())

    @torch.no_grad()
    def encode_keys(self, views: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Views [B, 3, S, S] -> unit rows [B, D] in float32, row i for view i whatever the guard.

        `generator` (CPU) draws the shuffle.
        """
        self.key.train(self.guard != "eman")
        if self.guard != "shuffle" or not self.training:
            return F.normalize(self.key(views).float())
        order = torch.randperm(len(views), generator=generator).to(views.device)
        for norm in self.key_norms:
            norm.groups = max(1, min(self.shuffle_groups, len(views) // 2))  # BatchNorm cannot normalise one image
        keys = self.key(views[order]).float()
        for norm in self.key_norms:
            norm.groups = 1
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
                loss=loss, keys=torch.cat(keys), queue_ptr=self.queue_ptr,
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


def build_moco(backbone: BackboneConfig, cfg: MocoConfig) -> MoCo:
    return MoCo(
        build_backbone(backbone), ProjectionHead(cfg.head, cfg.head_dim), MarginNCE(cfg.temperature, cfg.margin),
        cfg.queue_size, cfg.guard, cfg.shuffle_groups, cfg.symmetric,
    )  # fmt: skip


def key_momentum_at(progress: float, base: float, schedule: str) -> float:
    """At `progress` in [0, 1] of the training: constant, or from `base` to 1 along a cosine (BYOL, arXiv:2006.07733)."""
    return base if schedule == "constant" else 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def calibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the BatchNorm statistics of `model` to the plain average over `batches` of views; no weight changes."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    usual = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # None: cumulative average
    was_training = model.training
    model.train()
    for views in batches:
        model(views)
    model.train(was_training)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


# ---------------------------------------------------------------------------------------------------------------------
# Vectors and enrolment
# ---------------------------------------------------------------------------------------------------------------------


def _refuse(bad: np.ndarray, place: str, what: str, cure: str) -> None:
    if bad.any():
        raise ValueError(f"{place}: {int(bad.sum())} of {len(bad)} vectors {what}, first row {int(bad.argmax())}; {cure}")


def _parts(rows: np.ndarray, size: int = 2**15) -> Iterator[np.ndarray]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def check_vectors(embeddings: np.ndarray, place: str = "embeddings") -> None:
    """Refuse float vectors [N, D] that would make every figure wrong: none, NaN or infinite, not of unit length, all equal.

    Raises ValueError that says how many rows, which is the first, and what to do. Length may differ from 1 by 1e-3.
    """
    if embeddings.ndim != 2 or not embeddings.size:
        raise ValueError(f"{place}: expected vectors [N, D], found shape {embeddings.shape}; write them with command=embed")
    squared = np.concatenate([np.einsum("nd,nd->n", part, part) for part in _parts(embeddings)])  # [N], NaN stays NaN
    _refuse(
        ~np.isfinite(squared),
        place,
        "hold NaN or infinity",
        "look at the training log for the step where it began, then embed an earlier checkpoint",
    )
    _refuse(
        np.abs(np.sqrt(squared) - 1) > 1e-3,
        place,
        "are not of unit length",
        "divide each row by its L2 norm before writing the file",
    )
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


def _refuse_doubles(names: np.ndarray, keys: np.ndarray) -> None:
    """An image that stands twice in the file could be enrolled and probed with at once: sorted rows [N] make it a neighbour."""
    twice = np.flatnonzero((names[1:] == names[:-1]) & (keys[1:] == keys[:-1]))
    if len(twice):
        raise ValueError(
            f"enrol: {len(twice)} rows repeat an image, first '{keys[twice[0]]}' of identity '{names[twice[0]]}': "
            "it could be enrolled and probed with at once; write each image once"
        )


def enrol(names: np.ndarray, keys: np.ndarray, per_id: int, seed: int, open_set_share: float = 0.0) -> Enrolment:
    """Draw `per_id` enrolment images of each identity; the other images are its probes.

    names, keys: strings [N], the identity of a row and the name of its image (source and file), unique within the identity.
    An identity with at most per_id images is enrolled whole, as a distractor. round(open_set_share * identities) identities are
    not enrolled: all their images are unknown probes. Each draw hashes (seed, name, key) alone, so it does not depend on the
    order of the rows, and which images are enrolled not on who else is in the file. Raises ValueError for doubled images and
    where no probe is left.
    """
    if per_id < 1 or not 0 <= open_set_share < 1:
        raise ValueError(f"enrol: per_id must be at least 1 and open_set_share in [0, 1), found {per_id} and {open_set_share}")
    names, keys = np.asarray(names, str), np.asarray(keys, str)
    people, identity = np.unique(names, return_inverse=True)
    order = np.lexsort((keys, identity))
    _refuse_doubles(names[order], keys[order])
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
        raise ValueError(
            f"enrol: no probes left: {per_id} images of each identity are enrolled and the largest of {(~left_out).sum()} "
            f"enrolled identities has {count[~left_out].max(initial=0)}; lower eval.enroll_per_id or embed more images of each"
        )
    distractors = int(((count <= per_id) & ~left_out).sum())
    return Enrolment(identity, first, rest, order[is_unknown], distractors)


class Gallery(NamedTuple):
    """Templates. `vectors` [R, D] has one row an identity (centroid) or its enrolled images side by side (best)."""

    vectors: np.ndarray  # float32 [R, D], unit rows
    identity: np.ndarray  # [G] code of each template, ascending
    start: np.ndarray  # [G] its first row in vectors
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
    if template not in ("centroid", "best"):
        raise ValueError(f"eval.template: found {template!r}, allowed are centroid and best")
    code, start, owner = np.unique(identity, return_index=True, return_inverse=True)
    if template == "best":
        return Gallery(np.ascontiguousarray(vectors, np.float32), code, start, owner)
    mean = np.zeros((len(code), vectors.shape[1]))
    for rows in _parts(np.arange(len(vectors))):
        torch.from_numpy(mean).index_add_(0, torch.from_numpy(owner[rows]), torch.from_numpy(vectors[rows].astype(np.float64)))
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    _refuse(length[:, 0] < TIE, "gallery", "are centroids without a direction (images cancel out)", "use eval.template=best")
    return Gallery((mean / length).astype(np.float32), code, np.arange(len(code)), np.arange(len(code)))


# ---------------------------------------------------------------------------------------------------------------------
# Search and comparison
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Chosen:
    """Rows [P] of vectors [N, D], gathered a slice at a time: a copy of all of them would be as large again."""

    vectors: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        return self.vectors[self.rows[part]]


class Found(NamedTuple):
    """What `search` finds for N probes among G templates of R rows."""

    rank: np.ndarray  # [N] exact rank of the true template among all, 1 is best, ties against us; G + 1 if it is not enrolled
    genuine: np.ndarray  # [N] cosine with the true template, -inf if it is not enrolled
    row: np.ndarray  # [N, K] nearest rows of gallery.vectors, K = min(NEIGHBOURS, R)
    score: np.ndarray  # [N, K] their cosines, falling
    impostors: np.ndarray | None = None  # [2 GRID] how many of all other pairs lie in each step of 1 / GRID from -1, if counted


def step_of(score: np.ndarray, overwrite: bool = False) -> np.ndarray:
    """The step of the grid in which each cosine lies, int32 in [0, 2 GRID).

    overwrite: in the memory of `score`, float32 and contiguous, which no longer holds cosines then: 1.5 x.
    """
    cosine = torch.from_numpy(score if overwrite else np.array(score, np.float32, order="C"))
    torch.add(torch.tensor(float(GRID)), cosine, alpha=GRID, out=cosine).clamp_(0, 2 * GRID - 1)  # GRID + GRID * cosine
    return cosine.view(torch.int32).copy_(cosine).numpy()


def count_scores(score: np.ndarray, overwrite: bool = False) -> np.ndarray:
    """How many cosines of any shape lie in each step of the grid, [2 GRID]; `overwrite` as of `step_of`."""
    step = torch.from_numpy(step_of(score, overwrite)).view(-1)
    return torch.bincount(step, minlength=2 * GRID).numpy()  # numpy's takes 1.4 times as long, torch's index_add_ twice


def cut_tiles(gallery: Gallery) -> list[tuple[slice, slice]]:
    """Templates and rows of each tile of the gallery: about TILE rows, and no template cut in two.

    Tiles are alike in size: a product of 11 columns or fewer adds in another order, and a tie could look like none.
    """
    count = -(-len(gallery.vectors) // TILE)
    wanted = np.arange(count) * len(gallery.vectors) // count
    first = np.unique(np.searchsorted(gallery.start, wanted, side="right") - 1)
    templates, rows = [*first.tolist(), len(gallery.start)], [*gallery.start[first].tolist(), len(gallery.vectors)]
    return list(zip(itertools.starmap(slice, pairwise(templates)), itertools.starmap(slice, pairwise(rows)), strict=True))


def of_templates(score: np.ndarray, first: np.ndarray, templates: slice, rows: slice) -> np.ndarray:
    """Scores of a tile's rows [B, rows] -> of its templates [B, templates], the best row of each; `first` as Gallery.start."""
    several = templates.stop - templates.start < score.shape[1]
    return np.maximum.reduceat(score, first[templates] - rows.start, axis=1) if several else score


def score_own(
    block: Tensor, own: np.ndarray, columns: Tensor, first: np.ndarray, tiles: list[tuple[slice, slice]]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Cosine of each probe [B, D] with its own template, -inf where `own` [B] is -1; and two tiles' scores by first row, for later.

    It comes out of the same product as the probe's other scores: any other one rounds differently, by over TIE.
    """
    genuine, scored = np.full(len(block), -np.inf, np.float32), {}
    for templates, rows in tiles:
        known = np.flatnonzero((own >= templates.start) & (own < templates.stop))
        if len(known):
            score = torch.mm(block, columns[:, rows]).numpy()
            genuine[known] = of_templates(score, first, templates, rows)[known, own[known] - templates.start]
            if len(scored) < 2:
                scored[rows.start] = score
    return genuine, scored


def search(probes: np.ndarray | Chosen, own: np.ndarray, gallery: Gallery, count: bool = False) -> Found:
    """Every probe against every template, a tile of PROBES x TILE at a time: 8e9 pairs in 12 MB a thread.

    probes: unit rows [N, D]; own: template of each [N], -1 for an unknown person; count: whether to count the impostors' cosines.
    No score is sampled or estimated. Ties count against us: a rank is the number of templates that score at least as high, so an
    encoder that maps all faces to one point has no Rank-1. FAISS's heaps pick the neighbours, as in its `IndexFlatIP`; each
    pair is scored once for them, the ranks and the counts, and all of them read it from the cache.
    """
    import faiss  # here, not above: only eval needs it, and it brings an OpenMP runtime of its own

    near, tiles = min(NEIGHBOURS, len(gallery.vectors)), cut_tiles(gallery)
    rank, genuine = np.empty(len(probes), np.int64), np.empty(len(probes), np.float32)
    row, nearest = np.empty((len(probes), near), np.int32), np.empty((len(probes), near), np.float32)
    columns = torch.from_numpy(np.require(gallery.vectors, requirements="W")).T  # [D, R]
    order = np.argsort(own, kind="stable")  # one person's probes together: few tiles hold the own templates of PROBES
    tables, mine = [], threading.local()  # what a thread keeps from tile to tile: memory for scores, and its table of counts

    def prepare() -> None:
        faiss.omp_set_num_threads(1)
        mine.scores = torch.empty(PROBES * max(rows.stop - rows.start for _, rows in tiles))
        if count:
            mine.counts = np.zeros(2 * GRID, np.int64)
            tables.append(mine.counts)

    def compare(start: int) -> None:
        here = order[start : start + PROBES]
        block, its = torch.from_numpy(np.require(probes[here], np.float32, "W")), own[here]  # torch warns of read-only memory
        genuine[here], scored = score_own(block, its, columns, gallery.start, tiles)
        lowest = genuine[here, None] - np.float32(TIE)
        above, heap = (its < 0).astype(np.int64), faiss.ResultHeap(len(block), near, keep_max=True)
        for templates, rows in tiles:
            score = scored.pop(rows.start, None)
            if score is None:
                out = mine.scores[: len(block) * (rows.stop - rows.start)].view(len(block), -1)
                score = torch.mm(block, columns[:, rows], out=out).numpy()  # [B, rows]
            heap.heaps.addn(score.shape[1], faiss.swig_ptr(score), rows.start)
            score = of_templates(score, gallery.start, templates, rows)
            above += np.bitwise_count(np.packbits(score >= lowest, axis=1)).sum(axis=1, dtype=np.int64)
            if count:
                mine.counts += count_scores(score, overwrite=True)
        heap.finalize()
        rank[here], row[here], nearest[here] = above, heap.I, heap.D

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # probes are the work of one thread, from the product to the counts: 1.4 x
    try:
        with ThreadPoolExecutor(threads, initializer=prepare) as pool:
            deque(pool.map(compare, range(0, len(probes), PROBES)), maxlen=0)
    finally:
        torch.set_num_threads(threads)
    impostors = sum(tables, -count_scores(genuine[own >= 0])) if count else None
    return Found(rank, genuine, row, nearest, impostors)


# ---------------------------------------------------------------------------------------------------------------------
# Figures as columns
# ---------------------------------------------------------------------------------------------------------------------


def closed_set(rank: np.ndarray, ks: Iterable[int] = range(1, 21)) -> Columns:
    """CMC columns rank<k> of ranks [N] that count from 1."""
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

    Third, the share of a small rise of the miss rate by which that point rises: the two curves' slopes within 0.02 around it.
    """
    false_match = 1 - np.concatenate([[0], np.cumsum(impostors)]) / impostors.sum()  # [2 GRID + 1] by step of the threshold
    missed = np.concatenate([[0], np.cumsum(np.bincount(step_of(genuine), minlength=2 * GRID))]) / len(genuine)
    at = int((missed >= false_match).argmax())  # at least 1: at step 0 all match
    before, after = false_match[at - 1] - missed[at - 1], missed[at] - false_match[at]
    rate = missed[at - 1] + (missed[at] - missed[at - 1]) * before / (before + after)
    left, right = max(at - GRID // 50, 0), min(at + GRID // 50, 2 * GRID)
    fall, rise = false_match[left] - false_match[right], missed[right] - missed[left]
    return float(rate), at, float(fall / (fall + rise)) if fall + rise > 0 else 1.0


def verification(genuine: np.ndarray, impostors: np.ndarray, fars: list[float]) -> tuple[Columns, dict[float, float | None]]:
    """TAR at each supported FAR, equal error rate and AUC from all genuine scores [N] and the table of impostor counts.

    Returns columns tar@<far>, auc, eer, and the threshold of each FAR, None where it is refused. Exact for scores on the grid;
    ties count half in the AUC. The impostors, and so the thresholds, are held fixed: intervals are those of the genuine side.
    """
    if not impostors.any():
        raise ValueError("verification: no impostor pairs, the gallery holds one identity; embed at least two")
    at = thresholds(impostors, fars)
    columns = {f"tar@{far:g}": is_match(genuine, at[far]) for far in fars if at[far] is not None}
    step, below = step_of(genuine), np.cumsum(impostors)
    columns["auc"] = (below[step] - impostors[step] / 2) / below[-1]
    rate, crossing, share = equal_error(genuine, impostors)
    missed = step < crossing
    columns["eer"] = rate + share * (missed - missed.mean())  # more misses move the crossing by a share of themselves
    return columns, at


def histograms(genuine: np.ndarray, impostors: np.ndarray) -> dict[str, np.ndarray]:
    """For the pictures: genuine scores [N] and the table of impostor counts in 256 bins, and the bins' edges [257]."""
    bins = 2 * GRID // 256
    return {
        "edge": np.linspace(-1, 1, 257),
        "impostors": impostors.reshape(256, bins).sum(axis=1),
        "genuine": np.bincount(step_of(genuine) // bins, minlength=256),
    }


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


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------


class Rate(NamedTuple):
    value: float
    low: float  # of the 95 % interval
    high: float


class Resampled(NamedTuple):
    mean: np.ndarray  # [M] over all rows
    spread: np.ndarray  # [M] standard error: standard deviation over the bootstrap draws
    quantile: np.ndarray  # [M] 97.5 % point of Student's t, for as many identities as carry the spread


def student_t(df: np.ndarray) -> np.ndarray:
    """97.5 % point of Student's t for df >= 4, to 1e-3 (Abramowitz and Stegun 26.7.5)."""
    return Z95 + 2.37227 / df + 2.82247 / df**2 + 2.55578 / df**3 + 1.58952 / df**4


def resample(columns: list[np.ndarray], identity: np.ndarray, seed: int, draws: int) -> Resampled:
    """Means of M columns [N] and their spread when identities [N] are drawn again with replacement, the gallery fixed.

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
    return Resampled(mean, drawn.std(axis=0, ddof=1), student_t(np.maximum(carriers, 4)))


def wilson(rate: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval (1927) of a rate seen in so many independent trials, which need not be whole."""
    shrink = 1 + Z95**2 / trials
    middle = (rate + Z95**2 / (2 * trials)) / shrink
    half = Z95 * np.sqrt(rate * (1 - rate) / trials + (Z95 / (2 * trials)) ** 2) / shrink
    return np.round(middle - half, 12).clip(0, 1), np.round(middle + half, 12).clip(0, 1)


def rates(columns: Columns, identity: np.ndarray, seed: int, draws: int = 1000, trials: int | None = None) -> dict[str, Rate]:
    """The mean of each column, a rate in [0, 1], with its 95 % interval; rows of one identity [N] stand and fall together.

    The first `trials` rows can succeed or fail, the others only move the figure, as unknown probes do; by default all can.

    Wilson's interval for as many independent trials as have the bootstrap's spread (Korn and Graubard 1998): it holds near 0
    and 1, where percentiles of the draws may cover only 60 %. Where no probe is missed at all, each identity counts as one trial.
    """
    if not len(identity):
        raise ValueError("rates: no probes in this part; leave it out of the report or choose a larger one")
    found = resample([np.asarray(column, np.float64) for column in columns.values()], identity, seed, draws)
    size = np.unique(identity[:trials], return_counts=True)[1].astype(np.float64)  # rows of each identity
    inner = np.clip(found.mean, 0.5 / size.sum(), 1 - 0.5 / size.sum())  # a rate of 1 may still have a moving threshold
    with np.errstate(divide="ignore"):
        effective = inner * (1 - inner) / found.spread**2 * (Z95 / found.quantile) ** 2
    effective = np.where(found.spread > 1e-12, effective, size.sum() ** 2 / (size**2).sum())  # identities, by share of the rows
    low, high = wilson(np.clip(found.mean, 0, 1), effective)
    return {name: Rate(*map(float, three)) for name, *three in zip(columns, found.mean, low, high, strict=True)}


def differences(columns: Columns, base: Columns, identity: np.ndarray, seed: int, draws: int = 1000) -> dict[str, Rate]:
    """`columns` minus `base`: two runs over the same probes in the same order, with the interval of the paired difference."""
    both = [name for name in columns if name in base]
    if not both or any(not len(columns[name]) == len(base[name]) == len(identity) for name in both):
        raise ValueError(
            f"differences: {len(both)} figures in common, or not over the same {len(identity)} probes; evaluate both "
            "runs on the same identities with equal eval settings"
        )
    found = resample([np.subtract(columns[name], base[name], dtype=np.float64) for name in both], identity, seed, draws)
    low, high = found.mean - found.quantile * found.spread, found.mean + found.quantile * found.spread
    return {name: Rate(*map(float, three)) for name, *three in zip(both, found.mean, low, high, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Geometry of the space
# ---------------------------------------------------------------------------------------------------------------------


def _uniformity(chosen: np.ndarray) -> float:
    potential = sum(np.exp(4 * (part @ chosen.T) - 4).sum(dtype=np.float64) for part in _parts(chosen, 1024))
    return float(np.log((potential - len(chosen)) / (len(chosen) * (len(chosen) - 1.0))))  # without i = j


def geometry(embeddings: np.ndarray, identity: np.ndarray, order: np.ndarray, seed: int, sample: int = 10_000) -> dict[str, float]:
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
    share = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    share = share[share > 0] / share.sum()
    return {
        "alignment": 2 - 2 * pull / pairs if pairs else float("nan"),
        "uniformity": _uniformity(embeddings[order[drawn]]),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
    }
