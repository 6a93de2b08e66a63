"""Recipes side by side: what an encoder learns from the same number of pictures, against what needs no training.

    uv run python tests/bench/recipe.py FACES/first_*.parquet FACES/second_*.parquet [--rows small usynthface] [--seeds 1 2 3]

Trains each row of ROWS with each seed by the program's own commands, measures it on pairs and by Rank-1, and prints a table with
the paired differences of accuracy to the untrained encoder, USynthFace's settings and LBP, and of TAR to LBP. Choosing is done on
validation identities; `--side test` is for the one figure that is reported. Rows that are finished, of the same files, stand in
recipe.json and are not run again. Thresholds of TAR are set by all pairs of two people and held fixed in its intervals; rows of a
time when the 3,000 pairs of the protocol set them, which are too few, show none.
"""

import argparse
import base64
import json
import subprocess
import sys
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import dataio
import moco
import sniperface

ROWS = {  # name -> overrides; further ones by `--rows "name: overrides"`
    "small": "experiment=small",
    "usynthface": "experiment=usynthface backbone=tiny data.cache=decoded train.epochs=12 train.amp=auto moco.queue_size=1024 "
    "embed.flip=true",
    "self": "experiment=small positives=self",
    "no light": "experiment=small augment.light.p=0",
    "T 0.07": "experiment=small moco.temperature=0.07",
    "T 0.1, short": "experiment=small train.epochs=4 moco.temperature=0.1",
    "rate 0.1, short": "experiment=small train.epochs=4 train.lr=0.1",
    "keys 0.99": "experiment=small moco.key_momentum=0.99",
    "cosine": "experiment=small train.lr_schedule=cosine moco.key_momentum=0.99",
    "cosine, long": "experiment=small train.lr_schedule=cosine train.epochs=50 moco.key_momentum=0.99",
    "batch 256, long": "experiment=small train.batch_size=256 train.lr=0.3 moco.shuffle_groups=8 train.epochs=50 "
    "train.lr_schedule=cosine moco.key_momentum=0.99",
}
UNTRAINED = (*sniperface.REFERENCES, "pixels")
MONITORS = {"trained": "monitor_loss", "untrained": "monitor_untrained"}  # their names in the log
FILE = Path(__file__).with_name("recipe.json")
PAIRS, GENUINE_A_PERSON, FOLDS, FAR = 6000, 15, 10, 1e-2


