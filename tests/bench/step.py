"""The training step beside the usual way, its parts, and the whole loop. Minutes; one command for CPU and GPU.

    uv run python tests/bench/step.py [--model tiny iresnet50] [--batch N] [--queue N] [--seconds S] [--compile]

| # | what | goal |
|---|---|---|
| 8 | step on the CPU, beside the usual way | 3x |
| 9 | step on an H200-class GPU, iResNet-50, batch 512, queue 32,768 | 3,500 pairs/s required, 5,000 the goal; 2x the usual way |
|   | its share of the measured bf16 matrix peak; augmentation as a share of the step | stated; under 8 % |
| 10 | the loop from device cache, decoded cache and materialised shards, beside the step alone | 0.95 of it |

Ours: the project's MoCo (guard and all), bf16 where the device has it, channels_last, fused SGD, views made in the step. The usual
way: the same encoder eager in NCHW, MoCo as in facebookresearch/moco with a cloned queue and an .item() a step, the framework's
default autocast, views ready beforehand. Runs with torch >= 2.11, without Hydra, polars and faiss. Rates are pairs a second.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    alternate,
    clock,
    keep_freed_memory,
    make_pictures,
    print_head,
    print_row,
    read_augmentation,
    read_settings,
    use_one_core,
    write_faces,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dataio
import moco

# ---------------------------------------------------------------------------------------------------------------------
# Ours and the usual way
# ---------------------------------------------------------------------------------------------------------------------


def build_encoder(name: str) -> moco.IResNet:
    return moco.build_backbone(moco.BackboneConfig(**read_settings("backbone", name)))


def best_precision(device: torch.device) -> torch.dtype:
    """The fastest: of a CPU by trial, as sniperface.pick_precision("auto") should know without one."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return torch.float32
    return max((torch.float32, torch.bfloat16), key=lambda dtype: matrix_peak(device, dtype, 0.2))


class OurStep:
    """The step of sniperface.run_steps, from pictures or from views."""

    def __init__(self, name: str, queue_size: int, device: torch.device, compiled: bool):
        loss = moco.MarginNCE(temperature=0.07, margin=0.1)
        self.model = moco.MoCo(build_encoder(name), moco.ProjectionHead("none"), loss, queue_size)
        self.model.queue.copy_(F.normalize(torch.randn(queue_size, 512)))
        self.model.to(device, memory_format=torch.channels_last).train()
        trained = [p for p in self.model.query.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
        self.precision, self.augmentation, self.number = best_precision(device), read_augmentation(), 0
        for encoder in (self.model.query, self.model.key) if compiled else ():
            encoder.compile()

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return dataio.two_views(images, self.augmentation, dataio.draw(0, "augment", self.number))

    def __call__(self, view_q: Tensor, view_k: Tensor) -> None:
        with torch.autocast(view_q.device.type, self.precision, enabled=self.precision != torch.float32):
            out = self.model(view_q, view_k, dataio.draw(0, "shuffle", self.number))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.query.parameters(), float("inf"))  # the log's gradient norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_key_encoder(0.999)
        self.model.enqueue(out.keys)
        self.number += 1


class UsualStep:
    """MoCo as it is usually written (facebookresearch/moco, builder.py and main_moco.py) on one device."""

    def __init__(self, name: str, queue_size: int, device: torch.device, amp: bool = True):
        self.query = build_encoder(name).to(device).train()
        for module in self.query.modules():
            if isinstance(module, nn.PReLU):
                module.__class__ = nn.PReLU  # the framework's own, whatever ours is
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.queue = F.normalize(torch.randn(512, queue_size, device=device), dim=0)
        self.pointer = torch.zeros(1, dtype=torch.long)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.query.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.amp, self.scaler = amp, torch.amp.GradScaler(device.type, enabled=amp and device.type == "cuda")

    @torch.no_grad()
    def keys_of(self, view_k: Tensor) -> Tensor:
        for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
            key.data = key.data * 0.999 + query.data * 0.001
        return F.normalize(self.key(view_k), dim=1)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        start = int(self.pointer)
        self.queue[:, start : start + len(keys)] = keys.T
        self.pointer[0] = (start + len(keys)) % self.queue.shape[1]

    def __call__(self, view_q: Tensor, view_k: Tensor) -> float:
        with torch.autocast(view_q.device.type, enabled=self.amp):
            q, k = F.normalize(self.query(view_q), dim=1), self.keys_of(view_k)
            positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
            negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
            logits = torch.cat([positive, negative], dim=1) / 0.07
            loss = self.criterion(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        self.enqueue(k)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate_of(step: Callable[[], object], items: int, seconds: float, device: torch.device, warm: int = 1) -> float:
    """Items a second of a step, over whole steps, the device waited for at both ends only."""
    for _ in range(warm):
        step()
    wait_for(device)
    count, start = 0, clock()
    while not count or clock() - start < seconds:
        step()
        count += 1
        if count % 8 == 0:
            wait_for(device)  # the clock must not run ahead of the device
    wait_for(device)
    return items * count / (clock() - start)


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return rate_of(lambda: a @ b, 2 * n**3, seconds, device, 3)


def flops_of_pair(name: str, queue_size: int) -> float:
    """Of one pair: the key forward, the query forward and backward (three forwards), logits and their gradient."""
    encoder = build_encoder(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, 3, 112, 112))
    return 4 * counter.get_total_flops() + 2 * 2 * 512 * queue_size


