"""The report of a training: its text, and how a real browser shows it from a file."""

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.report.page import LARGEST, POINTS, page

EVIL = "<script>window.bad = 1</script></script><!--<img src=x onerror='window.bad=1'>\u2028\u2029\"'`${1}&amp;\ud800"
SHOWN = EVIL.replace("\ud800", "?")  # UTF-8 holds no half character


def row(number: int, score: float | None, text: str = "好鞋子带你去更远的地方") -> dict[str, Any]:
    cells = {"question": "类型#鞋", "reference": text, "base": "这双鞋子很好", "tuned": text, "base_score": 20.0}
    return {"row": number, **cells, "score": score}


def finished(**changes: Any) -> dict[str, Any]:
    """A small record with every key."""
    logs: list[dict] = [
        {"step": step, "epoch": step / 50, "loss": 2 / step, "learning_rate": 0.02 - step / 6000, "grad_norm": 1.0}
        | {"tokens_per_second": 5000.0 + step, "memory": 7.8e8}
        for step in range(10, 101, 10)
    ]
    logs += [{"step": step, "eval_loss": 1 / step, "eval_rouge-l": step / 2} for step in (50, 100)]
    setting = {"flag": "learning_rate", "value": "0.02", "from": "variable", "variable": "LR"}
    length = {"limit": 64, "percentiles": {"50": 22, "100": 70}, "edges": [0, 32, 64, 96], "counts": [5, 40, 2]}
    piece = {
        "command": "bash ptuning/train.sh",
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 30.0,
        "tokens": 9000,
    }
    piece |= {"first_step": 0, "last_step": 50, "device": "cpu", "processes": 1, "threads": 2, "commit": None}
    piece |= {"versions": {"torch": "2.13.0"}, "memory": {"predicted": 1e8, "host": 7.8e8, "device": 0}}
    file = {"file": "/data/train.json", "format": "pairs", "rows": 47, "hash": "sha256" + "0f" * 32}
    split = {"split": "train", "rows": 47, "tokens": 4700, "hash": "9f" * 32, "cut": 2, "lost": 0, "dropped": 0}
    return {
        **{"format": 1, "status": "finished", "problem": "", "updated": "2026-01-02T03:05:00+00:00", "method": "LoRA"},
        "model": {"name": "demo", "family": "ChatGLM-6B", "parameters": 3_400_000, "trainable": 73_728, "bits": None},
        "output_dir": "/out/adgen-demo",
        "settings": [setting, {"flag": "seed", "value": "42", "from": "default", "variable": ""}],
        "pieces": [piece, piece | {"first_step": 50, "last_step": 100}],
        "progress": {"step": 100, "steps": 100, "epoch": 2.0, "epochs": 2.0, "seconds": 60.0, "seconds_left": 0.0},
        "data": [{**split, "files": [file], "lengths": [{"name": "question", **length}]}],
        **{"logs": logs, "best_step": 50},
        "samples": {
            "rows": [{"question": "类型#裙", "reference": "一条白色的裙子"}],
            "answers": [{"step": 0, "answers": ["这是裙子"]}, {"step": 50, "answers": ["白色的裙子"]}],
        },
        "scores": {"base": {"rouge-l": 18.2, "loss": 0.9}, "tuned": {"rouge-l": 61.1, "loss": 0.42}},
        "rows": {"total": 40, "rows": [row(number, float(number)) for number in range(40, 0, -1)]},
        "warnings": [{"en": "The loss rises.", "zh": "损失上升。"}],
    } | changes