def write_pairs(vectors: dataio.VectorTable, path: Path) -> np.ndarray:
    """Half genuine, both people of a pair in the same fold, fixed by a seed; gives the codes of each pair's people [2, N]."""
    rng, person = np.random.default_rng(0), np.unique(vectors.names, return_inverse=True)[1]
    fold, genuine = rng.permutation(person.max() + 1) % FOLDS, []
    for one in range(person.max() + 1):
        rows = np.flatnonzero(person == one)
        pairs = np.stack(np.triu_indices(len(rows), 1), axis=1)
        genuine += rows[rng.permutation(pairs)[:GENUINE_A_PERSON]].tolist()
    genuine = rng.permutation(np.array(genuine))[: PAIRS // 2]
    drawn = rng.integers(len(person), size=(100 * PAIRS, 2))
    strangers = drawn[(person[drawn[:, 0]] != person[drawn[:, 1]]) & (fold[person[drawn[:, 0]]] == fold[person[drawn[:, 1]]])]
    a, b = np.concatenate([genuine, strangers[: len(genuine)]]).T
    table = {"fold": fold[person[a]], "same": np.arange(len(a)) < len(genuine)}
    for side, rows in (("a", a), ("b", b)):
        table |= {f"image_filename_{side}": vectors.files[rows], f"identity_id_{side}": vectors.names[rows]}
    pq.write_table(pa.table(table), path)
    return person[np.stack([a, b])]


def raw_pixels(folder: Path, side: str) -> tuple[dataio.VectorTable, float]:
    """The pictures themselves, at 32 px, as unit vectors; and their Rank-1."""
    cfg = sniperface.load_config(OmegaConf.load(folder / "config.yaml"))
    rows = dataio.find_rows(cfg.data, cfg.split, side)
    pixels = lambda views: F.normalize(F.interpolate(views, size=32, mode="bilinear", antialias=True).flatten(1))  # noqa: E731
    vectors = sniperface.describe_rows(rows, cfg, torch.device("cpu"), pixels)
    return vectors, moco.closed_set_rates(vectors, cfg.eval, cfg.eval.enroll_per_id, cfg.eval.seed)["rank1"].value


def count_strangers(vectors: dataio.VectorTable) -> np.ndarray:
    """Table of counts of the cosines of all pairs of two people, each pair twice."""
    counts = np.zeros(2 * moco.GRID, np.int64)
    for rows in np.array_split(np.arange(len(vectors.names)), 16):
        score = vectors.vectors[rows] @ vectors.vectors.T
        counts += moco.count_scores(score[vectors.names[rows, None] != vectors.names])
    return counts


def measure(vectors: dataio.VectorTable, pairs: Path) -> dict:
    """Accuracy and TAR, and which of the pairs were judged rightly, which genuine ones accepted, as base64 of their bits."""
    a, b, same, fold = dataio.read_pairs(pairs, vectors.names, vectors.files)
    score = np.einsum("nd,nd->n", vectors.vectors[a], vectors.vectors[b])
    found = moco.pair_accuracy(score, same, fold)
    threshold = dict(zip(np.unique(fold).tolist(), found.threshold.tolist(), strict=True))
    right = (score >= np.array([threshold[one] for one in fold.tolist()])) == same
    strangers = count_strangers(vectors)
    accepted = moco.is_match(score[same], moco.thresholds(strangers, [FAR])[FAR])
    bits = {"right": right, "accepted": accepted}
    bits = {name: base64.b64encode(np.packbits(column)).decode() for name, column in bits.items()}
    tar = {f"tar@{FAR:g}": float(accepted.mean()), "strangers": int(strangers.sum() // 2)}
    return moco.pair_figures(score, same, fold, [FAR]) | tar | bits


def run_row(name: str, overrides: str, seed: int, args: argparse.Namespace) -> tuple[list[dict], list[list[int]]]:
    """Train, embed and measure: a row for the encoder and one for each reference, and the codes of each pair's people [2, N]."""
    run = f"{name}_{seed}".replace(" ", "-").replace(",", "")
    words = [
        *overrides.split(), f"data.digiface_glob='{args.first}'", f"data.digi2real_glob='{args.second}'", "split.train_ratio=0.75",
        "split.validation_ratio=0.15", f"split.out_dir={args.folder}/splits", f"data.cache_dir={args.folder}/cache", f"seed={seed}",
        f"run_dir={args.folder}/runs/{run}", "train.keep_last=1", f"embed.split={args.side}", "embed.leak_check=false",
    ]  # fmt: skip
    program = [sys.executable, str(common.ROOT / "sniperface.py"), *words]
    folder = args.folder / "runs" / run
    for command in ("train", "embed", "eval"):
        subprocess.run([*program, f"command={command}", f"eval.embeddings=embeddings/{args.side}_embeddings.parquet"], check=True)
    log = sniperface.read_log(folder)[-1]
    path, pairs = folder / "embeddings" / f"{args.side}_embeddings.parquet", args.folder / f"{args.side}_pairs.parquet"
    found = (json.loads(file.read_text()) for file in folder.glob("metrics*.json"))
    metrics = next(one for one in found if Path(one["embeddings"]).name == path.name)
    rows = []
    for encoder in ("trained", *UNTRAINED):
        if encoder == "pixels":
            vectors, rank1 = raw_pixels(folder, args.side)
        else:
            vectors = sniperface.read_vectors(path if encoder == "trained" else sniperface.reference_path(path, encoder))
            rank1 = (metrics if encoder == "trained" else metrics[encoder])["rank1"]
        people = write_pairs(vectors, pairs)
        rows.append({
            "row": name if encoder == "trained" else encoder, "seed": seed, "side": args.side, "overrides": overrides,
            "seen": log["step"] * int(sniperface.read_saved_settings(folder / "config.yaml")["train"]["batch_size"]),
            "minutes": round(log["seconds"] / 60, 1), "rank1": rank1, "monitor": log.get(MONITORS.get(encoder)),
            **measure(vectors, pairs),
        })  # fmt: skip
    return rows, people.tolist()


def share(rows: list[dict], what: str) -> np.ndarray:
    """Share of the seeds that judged each pair rightly [N], or accepted each genuine one [N / 2]."""
    count = rows[0]["pairs"] // (1 if what == "right" else 2)
    return np.mean([np.unpackbits(np.frombuffer(base64.b64decode(row[what]), np.uint8), count=count) for row in rows], axis=0)


def difference(ours: np.ndarray, base: np.ndarray, people: np.ndarray) -> str:
    """A rate of pairs [N] minus another, with its 95 % interval: their people [2, N] are drawn anew, and so pairs of one or two."""
    each, (a, b), count = np.subtract(ours, base), people, people.max() + 1
    weight = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=1000)
    kinds = [kind for kind in (a == b, a != b) if kind.any()]
    drawn = [np.where(kind, weight[:, a] * np.where(a == b, 1, weight[:, b]), 0) for kind in kinds]
    low, high = np.quantile(np.mean([w @ each / w.sum(axis=1) for w in drawn], axis=0), (0.025, 0.975))
    return f"{100 * each.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, of columns without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def read_rows() -> tuple[list[dict], dict[str, list[list[int]]]]:
    """The finished rows, and of each data and side the people of the pairs."""
    return tuple(json.loads(FILE.read_text()).values()) if FILE.exists() else ([], {})


def keep_rows(found: list[dict], people: list[list[int]], data: str, side: str) -> None:
    """Add what is new to the file as it is now: another process may have written to it."""
    done, of_pairs = read_rows()
    known = {(row["row"], row["seed"], row["side"], row["data"]) for row in done}
    done += [row | {"data": data} for row in found if (row["row"], row["seed"], side, data) not in known]
    lines = ",\n".join(map(json.dumps, done))
    FILE.write_text(f'{{"rows": [\n{lines}\n],\n"people": {json.dumps(of_pairs | {f"{side} {data}": people})}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", nargs="?", help="parquet pattern of the first source; without it the finished rows are printed")
    parser.add_argument("second", nargs="?", help="parquet pattern of the second source")
    parser.add_argument("--rows", nargs="+", default=list(ROWS)[:2], help="names of ROWS, or 'name: overrides'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--side", choices=("val", "test"), default="val")
    parser.add_argument("--folder", type=lambda path: Path(path).absolute(), default="recipe_runs")
    args = parser.parse_args()
    files = dataio.find_files([args.first, args.second]) if args.first else []
    data = dataio.digest(*((file.name, file.stat().st_size) for file in files)) if files else read_rows()[0][0]["data"]
    for text in args.rows if args.first else ():
        name, _, overrides = text.partition(": ")
        overrides = overrides or ROWS[name]
        for seed in args.seeds:
            done = {(row["row"], row["seed"], row["side"], row["data"]): row["overrides"] for row in read_rows()[0]}
            known = done.get((name, seed, args.side, data))
            if known is None:
                args.folder.mkdir(parents=True, exist_ok=True)
                keep_rows(*run_row(name, overrides, seed, args), data, args.side)
            elif known != overrides:
                raise SystemExit(f"{name}: finished with {known}; choose another name for {overrides}")
    done, people = read_rows()
    rows = [row for row in done if (row["side"], row["data"]) == (args.side, data)]
    names = list(dict.fromkeys(row["row"] for row in rows))
    base: dict[str, list] = {name: [row for row in rows if row["row"] == name] for name in names}
    others = ("untrained", "usynthface", "lbp")
    differences = *(f"beside {other}" for other in others), "TAR beside lbp"
    titles = "seeds", "pictures seen", "accuracy", "TAR at FAR 1e-2", "Rank-1", *differences
    print(f"| row, {args.side} identities | {' | '.join(titles)} |")
    print("|---" * (1 + len(titles)) + "|")
    for name, its in sorted(base.items(), key=lambda item: np.mean([row["accuracy"] for row in item[1]])):
        mean = {key: 100 * float(np.mean([row[key] for row in its])) for key in ("accuracy", f"tar@{FAR:g}", "rank1")}
        beside = []
        for other, what in (*((other, "right") for other in others), ("lbp", "accepted")):
            sides = its, [] if name == other else base.get(other, [])
            if not {name, other} & set(UNTRAINED):  # references do not depend on the seed of the training
                seeds = set.intersection(*({row["seed"] for row in side} for side in sides))
                sides = [[row for row in side if row["seed"] in seeds] for side in sides]
            shared = all(sides) and (what == "right" or all("strangers" in row for side in sides for row in side))
            pair = [share(side, what) for side in sides if shared]
            beside.append(difference(*pair, np.array(people[f"{args.side} {data}"])[:, : len(pair[0])]) if shared else "")
        seen = its[0]["seen"] if name not in UNTRAINED else 0
        figures = " | ".join(
            f"{value:.1f}" * (key != f"tar@{FAR:g}" or all("strangers" in row for row in its)) for key, value in mean.items()
        )
        print(f"| {name} | {len(its)} | {seen:,} | {figures} | {' | '.join(beside)} |")
    watched = [row for row in rows if row["monitor"] is not None]
    if len(watched) > 2:
        monitor = [-row["monitor"] for row in watched]
        found = (f"{key} {rank_correlation(monitor, [row[key] for row in watched]):.2f}" for key in ("accuracy", "rank1"))
        print(f"\nSpearman's correlation of minus the monitor, over {len(watched)} encoders: {', '.join(found)}")


if __name__ == "__main__":
    main()