def measure_step(name: str, args: argparse.Namespace, device: torch.device) -> OurStep:
    """Goals 8 and 9; gives our step, for goal 10."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.batch, 112, 112, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    ours = OurStep(name, args.queue, device, args.compile)
    views = ours.views(images)
    plain = [view.contiguous() for view in views]
    contenders = {
        "ours": lambda: ours(*views), "whole": lambda: ours(*ours.views(images)), "augment": lambda: ours.views(images),
    }  # fmt: skip
    usual = {"default AMP": UsualStep(name, args.queue, device)}
    if device.type == "cpu":
        usual["fp32"] = UsualStep(name, args.queue, device, amp=False)
    contenders |= {label: lambda step=step: step(*plain) for label, step in usual.items()}

    def measured(label: str) -> float:
        keep_freed_memory(label not in usual and device.type == "cpu")
        return rate_of(contenders[label], args.batch, args.seconds, device, warm=1)

    measures = {label: lambda label=label: measured(label) for label in contenders}
    measures["peak"] = lambda: matrix_peak(device, ours.precision, args.seconds)
    for step in contenders.values():  # compilation, autotuning, first allocations
        step()
    found = alternate(measures, args.rounds)
    number, goal = ("9", ">= 2") if device.type == "cuda" else ("8", ">= 3")
    what = f"{name}, batch {args.batch}, queue {args.queue}"
    for label in usual:
        print_row(number, f"{what}: step from ready views", found["ours"], f"usual, {label}", found[label], goal)
        print_row(number, f"{what}: step with augmentation", found["whole"], f"usual, {label}, ready views", found[label])
    parts = [[whole / part for whole, part in zip(found["whole"], found["augment"], strict=True)]]
    print_row(number, f"{what}: augmentation, share of the step", parts[0], "all", [1.0] * args.rounds, "<= 0.08")
    if device.type == "cuda" and name == "iresnet50":
        print_row("9", f"{what}: pairs/s", found["whole"], "required", [3500.0] * args.rounds, ">= 1")
        print_row("9", f"{what}: pairs/s", found["whole"], "the goal", [5000.0] * args.rounds, ">= 1")
    used = [rate * flops_of_pair(name, args.queue) / 1e12 for rate in found["whole"]]
    print_row(number, f"{what}: TFLOP/s", used, f"matmul {str(ours.precision)[6:]}", [rate / 1e12 for rate in found["peak"]])
    return ours


def loop_over(batches: Iterator[Tensor], step: OurStep, args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Pairs a second of the whole loop and the share of the time that it waited for data, as the log has it."""
    waited = [0.0, 0.0]  # until now, and when the measurement began

    def once() -> None:
        start = time.perf_counter()
        images = next(batches)
        waited[0] += time.perf_counter() - start
        step(*step.views(images))

    for _ in range(dataio.PREFETCH + 2):
        once()
    waited[1], start = waited[0], time.perf_counter()
    rate = rate_of(once, args.batch, 2 * args.seconds, device, warm=0)
    share = (waited[0] - waited[1]) / (time.perf_counter() - start)
    batches.close()
    return rate, share


def measure_loop(name: str, step: OurStep, args: argparse.Namespace, device: torch.device, folder: Path) -> None:
    """Goal 10."""
    faces = write_faces(folder / "faces.parquet", np.arange(args.rows) // 72, make_pictures("png"))
    dataio.write_identity_splits(dataio.collect_unique_identities(faces), folder / "splits.parquet", 0.9, seed=0)
    shards = dataio.materialize_split(faces, folder / "splits.parquet", folder / "train" / "faces", "train")
    stream = dataio.ParquetImageStream(list(map(str, shards)))
    sources = {
        "device cache": dataio.DeviceCache(stream, folder / "cache", None, device),
        "decoded cache": dataio.DecodedCache(stream, folder / "cache"),
        "materialised shards": stream,
    }
    images = torch.randint(0, 256, (args.batch, 112, 112, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)

    def drawn(number: int) -> list[int]:
        return [number * args.batch]

    loops = {k: lambda s=s: loop_over(dataio.load_batches([s], drawn, 0, 10**9, device), step, args, device)
             for k, s in sources.items()}  # fmt: skip
    alone = {"step": lambda: (rate_of(lambda: step(*step.views(images)), args.batch, args.seconds, device), 0.0)}
    found = alternate(alone | loops, args.rounds)
    beside = [rate for rate, _ in found["step"]]
    for source in sources:
        wait = statistics.median(share for _, share in found[source])
        rates = [rate for rate, _ in found[source]]
        print_row("10", f"{name}, loop from {source}, waits {wait:.1%}", rates, "step alone", beside, ">= 0.95")


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", default=["iresnet50"] if on_gpu else ["tiny", "iresnet50"])
    parser.add_argument("--batch", type=int, help="512 on a GPU, on a CPU 64 for tiny and 16 for others")
    parser.add_argument("--queue", type=int, default=32_768 if on_gpu else 4096)
    parser.add_argument("--rows", type=int, default=20_000 if on_gpu else 2000, help="pictures behind the loop")
    parser.add_argument("--seconds", type=float, default=3.0 if on_gpu else 1.0, help="of a measurement; one step at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="as train.compile=true")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, on one core: for a busy machine")
    parser.add_argument("--no-loop", action="store_true", help="leave goal 10 out")
    args = parser.parse_args()
    if args.cpu_time:
        use_one_core()
    asked, device = args.batch, torch.device("cuda" if on_gpu else "cpu")
    print_head()
    for name in args.model:
        args.batch = asked or (512 if on_gpu else 64 if name == "tiny" else 16)
        if args.queue % args.batch:
            parser.error(f"--queue {args.queue}: the usual MoCo needs a multiple of the batch, {args.batch}")
        step = measure_step(name, args, device)
        if not args.no_loop and (on_gpu or name == "tiny"):  # on a CPU a large model hides any loader
            with tempfile.TemporaryDirectory(prefix="sniperface_bench_") as folder:
                measure_loop(name, step, args, device, Path(folder))


if __name__ == "__main__":
    main()
