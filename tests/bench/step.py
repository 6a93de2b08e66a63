"""The training step beside the usual way, its parts, and the whole loop. Minutes; one command for CPU and GPU.

    uv run python tests/bench/step.py [--model tiny iresnet50] [--batch N] [--queue N] [--seconds S] [--compile] [--no-loop]

Rows 8 (CPU) and 9 (GPU) are the step, row 10 the loop from each kind of data beside the step alone. Ours: `Training.take_step` as
conf/config.yaml sets it, guard and all, in the precision of train.amp=auto, views made in the step. The usual way: the same encoder
eager in NCHW, MoCo as in facebookresearch/moco with a cloned queue and an .item() a step, the framework's default autocast, views
ready beforehand. Runs with torch >= 2.11, without Hydra, polars and faiss. Rates are pairs a second.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from common import ON_GPU, compare, rate_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dataio
import moco

DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def read_backbone(name: str) -> moco.BackboneConfig:
    return moco.BackboneConfig(**common.read_settings(f"backbone/{name}"))


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if ON_GPU else 2048
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    return rate_of(lambda: len(a @ b), 0.5, warm=3) * 2 * n**2


class OurStep:
    """The step of sniperface.run_steps, from pictures or from views."""

    def __init__(self, name: str, args: argparse.Namespace):
        settings, self.augmentation = common.read_settings("config"), common.read_augmentation()
        model = moco.build_moco(read_backbone(name), moco.MocoConfig(**settings["moco"] | {"queue_size": args.queue}), seed=0)
        model.queue.copy_(F.normalize(torch.randn_like(model.queue)))
        self.training = moco.Training(model, moco.TrainConfig(**settings["train"]), DEVICE)
        if args.compile:
            self.training.compile()

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return dataio.two_views(images, self.augmentation, dataio.draw(0, "augment", self.training.step))

    def __call__(self, view_q: Tensor, view_k: Tensor) -> int:
        self.training.take_step(view_q, view_k, 0.1, 0.999, dataio.draw(0, "step", self.training.step))
        return len(view_q)


class UsualStep:
    """MoCo as it is usually written (facebookresearch/moco, builder.py and main_moco.py) on one device."""

    def __init__(self, name: str, args: argparse.Namespace, amp: bool = True):
        self.query = moco.build_backbone(read_backbone(name)).to(DEVICE).train()
        for module in self.query.modules():
            if isinstance(module, nn.PReLU):
                module.__class__ = nn.PReLU  # the framework's own, whatever ours is
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.queue = F.normalize(torch.randn(512, args.queue, device=DEVICE), dim=0)
        self.pointer = torch.zeros(1, dtype=torch.long)
        self.optimizer = torch.optim.SGD(self.query.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.amp, self.scaler = amp, torch.amp.GradScaler(DEVICE.type, enabled=amp and ON_GPU)

    def __call__(self, view_q: Tensor, view_k: Tensor) -> int:
        with torch.autocast(DEVICE.type, enabled=self.amp):
            q = F.normalize(self.query(view_q), dim=1)
            with torch.no_grad():
                for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
                    key.data = key.data * 0.999 + query.data * 0.001
                k = F.normalize(self.key(view_k), dim=1)
            positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
            negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
            logits = torch.cat([positive, negative], dim=1) / 0.07
            loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=DEVICE))
        start = int(self.pointer)
        self.queue[:, start : start + len(k)] = k.T
        self.pointer[0] = (start + len(k)) % self.queue.shape[1]
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss.item()  # as a meter does
        return len(view_q)


def made_batch(name: str, args: argparse.Namespace) -> Tensor:
    """uint8 [B, 3, 112, 112], channels last as a loader gives it; 512 on a GPU, on a CPU 64 for tiny and 16 for others."""
    count = args.batch or (512 if ON_GPU else 64 if name == "tiny" else 16)
    return torch.randint(0, 256, (count, 112, 112, 3), dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)


def measure_step(name: str, args: argparse.Namespace) -> None:
    """Goals 8 and 9."""
    images, ours = made_batch(name, args), OurStep(name, args)
    views = ours.views(images)
    plain = [view.contiguous() for view in views]
    usual = {"default AMP": UsualStep(name, args)} | ({} if ON_GPU else {"fp32": UsualStep(name, args, amp=False)})
    with FlopCounterMode(display=False) as counter:
        usual["default AMP"](*plain)
    pair = counter.get_total_flops() / len(images)
    step = partial(rate_of, lambda: ours(*views), args.seconds)
    whole = partial(rate_of, lambda: ours(*ours.views(images)), args.seconds)
    augmentation = partial(rate_of, lambda: len(ours.views(images)[0]), args.seconds)
    number, goal = ("9", ">= 2") if ON_GPU else ("8", ">= 3")
    what, rows = f"{name}, batch {len(images)}, queue {args.queue}", []
    for label, their in usual.items():
        theirs = partial(rate_of, lambda their=their: their(*plain), args.seconds)
        rows.append((number, f"{what}: step from ready views", step, f"usual, {label}", theirs, goal))
    if ON_GPU and name == "iresnet50":
        rows.append((number, f"{what}: step with augmentation", whole, "required", 3500.0, ">= 1"))
        rows.append((number, f"{what}: step with augmentation", whole, "the goal", 5000.0, ">= 1"))
    rows.append((number, f"{what}: augmentation's share of that", whole, "augmentation alone", augmentation, "<= 0.08"))
    what, precision = f"{what}, {pair / 1e9:.2f} GFLOP a pair", ours.training.precision
    rows.append((number, what, whole, f"{precision} matmul", lambda: product_rate(precision) / pair, ""))
    compare(args.rounds, *rows)


def measure_loop(name: str, args: argparse.Namespace, folder: Path) -> None:
    """Goal 10."""
    faces, table = common.write_faces(folder, args.rows), folder / "splits.parquet"
    dataio.write_identity_splits(dataio.collect_unique_identities(faces), table, 0.9, seed=0)
    stream = dataio.ParquetImageStream(list(map(str, dataio.materialize_split(faces, table, folder / "train", "train"))))
    caches = dataio.DecodedCache(stream, folder / "cache", device=DEVICE), dataio.DecodedCache(stream, folder / "cache")
    step, images, rows = OurStep(name, args), made_batch(name, args), []
    alone = partial(rate_of, lambda: step(*step.views(images)), args.seconds)
    for source, data in zip(("device cache", "decoded cache", "materialised shards"), (*caches, stream), strict=True):
        batches = dataio.load_batches([data], lambda number: [number * len(images)], 0, 10**9, DEVICE)
        loop = partial(rate_of, lambda batches=batches: step(*step.views(next(batches))), 2 * args.seconds, dataio.PREFETCH + 2)
        rows.append(("10", f"{name}, loop from {source}", loop, "step alone", alone, ">= 0.95"))
    compare(args.rounds, *rows)


def measure_models(args: argparse.Namespace, folder: Path) -> None:
    for name in args.model:
        measure_step(name, args)
        if args.loop and (ON_GPU or name == "tiny"):  # on a CPU a large model hides any loader
            measure_loop(name, args, folder / name)


if __name__ == "__main__":
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", nargs="*", default=["iresnet50"] if ON_GPU else ["tiny", "iresnet50"])
    parser.add_argument("--batch", type=int, help="512 on a GPU, on a CPU 64 for tiny and 16 for others")
    parser.add_argument("--queue", type=int, default=32_768 if ON_GPU else 4096, help="a multiple of the batch")
    parser.add_argument("--rows", type=int, default=20_000 if ON_GPU else 2000, help="pictures behind the loop")
    parser.add_argument("--seconds", type=float, default=3.0 if ON_GPU else 1.0, help="of a measurement; one step at least")
    parser.add_argument("--compile", action="store_true", help="as train.compile=true")
    parser.add_argument("--no-loop", dest="loop", action="store_false", help="leave goal 10 out")
    common.measure(parser, {"step": measure_models})
