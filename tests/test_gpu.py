"""The benchmark for a GPU, on the CPU and on models of a few neurons: every row is there, and what fails is a row."""

from __future__ import annotations

import gpu
import pytest
import torch


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "CALLS", 1)
    monkeypatch.setattr(gpu, "SAMPLES", 2)


def cells(page: str) -> list[list[str]]:
    lines = [line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert lines[0] == gpu.COLUMNS
    return lines[2:]


def test_every_kind_of_work_is_measured_on_every_model_in_both_precisions(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.md"
    gpu.main(["--tiny", "--out", str(out)])
    assert out.read_text() == capsys.readouterr().out
    found = cells(out.read_text())
    assert len(found) == 2 * 2 * 5
    assert {(row[0], row[1]) for row in found} == {(m, p) for m in gpu.MODELS for p in ("bfloat16", "float32")}
    assert all(float(row[3].split()[0]) > 0 and row[4] == "1" and row[5] == gpu.NOT for row in found), found
    amounts = {row[2]: row[6] for row in found}
    assert amounts["attribution, 20 Riemann steps"] == "20.0 nodes a block"
    assert amounts["causal trace"] == "18 cells of 3 samples"  # six tokens from the subject on, three blocks
    assert amounts["covariance of a block"] == "256 tokens, block 1"
    assert amounts["ROME edit"].endswith("steps, C given") and amounts["ROME edit"][0] != "0"


def test_without_a_gpu_the_page_says_that_nothing_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    page = capsys.readouterr().out
    assert page.startswith("No GPU was there") and [row[3] for row in cells(page)] == [gpu.NOT] * 2


def test_the_page_in_the_book_is_one_that_the_benchmark_writes(checkout):
    page = (checkout / "book" / "benchmark-gpu.md").read_text(encoding="utf-8")
    assert {row[0] for row in cells(page)} == set(gpu.MODELS) and "random" in page


@pytest.mark.parametrize(("error", "said"), [
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    (ValueError("a | b\nc"), "ValueError: a / b c"),
])  # fmt: skip
def test_work_that_fails_is_a_row_that_says_why(error, said):
    def fail(i):
        raise error

    assert gpu.measured(gpu.Kind("", fail, str), "cpu") == [gpu.NOT, "0", "", said]


def test_results_of_two_devices_are_compared_and_what_fails_there_is_said(monkeypatch):
    assert gpu.differences("cpu") == [0.0] * 6  # scores, a trace and a search, of two families
    monkeypatch.setattr(gpu, "differences", lambda: [1e-7, 2e-6])
    assert gpu.apart() == "2e-06 of the largest number of its kind"
    monkeypatch.setattr(gpu, "differences", lambda: 1 / 0)
    assert gpu.apart() == "*not measured* (ZeroDivisionError: division by zero)"


def test_a_model_that_does_not_fit_is_a_row_and_the_next_one_is_measured(monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "random_model", refuse)
    found = list(gpu.rows(gpu.MODELS, "cpu"))
    assert len(found) == 4 and all(row[2] == "the model itself" and row[6] == "out of memory" for row in found)


def test_the_tokenizer_knows_all_that_edits_read_and_is_as_large_as_the_vocabulary():
    words = gpu.tokenizer(5000)
    assert len(words) == 5000
    texts = [*gpu.prose.passages(), gpu.query(0).prompt, "w0 is a"]
    assert not any(words.unk_token_id in ids for ids in words(texts)["input_ids"])
    assert len(words(gpu.query(5).prompt)["input_ids"]) == len(gpu.PROMPT.split())
