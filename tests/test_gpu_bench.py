"""tests/bench/gpu.sh: an item that fails, hangs or comes too late is a line, and the next one goes on."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import gpu


@pytest.fixture
def day(tmp_path, monkeypatch):
    """A day without items, that has just begun."""
    monkeypatch.setattr(gpu, "OUT", tmp_path / "lines.jsonl")
    monkeypatch.setattr(gpu, "END", time.time() + 1000)
    monkeypatch.setenv("TERMINAL", "1")
    monkeypatch.setenv("ITEM", "")
    return tmp_path


def item(name: str, code: str, limit: float = 100) -> gpu.Item:
    return gpu.Item(name, [sys.executable, "-c", code], limit)


def test_failed_and_hanging_items_are_lines_and_the_next_goes_on(day):
    stage = [item("fails", "print('why'); 1 / 0"), item("hangs", "while True: pass", limit=0.5), item("works", "")]
    gpu.run_stage(stage, day)
    lines = {line["item"]: line for line in gpu.read_lines()}
    assert {name: line["ended"] for name, line in lines.items()} == {"fails": False, "hangs": False, "works": True}
    assert lines["fails"]["failed"] == "exit code 1" and "ZeroDivisionError" in lines["fails"]["log"][-1]
    assert lines["hangs"]["failed"].startswith("killed")


def test_what_does_not_fit_any_more_is_named(day, monkeypatch):
    assert list(gpu.steps_in_time(["a"], reserve=1)) == ["a"]
    monkeypatch.setattr(gpu, "END", time.time())
    gpu.run_stage([item("late", "")], day)
    assert list(gpu.steps_in_time(["b", "c"], reserve=1)) == []
    assert [line["left_out"] for line in gpu.read_lines()] == [["late"], ["b", "c"]]


def test_measured_settings_stand_beside_their_plans(capsys):
    setting = "ptuning, 1 x (64 + 64)"
    lines = [
        {"item": "plan chatglm 4", "setting": setting, "predicted": 5_000_000_000, "at": 1},
        {"item": "measure chatglm 4", "setting": setting, "measured": 4_000_000_000, "ms": 3.0, "at": 2},
    ]
    (row,) = gpu.settings_table(lines)
    assert (row["model"], row["ratio"], row["ms"]) == ("chatglm 4", "1.250", 3.0)
    assert {"goal": "chatglm 4 bit, P-Tuning v2, 1 x (64 + 64), GB", "wanted": "<= 5.2", "here": 4.0} in gpu.goals(
        lines
    )
    gpu.print_tables(lines)
    assert "1.250" in capsys.readouterr().out