def part(text: str, name: str) -> Any:
    """The data that a page holds."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


# The text


def test_texts_of_users_cannot_leave_their_script():
    model = {"name": EVIL, "path": EVIL}
    texts = {"problem": EVIL, "model": model, "rows": {"rows": [row(1, 1.0, EVIL)]}, EVIL: EVIL}
    text = page(finished(**texts))
    template = page({})
    assert text.count("<script") == template.count("<script") == 3
    assert text.count("</script") == 3 and "<img" not in text and "<!--" not in text
    assert part(text, "record")["model"]["name"] == SHOWN
    assert part(text, "rows")[0][2] == SHOWN


def test_the_page_forbids_the_network_and_holds_no_address():
    text = page(finished())
    assert "default-src 'none'" in text and "unsafe-inline" not in text
    assert set(re.findall(r"https?://[^\"']*", text)) == {"http://www.w3.org/2000/svg"}


LONG = "长<\u0001" * 333_333
MANY = [row(number, number / 100, "一件好看的衣服，" * 12) for number in range(10_000)]


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": {"total": 10_000, "rows": MANY}},
        {"rows": {"total": 50, "rows": [row(number, 1.0, LONG) for number in range(50)]}},
        {"samples": {"rows": [{"question": LONG}] * 3, "answers": [{"step": 1, "answers": [LONG] * 3}] * 500}},
        {"settings": [{"flag": LONG, "value": LONG, "from": LONG, "variable": LONG}] * 2000, "problem": LONG},
        {"pieces": [{"command": LONG, "versions": dict.fromkeys(map(str, range(999)), LONG)}] * 3000},
        {"logs": [{"step": step, "loss": step / 7, "eval_loss": step / 3, "memory": step} for step in range(50_000)]},
        {"data": [{"files": [{"file": LONG}] * 1000, "lengths": [{"edges": list(range(9999))}] * 100}] * 100},
    ],
    ids=["10,000 rows", "long rows", "samples", "settings", "pieces", "logs", "data"],
)
def test_every_page_is_at_most_a_megabyte(changes):
    assert len(page(finished(**changes)).encode()) <= LARGEST == 1_000_000


def test_of_many_rows_the_worst_are_shown_and_others_evenly():
    text = page(finished(rows={"total": 10_000, "rows": MANY}))
    scores = [cells[6] for cells in part(text, "rows")]
    assert len(text.encode()) > LARGEST * 0.9
    worst = next(i for i, score in enumerate(scores) if score != i / 100)
    others = [round((b - a) * 100) for a, b in zip(scores[worst:], scores[worst + 1 :], strict=False)]
    assert worst > len(scores) * 0.4 and set(others) == {others[0]} and scores[-1] > 95


def test_rows_without_a_score_come_last():
    rows = {"rows": [row(1, None), row(2, 5.0), row(3, 0.0)]}
    assert [cells[0] for cells in part(page({"rows": rows}), "rows")] == [3, 2, 1]


def test_a_long_text_is_cut_with_a_mark():
    [cells] = part(page({"rows": {"rows": [row(1, 1.0, "字" * 10_000)]}}), "rows")
    assert cells[2] == "字" * 2000 + "… [+8,000]"


def test_a_thinned_curve_keeps_its_ends_extremes_and_gaps():
    losses = {step: 1 + step % 7 / 10 for step in range(30_000)}
    losses |= {0: 9.25, 12_345: 99.5, 23_456: -3.5, 17_000: float("nan"), 29_999: 0.125}
    steps, values = part(page({"logs": [{"step": step, "loss": loss} for step, loss in losses.items()]}), "record")[
        "curves"
    ]["loss"]
    kept = dict(zip(steps, values, strict=True))
    assert len(steps) <= POINTS and steps == sorted(steps)
    assert {step: kept[step] for step in (0, 12_345, 23_456, 17_000, 29_999)} == {
        **{0: 9.25, 12_345: 99.5, 23_456: -3.5, 17_000: None, 29_999: 0.125}
    }


def test_a_short_curve_is_whole():
    curve = part(page(finished()), "record")["curves"]["loss"]
    assert curve[0] == list(range(10, 101, 10)) and curve[1][0] == 0.2


def test_the_page_of_a_running_training_is_made_in_milliseconds():
    record = finished(rows={})
    page(record)
    started = time.perf_counter()
    for _ in range(10):
        page(record)
    assert time.perf_counter() - started < 1  # 0.1 s for each, if other tests take the processor


# In a browser

RUNNING = {"status": "training", "model": {"name": "demo"}, "progress": {"step": 0, "steps": 100}}
NOT_FINITE = {"logs": [{"step": 1, "loss": float("nan"), "eval_loss": float("inf")}], "scores": {"tuned": {}}}
RECORDS = {
    "empty": {},
    "begun": RUNNING,
    "finished": finished(),
    "failed": finished(status="failed", problem="The memory ran out.", scores={"tuned": {"loss": float("inf")}}),
    "not finite": NOT_FINITE,
    "empty parts": dict.fromkeys(finished(), None) | {"logs": [], "samples": {}, "rows": {}, "data": [{}]},
    "long rows": finished(rows={"total": 10_000, "rows": MANY}, settings=[{"flag": "x" * 999, "value": "y" * 999}]),
}


class Opened(NamedTuple):
    page: Any
    errors: list[str]  # of the console
    requests: list[str]  # of anything but the file


@pytest.fixture
def show(browser, tmp_path):
    """show(record, …) opens the page of a record from a file; nothing may go wrong in it until the test ends."""
    opened: list[Opened] = []

    def show(record: dict, language: str = "en-US", scheme: str = "light", width: int = 1280) -> Any:
        file = tmp_path / "report.html"
        file.write_text(page(record), encoding="utf-8")
        size = {"width": width, "height": 800}
        tab = browser.new_page(locale=language, color_scheme=scheme, viewport=size)
        errors, requests = [], []
        tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.as_uri())
        tab.locator("h1").wait_for()
        opened.append(Opened(tab, errors, requests))
        return tab

    yield show
    for tab, errors, requests in opened:
        tab.context.close()
        assert errors == []
        assert {url for url in requests if not url.startswith("data:")} == {(tmp_path / "report.html").as_uri()}


def shown_rows(tab) -> list[str]:
    """The first cell of every row of the table."""
    return tab.locator(".rows tbody .cell-0").all_inner_texts()


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("language", ["zh-CN", "en-US"])
def test_every_record_is_shown_on_wide_and_narrow_screens(show, record, language):
    for width, scheme in ((1280, "light"), (400, "dark")):
        tab = show(record, language, scheme, width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("document.documentElement.dataset.theme") == scheme
        assert tab.evaluate("document.documentElement.lang") == language.removesuffix("-US")
        shown = tab.locator("body").inner_text()
        assert not re.search(r"undefined|NaN|null|\[object", shown)


def test_texts_of_users_are_shown_as_texts(show):
    names = {"file": f"/data/{EVIL.replace('/', ':')}", "format": EVIL, "rows": 1, "hash": EVIL}
    samples = {"rows": [{"question": EVIL, "reference": EVIL}], "answers": [{"step": 0, "answers": [EVIL]}]}
    warnings = [{"en": EVIL, "zh": EVIL}]
    tab = show(
        finished(
            **{"method": EVIL, "output_dir": EVIL, "status": "failed", "problem": EVIL, "warnings": warnings},
            **{"samples": samples, "rows": {"rows": [row(1, 1.0, EVIL)]}, "data": [{"split": EVIL, "files": [names]}]},
            settings=[{"flag": EVIL, "value": EVIL, "from": EVIL, "variable": EVIL}],
            pieces=[{"command": EVIL, "device": EVIL, "versions": {EVIL: EVIL}, "commit": EVIL}],
        )
    )
    assert tab.evaluate("window.bad") is None and tab.locator("img").count() == 0
    assert tab.locator(".sentence").text_content() == SHOWN
    assert [tab.locator(f".rows td.cell-{cell}").text_content() for cell in (2, 4)] == [SHOWN] * 2


def test_the_result_comes_before_the_curves_and_its_best_step_is_marked(show):
    tab = show(finished())
    assert tab.locator("main > section").evaluate_all("parts => parts.map(part => part.id)") == [
        *("scores", "curves", "samples", "rows-part", "data", "settings", "run")
    ]
    assert tab.locator("#scores tbody tr").first.inner_text().split() == ["ROUGE-L", "18.20", "61.10", "3.36×"]
    assert tab.locator("text.best").all_text_contents() == ["best: step 50"]
    assert "lowest 0.02 at step 100" in tab.locator("#curves .canvas").first.get_attribute("aria-label")


def test_the_pointer_and_the_arrow_keys_show_the_values_of_a_step(show):
    tab = show(finished())
    chart = tab.locator("#curves .canvas").first
    chart.hover()
    tip = chart.locator(".tip")
    assert tip.inner_text().split() == ["step", "50", "·", "epoch", "1.00", "training", "0.04", "validation", "0.02"]
    chart.focus()
    tab.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("step 60")
    tab.keyboard.press("Escape")
    assert tip.is_hidden()


def test_rows_are_sorted_turned_and_filtered(show):
    tab = show(finished())
    assert shown_rows(tab) == [str(number) for number in range(1, 11)]  # the worst first
    tab.get_by_role("button", name="next page").click()
    assert shown_rows(tab)[0] == "11"
    tab.locator(".rows thead").get_by_role("button", name="tuned ROUGE-L").click()
    assert shown_rows(tab)[0] == "40"
    assert tab.locator(".rows th[aria-sort=descending]").count() == 1
    tab.get_by_role("searchbox").fill("没有这些字")
    assert shown_rows(tab) == [] and "0–0 of 0" in tab.locator(".pages").inner_text()
    tab.get_by_role("searchbox").fill("类型")
    assert len(shown_rows(tab)) == 10


def test_the_words_of_the_reference_are_marked_in_their_order(show):
    cells = {
        "row": 1,
        "question": "q",
        "reference": "白色的裙子 is Good",
        "base": "裙子是白色的",
        "tuned": "good 白色的裙子",
    }
    tab = show({"rows": {"total": 1, "rows": [cells]}})
    marked = [tab.locator(f".rows .cell-{cell} mark").all_inner_texts() for cell in (3, 4)]
    assert marked[0] in (["白色的"], ["裙子"]) and marked[1] == ["白色的裙子"]


def test_many_rows_open_quickly_and_the_page_says_how_many_it_holds(show):
    started = time.perf_counter()
    tab = show(finished(rows={"total": 10_000, "rows": MANY}))
    assert time.perf_counter() - started < 10  # 2 s on a quiet machine
    assert re.search(r"[\d,]+ of 10,000 rows are shown", tab.locator("#rows-part").inner_text())


def test_the_switches_change_language_and_look_and_are_remembered(show):
    tab = show(finished())
    assert "Settings" in tab.locator("#settings").inner_text()
    tab.get_by_role("button", name="中文").click()
    tab.get_by_role("button", name="深色").click()
    tab.reload()
    assert "设置" in tab.locator("#settings").inner_text()
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_running_training_is_loaded_again_unless_its_reader_is_busy(show, tmp_path):
    tab = show(finished(status="training"))
    tab.clock.install()
    tab.reload()
    tab.evaluate("scrollTo(0, 600)")
    (tmp_path / "report.html").write_text(page(finished(status="training", method="P-Tuning v2")), encoding="utf-8")
    tab.clock.fast_forward(25_000)
    tab.locator("h1", has_text="P-Tuning").wait_for()
    tab.wait_for_function("scrollY === 600")
    tab.get_by_role("searchbox").fill("鞋")
    (tmp_path / "report.html").write_text(page(finished(status="finished", method="full")), encoding="utf-8")
    tab.clock.fast_forward(25_000)
    assert "waits while you read" in tab.locator("#updated").inner_text()
    tab.get_by_role("searchbox").fill("")
    tab.clock.fast_forward(25_000)
    tab.locator("h1", has_text="full").wait_for()
    assert "reloads" not in tab.locator("#updated").inner_text()


def test_a_training_without_news_is_not_taken_for_a_running_one(show):
    assert "No news since" in show(finished(status="training")).locator("header").inner_text()


def test_a_command_is_copied(show):
    tab = show(finished())
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.locator(".command .copy").click()
    tab.locator(".command .copy", has_text="copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == "bash ptuning/train.sh"


def test_the_pieces_of_a_resumed_training_are_added_up(show):
    table = show(finished()).locator("#run table")
    assert table.locator("tbody tr").count() == 3
    assert re.findall(r"all|1 min|18,000", table.locator("tbody tr").last.inner_text()) == [
        "all",
        "1 min",
        "18,000",
    ]


def test_the_files_of_the_page_are_short():
    folder = Path(__file__).resolve().parents[1] / "common" / "report"
    assert {
        file.name: length for file in folder.glob("*.*") if (length := len(file.read_text().splitlines())) > 400
    } == {}
