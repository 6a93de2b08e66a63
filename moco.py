"""Tensors and vectors: the encoder, the method that trains it, and the measures of what it learnt.

Takes views as float [B, 3, S, S] in [-1, 1] and gives a loss and unit vectors; takes unit vectors and gives rates with
intervals. Knows no files, no parquet, no Hydra.

Papers: iResNet as in ArcFace (arXiv:1801.07698); MoCo (arXiv:1911.05722) and its v2 (arXiv:2003.04297); MarginNCE as in
USynthFace (arXiv:2211.07371) and, with the other sign, in Park et al. (arXiv:2211.01966); EMAN (arXiv:2101.08482).
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_DIM = 512

# ---------------------------------------------------------------------------------------------------------------------
# The encoder: iResNet
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class BackboneConfig:
    name: str
    layers: list[int]
    width: float = field(metadata={"above": 0, "at_most": 4})
    input_size: int = field(metadata={"at_least": 32, "at_most": 448})
    dropout: float = field(metadata={"at_least": 0, "below": 1})


class IBasicBlock(nn.Module):
    """BN-conv-BN-PReLU-conv-BN with a shortcut and no activation after the sum, [B, C, H, W] -> [B, C', H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
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
        self.prelu = nn.PReLU(channels[0])
        previous, side = channels[0], input_size
        for number, (blocks, c) in enumerate(zip(layers, channels, strict=True), start=1):
            stage = [IBasicBlock(previous if i == 0 else c, c, stride=2 if i == 0 else 1) for i in range(blocks)]
            setattr(self, f"layer{number}", nn.Sequential(*stage))
            previous, side = c, (side + 1) // 2
        self.bn2 = nn.BatchNorm2d(previous)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(previous * side * side, EMBEDDING_DIM)
        self.features = nn.BatchNorm1d(EMBEDDING_DIM)
        self.features.weight.requires_grad = False               # the embedding's scale is fixed: only its direction counts
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.input_size:
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", antialias=True)
        x = self.prelu(self.bn1(self.conv1(x)))                  # [B, C, S, S]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))   # [B, 8C, S/16, S/16]
        x = self.dropout(self.bn2(x))
        return self.features(self.fc(x.flatten(1)))              # [B, 512]


def iresnet18(**settings) -> IResNet:
    return IResNet((2, 2, 2, 2), **settings)


def iresnet50(**settings) -> IResNet:
    return IResNet((3, 4, 14, 3), **settings)


def iresnet100(**settings) -> IResNet:
    return IResNet((3, 13, 30, 3), **settings)


def build_backbone(cfg: BackboneConfig) -> IResNet:
    return IResNet(cfg.layers, cfg.width, cfg.input_size, cfg.dropout)


class ProjectionHead(nn.Module):
    """From the embedding [B, 512] to the contrastive space [B, dim]: `none` is the identity (USynthFace), `mlp` MoCo v2's two layers."""

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
    logits = torch.cat([positive - margin, negative], dim=1) / temperature      # [B, 1 + K]
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
    """`margin_nce` with its two settings: (q [B, D], k [B, D], queue [K, D]) -> loss []."""

    def __init__(self, temperature: float, margin: float):
        super().__init__()
        self.temperature, self.margin = temperature, margin

    def forward(self, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        return margin_nce(q, k, queue, self.temperature, self.margin)


# ---------------------------------------------------------------------------------------------------------------------
# The method: momentum contrast with a guard against the BatchNorm leak
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class MocoConfig:
    queue_size: int = field(metadata={"at_least": 1})
    temperature: float = field(metadata={"above": 0})
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

    loss: Tensor            # []
    keys: Tensor            # [B, D] unit rows, float32 ([2B, D] with the symmetric loss), to enqueue after backward
    queue_ptr: Tensor       # [] where the next key goes
    pos_sim: Tensor         # [] mean cosine of a query and its key
    neg_sim: Tensor         # [] mean cosine of a query and the queue
    neg_max: Tensor         # [] mean over the queries of their hardest negative's cosine
    instance_top1: Tensor   # [] share of the queries whose key beats the whole queue
    spread: Tensor          # [] of the queries: 1 is evenly spread over the sphere, 0 a collapse to one point


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
        self.key = copy.deepcopy(self.query).requires_grad_(False)       # a copy: head and statistics included
        self.loss = loss
        self.guard, self.shuffle_groups, self.symmetric = guard, shuffle_groups, symmetric
        self.register_buffer("queue", torch.zeros(queue_size, head.dim))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))

    def encode_queries(self, views: Tensor) -> Tensor:
        """Views [B, 3, S, S] -> unit rows [B, D] in float32, with gradient."""
        return F.normalize(self.query(views).float())

    @torch.no_grad()
    def encode_keys(self, views: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Views [B, 3, S, S] -> unit rows [B, D] in float32, row i for view i whatever the guard. `generator` (CPU) draws the shuffle."""
        self.key.train(self.guard != "eman")
        if self.guard != "shuffle" or not self.training:
            return F.normalize(self.key(views).float())
        order = torch.randperm(len(views), generator=generator).to(views.device)
        size = max(2, -(-len(views) // self.shuffle_groups))             # BatchNorm cannot normalise one image
        groups = split_evenly(order, max(1, len(views) // size))
        keys = torch.cat([self.key(views[rows]).float() for rows in groups])
        return F.normalize(torch.empty_like(keys).index_copy_(0, order, keys))

    def forward(self, view_q: Tensor, view_k: Tensor, generator: torch.Generator | None = None) -> StepOutput:
        """Two views [B, 3, S, S] of the same images in the same order -> loss and what the log wants to know."""
        pairs = [(view_q, view_k)] + ([(view_k, view_q)] if self.symmetric else [])
        losses, keys = [], []
        for for_query, for_key in pairs:
            k = self.encode_keys(for_key, generator)                     # [B, D]
            q = self.encode_queries(for_query)                           # [B, D]
            with torch.autocast(q.device.type, enabled=False):           # in bf16 a logit at T = 0.07 is off by up to 0.03
                positive, negative = cosines(q, k, self.queue)           # [B, 1], [B, K]
                losses.append(cross_entropy_of(positive, negative, self.loss.temperature, self.loss.margin))
            keys.append(k)
        loss = torch.stack(losses).mean()
        with torch.no_grad():
            hardest = negative.amax(dim=1, keepdim=True)                 # [B, 1]
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
        """Write keys [B, D] over the oldest ones. The pointer is a tensor and wraps: no wait, no rule that B divides the queue."""
        slots = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, slots, keys)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % len(self.queue))


def build_moco(backbone: BackboneConfig, cfg: MocoConfig) -> MoCo:
    return MoCo(
        build_backbone(backbone), ProjectionHead(cfg.head, cfg.head_dim), MarginNCE(cfg.temperature, cfg.margin),
        cfg.queue_size, cfg.guard, cfg.shuffle_groups, cfg.symmetric,
    )  # fmt: skip


def split_evenly(rows: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Split [N] into `groups` runs whose lengths differ by at most one, so that none is too short to be normalised."""
    return torch.tensor_split(rows, groups)


def spread_of(unit_rows: Tensor) -> Tensor:
    """Mean standard deviation per dimension times sqrt(D) of unit rows [B, D] -> []: about 1 when spread evenly, 0 when collapsed."""
    return unit_rows.std(dim=0, correction=0).mean() * math.sqrt(unit_rows.shape[1])


def key_momentum_at(progress: float, base: float, schedule: str) -> float:
    """Key momentum at `progress` in [0, 1] of the training: constant, or from `base` to 1 along a cosine (BYOL, arXiv:2006.07733)."""
    return base if schedule == "constant" else 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def calibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the BatchNorm statistics of `model` to the plain average over `batches` of views; no weight changes."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    usual = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                             # None: cumulative average
    was_training = model.training
    model.train()
    for views in batches:
        model(views)
    model.train(was_training)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
