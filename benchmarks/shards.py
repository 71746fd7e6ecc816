"""Time a sweep by one process and by several that have a shard each, all with one thread, and compare their records.

Prints a table in Markdown. Each run starts from nothing: processes start, load the model, and find no stored score. The
two ways take turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from report import parser, show, table, timed

from knbook.shards import load_records

FACTS = ("capital", "official_language", "country_of_capital", "occupation", "largest_city", "native_language")
NAMES = (*FACTS, "determiner_noun", "subject_verb")


def run(folder: Path, processes: int, model: str, prompts: int) -> None:
    """Sweep in so many processes, until the last of the shards is written."""
    command = [sys.executable, "-m", "kncore", "sweep", "attribution", *NAMES, "--model", model]
    command += ["-n", str(prompts // len(NAMES)), "--out", str(folder / "records")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KNCORE_SCORES": str(folder / "scores")}
    running = [
        subprocess.Popen([*command, "--shard", f"{k}/{processes}"], env=environment, stdout=subprocess.DEVNULL)
        for k in range(1, processes + 1)
    ]
    if any([process.wait() for process in running]):
        raise SystemExit("a shard failed")


def apart(some: list[dict], others: list[dict]) -> float:
    """The largest difference of a listed score, as a share of its prompt's largest; the records are of one sweep."""
    worst = 0.0
    for a, b in zip(some, others, strict=True):
        assert a["id"] == b["id"]
        left, right = ({(block, i): score for block, i, score in record["neurons"]} for record in (a, b))
        worst = max([worst, *(abs(left[n] - right[n]) / max(left.values()) for n in left.keys() & right.keys())])
    return worst


def main() -> None:
    options = {
        "model": ("controlled-gpt2", "as for kncore.load"),
        "processes": (2, "beside one"),
        "prompts": ([800, 3600], "of a sweep"),
        "repeats": (2, "of each sweep"),
    }
    args = parser(__doc__, **options).parse_args()
    rows, worst = [], 0.0
    for prompts in [prompts for prompts in args.prompts for _ in range(args.repeats)]:
        seconds, records = [], []
        for processes in (1, args.processes):
            with tempfile.TemporaryDirectory() as folder:
                seconds.append(timed(run, Path(folder), processes, args.model, prompts)[0])
                records.append(load_records([Path(folder) / "records"]))
        worst = max(worst, apart(*records))
        times = [f"{seconds[0]:.1f}", f"{seconds[1]:.1f}", f"{seconds[1] / seconds[0]:.2f}"]
        rows.append([f"{len(records[0]):,}", *times])
        print(rows[-1], file=sys.stderr)
    columns = ["prompts", "one process, s", f"{args.processes} processes, s", "ratio"]
    text = f"""\
{args.model}, one thread a process, {os.cpu_count()} cores. Loading Python and the model is part of it.
Largest difference of a score between the two ways, as a share of its prompt's largest: {worst:.0e}.

{table(columns, rows, left=0)}"""
    show(text, args.out)


if __name__ == "__main__":
    main()
