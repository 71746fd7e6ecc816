"""Time a sweep by one process and by several that have a shard each, all with one thread, and compare their records.

    python benchmarks/shards.py [--model NAME] [--processes N] [--prompts N ...] [--repeats N] [--out FILE]

Prints a table in Markdown. Each run starts from nothing: processes start, load the model, and find no stored score. The
two ways take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kncore import sweep
from kncore.pipeline import write

NAMES = (
    "capital",
    "official_language",
    "country_of_capital",
    "occupation",
    "largest_city",
    "native_language",
    "determiner_noun",
    "subject_verb",
)


def run(folder: Path, processes: int, model: str, prompts: int) -> float:
    """Seconds until the last of the shards is written."""
    command = [sys.executable, "-m", "kncore", "sweep", "attribution", *NAMES, "--model", model]
    command += ["-n", str(prompts // len(NAMES)), "--out", str(folder / "records")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KNCORE_SCORES": str(folder / "scores")}
    start = time.perf_counter()
    running = [
        subprocess.Popen([*command, "--shard", f"{k}/{processes}"], env=environment, stdout=subprocess.DEVNULL)
        for k in range(1, processes + 1)
    ]
    if any([one.wait() for one in running]):
        raise SystemExit("a shard failed")
    return time.perf_counter() - start


def apart(one: list[dict], other: list[dict]) -> float:
    """The largest difference of a listed score, as a share of its prompt's largest; the records are of one sweep."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        assert a["id"] == b["id"]
        scores, others = ({(block, i): score for block, i, score in record["neurons"]} for record in (a, b))
        both = scores.keys() & others.keys()
        worst = max([worst, *(abs(scores[n] - others[n]) / max(scores.values()) for n in both)])
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="controlled-gpt2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--prompts", type=int, nargs="+", default=[800, 3600])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file to write the table to")
    args = parser.parse_args()
    rows, worst = [], 0.0
    for prompts in [prompts for prompts in args.prompts for _ in range(args.repeats)]:
        seconds, records = [], []
        for processes in (1, args.processes):
            with tempfile.TemporaryDirectory() as folder:
                seconds.append(run(Path(folder), processes, args.model, prompts))
                records.append(sweep.load_records([Path(folder) / "records"]))
        worst = max(worst, apart(*records))
        rows.append(f"| {len(records[0]):,} | {seconds[0]:.1f} | {seconds[1]:.1f} | {seconds[1] / seconds[0]:.2f} |")
        print(rows[-1], file=sys.stderr)
    text = f"""\
{args.model}, one thread a process, {os.cpu_count()} cores. Loading Python and the model is part of it.
Largest difference of a score between the two ways, as a share of its prompt's largest: {worst:.0e}.

| prompts | one process, s | {args.processes} processes, s | ratio |
| --: | --: | --: | --: |
{chr(10).join(rows)}
"""
    print(text)
    if args.out:
        write(args.out, text)


if __name__ == "__main__":
    main()
