"""What the filter of pipelines/flickr8k-small.yaml keeps, and what reviewed pairs bring.

    python benchmarks/flickr8k_review.py measure DATA [RUN]
    python benchmarks/flickr8k_review.py calibrate DATA [RUN] [--reviews 1000] [--high 500]
    python benchmarks/flickr8k_review.py teach DATA [RUN] [--reviews 500] [--seeds 3]

DATA is the folder with web_truth.jsonl, which only this script reads. `measure` prints what the
kept web pairs hold. `calibrate` lets a simulated reviewer judge pairs drawn at random (with --high,
so many of them among the best scored ones, as the page's sample of high scores gives them), asks
for 95 % precision and measures what is then kept, once for each of --seeds. `teach` finetunes the
matcher as the pipeline does with reviews near the threshold, with as many random ones, and without
any, and compares what the three know of the web pairs that nobody reviewed.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from flickr8k_quality import read as read_jsonl
from quickstart_quality import read

from capfilt import manifest
from capfilt.config import Score
from capfilt.evaluation.filtering import auc_by_kind, roc_auc
from capfilt.inspect.filters import HIGH
from capfilt.inspect.labels import Label, LabelStore, utc_now
from capfilt.models import folder as model_folder
from capfilt.models.tokens import clean
from capfilt.shards import RunDir
from capfilt.stages.score import score_pairs

CONFIG = "pipelines/flickr8k-small.yaml"


def web_pairs(run: Path, truth: list[dict], shard_size: int) -> list[dict]:
    """The scored web pairs with what is true of them."""
    found = []
    for pair in read(run, "scores"):
        if pair["source"] == "web" and pair["itm_prob"] is not None:
            _, shard, row = pair["key"].split("-")
            fact = truth[int(shard) * shard_size + int(row)]
            found.append({**pair, "right": fact["match"], "kind": fact["kind"]})
    return found


def capfilt(
    arguments: argparse.Namespace, run: Path, step: str, *options: str, check: bool = True
) -> str:
    """One command of capfilt on the pipeline; ends the benchmark when it fails and `check` is set.

    Returns what it wrote to stderr when it failed, else nothing.
    """
    data = arguments.data
    inputs = [f"human.pairs={data}/human.jsonl", f"web.pairs={data}/web.jsonl", f"run_dir={run}"]
    given = [word for one in inputs for word in ("--set", one)]
    command = [sys.executable, "-m", "capfilt.cli", *step.split(), CONFIG, *given, *options]
    if check:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return ""
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stderr if found.returncode else ""


def review(run: Path, folder: Path, samples: dict[str, list[dict]]) -> None:
    """Labels as a reviewer who knows the truth would give them, by how the pairs were picked."""
    shutil.rmtree(folder, ignore_errors=True)
    record = manifest.read(RunDir(str(run)), "scores/web-00000.manifest.json")
    matcher = (record or {}).get("weights", {}).get("matcher")
    lines = [
        Label(
            pair["pair_id"],
            pair["uid"],
            "right" if pair["right"] else "wrong",
            "benchmark",
            utc_now(),
            pair["itm_prob"],
            pair["itc_sim"],
            matcher,
            sampling,
        ).line()
        for sampling, pairs in samples.items()
        for pair in pairs
    ]
    LabelStore(folder).import_lines("\n".join(lines))


def show_kept(run: Path, pairs: list[dict]) -> tuple[float, float]:
    """Precision and recall of the kept web pairs; a duplicate counts as kept, once for its text."""
    reason = {row["pair_id"]: row["reason"] for row in read(run, "decisions")}
    kept = [pair for pair in pairs if reason[pair["pair_id"]] in ("kept", "duplicate")]
    right = sum(pair["right"] for pair in kept)
    everything = sum(pair["right"] for pair in pairs)
    precision, recall = right / max(1, len(kept)), right / max(1, everything)
    print(f"kept web pairs {len(kept)} of {len(pairs)}")
    print(f"  right among them  {precision:.3f}")
    print(f"  of the right      {recall:.3f}")
    wrong: dict[str, int] = {}
    for pair in kept:
        if not pair["right"]:
            wrong[pair["kind"]] = wrong.get(pair["kind"], 0) + 1
    print(f"  wrong ones by kind: {wrong}")
    return precision, recall


def show_auc(pairs: list[dict], title: str) -> float:
    labels, scores = [pair["right"] for pair in pairs], [pair["itm_prob"] for pair in pairs]
    auc = roc_auc(labels, scores)
    kinds = auc_by_kind(labels, scores, [pair["kind"] for pair in pairs])
    shown = ", ".join(f"{kind} {value:.3f}" for kind, value in kinds.items())
    print(f"{title} {auc:.4f}  ({shown})", flush=True)
    return auc


@torch.inference_mode()
def scored_again(run: Path, pairs: list[dict]) -> list[dict]:
    """The pairs with the ITM probability that the run's matcher gives them now."""
    model, tokenizer, _ = model_folder.load(run / "models" / "matcher")
    by_shard: dict[str, list[dict]] = {}
    for pair in pairs:
        by_shard.setdefault(pair["key"].rsplit("-", 1)[0], []).append(pair)
    shape = (-1, model.config.image_tokens, model.config.image_width)
    found = []
    for shard, members in by_shard.items():
        table = pq.read_table(run / "features" / f"{shard}.parquet")
        place = {key: row for row, key in enumerate(table["key"].to_pylist())}
        for start in range(0, len(members), 64):
            part = members[start : start + 64]
            rows = table["tokens"].take(pa.array([place[pair["key"]] for pair in part]))
            cells = np.stack([np.frombuffer(row.as_buffer(), np.float16) for row in rows])
            features = torch.from_numpy(cells.astype(np.float32)).reshape(shape)
            texts = [clean(pair["caption"]) for pair in part]
            config = Score(max_tokens=24)
            owners = list(range(len(part)))
            itm, _ = score_pairs(model, tokenizer, features, texts, owners, config)
            found += [
                {**pair, "itm_prob": float(value)} for pair, value in zip(part, itm, strict=True)
            ]
    return found


