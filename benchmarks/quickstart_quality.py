"""How good the quickstart's matcher and captioner are, by sample_data/web/truth.csv.

    python benchmarks/quickstart_quality.py [RUN]

Only this script reads truth.csv: no stage sees it. Prints the goals beside what was measured.
"""

import argparse
import csv
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.evaluation.filtering import auc_by_kind, roc_auc
from capfilt.schema import REASONS


def read(run: Path, table: str) -> list[dict]:
    files = sorted((run / table).glob("web-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).to_pylist()


def names(caption: str, noun: str) -> bool:
    """Whether a caption holds the noun, in singular or plural."""
    words = {word.rstrip("s") for word in re.findall(r"[a-z]+", caption.lower())}
    return all(word.rstrip("s") in words for word in re.findall(r"[a-z]+", noun.lower()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs/quickstart", type=Path)
    parser.add_argument("--shard-size", type=int, default=500, help="the run's download.shard_size")
    parser.add_argument("--truth", default="sample_data/web/truth.csv", type=Path)
    arguments = parser.parse_args()
    with arguments.truth.open(encoding="utf-8", newline="") as file:
        truth = list(csv.DictReader(file))

    def row_of(key: str) -> int:
        _, shard, row = key.split("-")
        return int(shard) * arguments.shard_size + int(row)

    scores = read(arguments.run, "scores")
    decisions = {row["pair_id"]: row for row in read(arguments.run, "decisions")}
    labels, probabilities, kinds, kept = [], [], [], []
    named, nameable = 0, 0
    for pair in scores:
        fact = truth[row_of(pair["key"])]
        if pair["source"] == "web" and fact["match"] and pair["itm_prob"] is not None:
            labels.append(fact["match"] == "true")
            probabilities.append(pair["itm_prob"])
            kinds.append(fact["kind"])
            kept.append(decisions[pair["pair_id"]]["reason"] in ("kept", "duplicate"))
        if pair["source"] == "synthetic" and fact["noun"]:
            nameable += 1
            named += names(pair["caption"], fact["noun"])
    right = sum(k and y for k, y in zip(kept, labels, strict=True))
    web = [row for row in decisions.values() if row["source"] == "web"]
    closed = len(web) == len(truth) and all(row["reason"] in REASONS for row in web)
    print(f"matcher AUC                      {roc_auc(labels, probabilities):.3f}  (goal 0.90)")
    for kind, auc in auc_by_kind(labels, probabilities, kinds).items():
        print(f"  against {kind:<22} {auc:.3f}")
    print(f"right among what it keeps        {right / max(1, sum(kept)):.3f}  (goal 0.85)")
    print(f"kept of the right                {right / max(1, sum(labels)):.3f}  (goal 0.80)")
    share = named / max(1, nameable)
    print(f"captions that name the concept   {share:.3f}  (goal 0.40, of {nameable})")
    print(f"books close                      {closed}  ({len(web)} of {len(truth)} rows)")


if __name__ == "__main__":
    main()
