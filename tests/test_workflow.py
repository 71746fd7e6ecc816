"""The workflow: its jobs, and a run that is stopped, repeated and changed. Skipped where there is no Snakemake."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import tiny
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_project import locked

from knbook import sweep
from kncore.query import Query

ROOT = Path(__file__).resolve().parent.parent
SNAKEMAKE = os.environ.get("KNCORE_SNAKEMAKE") or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(
    not SNAKEMAKE, reason="no snakemake here: install requirements-cluster.lock, or name one by KNCORE_SNAKEMAKE"
)
SMALL = {
    "python": sys.executable,
    "out": "out",
    "models": ["controlled-gpt2"],
    "threads": 1,
    "shards": 2,
    "sweeps": [{"name": "facts", "run": "attribution capital -n 6 --steps 4"}],
    "chapters": ["01"],
}


def snakemake(folder: Path, *arguments: str, **config) -> subprocess.CompletedProcess:
    settings = folder / "config.json"
    settings.write_text(json.dumps({**SMALL, **config}))
    command = [SNAKEMAKE, "-s", str(ROOT / "workflow" / "Snakefile"), "--configfile", str(settings), "--cores", "2"]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def jobs(done: subprocess.CompletedProcess) -> dict[str, int]:
    """The table of jobs that Snakemake prints."""
    lines = (done.stdout + done.stderr).splitlines()
    if "Job stats:" not in lines:
        return {}
    start = lines.index("Job stats:") + 3
    rows = (line.split() for line in lines[start : lines.index("", start)])
    return {name: int(count) for name, count in rows if name not in ("all", "total")}


class Quoting(string.Formatter):
    """Fills in a shell command as Snakemake does: `:q` quotes, a list stands as its parts."""

    def format_field(self, value, spec):
        parts = [str(one) for one in (value if isinstance(value, list) else [value])]
        return " ".join(map(shlex.quote, parts) if spec == "q" else parts)

    def get_field(self, name, args, kwargs):
        found = re.fullmatch(r"(\w+)\[(\w+)\]", name)
        return (kwargs[found[1]][found[2]], name) if found else super().get_field(name, args, kwargs)


def shell(rule: str, **fields) -> None:
    """Run the shell command of a rule of the Snakefile, without Snakemake."""
    text = (ROOT / "workflow" / "Snakefile").read_text(encoding="utf-8").partition(f"rule {rule}:")[2]
    lines = re.search(r"    shell:\n((?: {8}.*\n)+)", text)[1]
    command = Quoting().format(ast.literal_eval(f"({lines})"), config=SMALL, SHARDS=1, **fields)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True, env=environment)


@pytest.mark.kind("sweep-files")
def test_shards_are_merged_by_their_markers_beside_files_of_earlier_sweeps(tmp_path):
    out = tmp_path / "it's a folder" / "facts"
    earlier = sweep.sweep(tiny.lm("gpt2"), "attribution", [Query("the capital of", "France")], {"steps": 2}, out)
    before, marker = earlier.read_text(), out / "1.done"
    call = {"settings": "HF_HUB_OFFLINE=1", "sweep": "attribution capital -n 4 --steps 2", "name": "controlled-gpt2"}
    places = {"log": out / "1.log", "output": marker, "wildcards": SimpleNamespace(k=1)}
    shell("shard", params=SimpleNamespace(**call, out=out), threads=1, **places)
    assert len(list(out.glob("*.jsonl"))) == 2 and earlier.read_text() == before
    shell("merge", input=[marker], params=SimpleNamespace(out=out), output=out.with_suffix(".done"))
    records = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [record["place"] for record in records] == [1, 2, 3, 4]
    assert {record["model"] for record in records} == {"controlled-gpt2"}


def test_the_lock_of_the_cluster_holds_the_project_and_snakemake():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages, plain = locked("requirements-cluster.lock"), locked("requirements.lock")
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["book"], *extras["cluster"]]):
        version = packages[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert {requirement.partition(">")[0] for requirement in extras["cluster"]} == {
        "snakemake",
        "snakemake-executor-plugin-slurm",
    }
    held_back = {name for name in packages.keys() & plain.keys() if packages[name] != plain[name]}
    assert held_back == {"packaging", "sqlalchemy"}, "renew the two locks together"


def test_profiles_rerun_by_content_and_ask_for_one_gpu_a_job():
    folder = ROOT / "workflow" / "profiles"
    default, slurm = (yaml.safe_load((folder / name / "config.yaml").read_text()) for name in ("default", "slurm"))
    assert "mtime" not in default["rerun-triggers"] and default["rerun-incomplete"]
    assert slurm["executor"] == "slurm" and slurm["retries"] > 0


@needs_snakemake
def test_models_shards_and_chapters_are_multiplied(toy):
    done = snakemake(
        toy,
        "-n",
        models=["controlled-gpt2", "owner/name@rev"],
        shards=3,
        sweeps=[{"name": name, "run": "edits capital"} for name in "ab"],
    )
    assert done.returncode == 0, done.stderr
    assert jobs(done) == {"fetch": 2, "shard": 12, "merge": 4, "chapter": 2}


@needs_snakemake
def test_a_job_has_one_gpu_where_the_device_is_one(toy):
    for device, told in (("cpu", "gpu=0"), ("cuda", "gpu=1")):
        done = snakemake(toy, "-n", "-p", device=device)
        assert done.returncode == 0 and told in done.stdout + done.stderr
    assert "KNCORE_DEVICE=cuda" in done.stdout + done.stderr


@needs_snakemake
def test_a_chapter_that_is_not_there_is_named(toy):
    done = snakemake(toy, "-n", chapters=["07"])
    assert done.returncode == 1 and "no chapters 07; there are 01" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": "controlled-gpt2"},  # not one for each letter
        {"models": []},
        {"models": ["gpt2", "gpt2"]},
        {"shards": 0},
        {"shards": "4"},
        {"threads": "many"},
        {"mem_mb": -1},
        {"device": 0},
        {"device": "cuda; true"},
        {"dtype": "float8"},
        {"sweeps": [{"name": "facts"}]},
        {"sweeps": [{"name": "book", "run": "attribution capital"}]},
        {"sweeps": [{"name": "../facts", "run": "attribution capital"}]},
        {"sweeps": [{"name": "facts", "run": "render"}]},
        {"sweeps": [{"name": "facts", "run": "attribution capital; true"}]},
        {"sweeps": [{"name": "facts", "run": "attribution $(true)"}]},
        {"chapters": 1},
        {"shard": 4},
    ],
    ids=str,
)
def test_a_wrong_configuration_is_none(wrong):
    schema, right = (yaml.safe_load((ROOT / "workflow" / f"config{kind}.yaml").read_text()) for kind in (".schema", ""))
    jsonschema.validate(right, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**right, **wrong}, schema)


@needs_snakemake
def test_a_wrong_configuration_is_refused_before_a_job_starts(toy):
    done = snakemake(toy, models="controlled-gpt2")
    assert done.returncode == 1 and "'controlled-gpt2' is not of type 'array'" in done.stdout + done.stderr
    twice = [{"name": "facts", "run": f"attribution {relation}"} for relation in ("capital", "maker")]
    done = snakemake(toy, sweeps=twice)
    assert done.returncode == 1 and "have one name" in done.stdout + done.stderr
    assert not (toy / "out").exists()


@needs_snakemake
def test_a_sweep_runs_in_shards_and_is_run_again_for_its_content_only(toy):
    shutil.copytree(ROOT / "workflow" / "profiles", toy / "workflow" / "profiles")
    profile = ("--workflow-profile", str(toy / "workflow" / "profiles" / "default"))
    done = snakemake(toy, *profile)
    assert done.returncode == 0, done.stderr
    records = toy / "out" / "controlled-gpt2" / "facts.jsonl"
    first = records.read_text()
    assert [json.loads(line)["place"] for line in first.splitlines()] == [1, 2, 3, 4, 5, 6]
    assert list((toy / "out" / "controlled-gpt2" / "book").glob("01-*.ipynb"))

    for path in [*toy.rglob("*.ipynb"), *toy.rglob("fetched")]:
        os.utime(path)  # as in a fresh clone
    assert jobs(snakemake(toy, "-n", *profile)) == {}
    finer = [{"name": "facts", "run": "attribution capital -n 6 --steps 5"}]
    assert jobs(snakemake(toy, "-n", *profile, sweeps=finer))["shard"] == 2

    done = snakemake(toy, *profile, sweeps=finer)
    assert done.returncode == 0 and json.loads(records.read_text().splitlines()[0])["settings"] == {"steps": 5}
    assert snakemake(toy, *profile).returncode == 0 and records.read_text() == first

    # A job that fails takes its marker with it, and nothing else.
    failed = snakemake(toy, *profile, sweeps=[{"name": "facts", "run": "attribution no_such_relation"}])
    assert failed.returncode == 1 and records.read_text() == first
    shards = sorted((toy / "out" / "controlled-gpt2" / "facts").glob("*.jsonl"))
    assert len(shards) == 4
    again = snakemake(toy, *profile)
    assert again.returncode == 0 and records.read_text() == first