def teach(arguments: argparse.Namespace, pairs: list[dict]) -> None:
    found: dict[str, list[float]] = {"without": [], "random": [], "threshold": []}
    for seed in range(arguments.seeds):
        rng = random.Random(seed)
        near = sorted(pairs, key=lambda pair: abs(pair["itm_prob"] - 0.5))
        # near the threshold, but not the same ones each time: half of the 1,000 nearest
        picked = {
            "without": [],
            "random": rng.sample(pairs, arguments.reviews),
            "threshold": rng.sample(near[: 2 * arguments.reviews], arguments.reviews),
        }
        reviewed = {pair["pair_id"] for chosen in picked.values() for pair in chosen}
        unseen = {pair["pair_id"] for pair in pairs} - reviewed
        for name, chosen in picked.items():
            with tempfile.TemporaryDirectory(dir=arguments.run.parent) as folder:
                run = Path(folder) / "run"
                shutil.copytree(arguments.run, run, copy_function=os.link)
                shutil.rmtree(run / "models" / "matcher")
                # of this run, whatever the seed of the reviews
                changed = [f"matcher.init={arguments.run / 'models' / 'pretrain'}", f"seed={seed}"]
                if chosen:
                    labels = Path(folder) / "labels"
                    review(arguments.run, labels, {name: chosen})
                    changed.append(f"matcher.labels={labels}")
                options = [word for one in changed for word in ("--set", one)]
                capfilt(arguments, run, "finetune matcher", *options)
                after = scored_again(run, [pair for pair in pairs if pair["pair_id"] in unseen])
                found[name].append(show_auc(after, f"seed {seed}, {name:<9}"))
    for name, values in found.items():
        print(f"{name:<9} {np.mean(values):.4f} ± {np.std(values):.4f}")


def calibrate(arguments: argparse.Namespace, pairs: list[dict]) -> None:
    found: list[tuple[float, float]] = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory(dir=arguments.run.parent) as folder:
            run = Path(folder) / "run"
            shutil.copytree(arguments.run, run, copy_function=os.link)
            rng = random.Random(seed)
            chosen = rng.sample(pairs, arguments.reviews - arguments.high)
            drawn = {pair["pair_id"] for pair in chosen}
            best = sorted(pairs, key=lambda pair: -pair["itm_prob"])[: int(HIGH * len(pairs))]
            high = [pair for pair in best if pair["pair_id"] not in drawn]
            high = rng.sample(high, arguments.high)
            review(run, run / "labels", {"random": chosen, "high": high})
            target = f"precision={arguments.precision}"
            print(f"seed {seed}, {target}, {len(chosen)} random reviews, {len(high)} of high:")
            refused = capfilt(arguments, run, "calibrate", "--target", target, check=False)
            if refused:
                print(f"  refused: {refused.strip()}")
                continue
            file = run / "calibration.json"
            changed = ("--set", f"filter.calibration={file}", "--set", "filter.itm_threshold=null")
            capfilt(arguments, run, "filter", *changed)
            found.append(show_kept(run, pairs))
    if found:
        precision, recall = np.array(found).T
        true = np.abs(precision - arguments.precision) <= 0.02
        print(
            f"{len(found)} of {arguments.seeds} promises made: {precision.mean():.3f} right among "
            f"what they keep, {true.mean():.0%} of them within 0.02 of {arguments.precision}; "
            f"{recall.mean():.3f} of the right kept"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["measure", "calibrate", "teach"])
    parser.add_argument("data", type=Path)
    parser.add_argument("run", nargs="?", default="runs/flickr8k-small", type=Path)
    parser.add_argument("--reviews", type=int, default=500)
    parser.add_argument("--high", type=int, default=0, help="of the reviews, of high scores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", type=float, default=0.95, help="what `calibrate` asks for")
    parser.add_argument(
        "--shard-size", type=int, default=1000, help="the run's download.shard_size"
    )
    arguments = parser.parse_args()
    truth = read_jsonl(arguments.data / "web_truth.jsonl")
    pairs = web_pairs(arguments.run, truth, arguments.shard_size)
    show_auc(pairs, "matcher AUC on the web pairs")
    if arguments.what == "measure":
        show_kept(arguments.run, pairs)
    elif arguments.what == "teach":
        teach(arguments, pairs)
    else:
        calibrate(arguments, pairs)


if __name__ == "__main__":
    main()
