"""Milliseconds from Enter to the first text of an answer, in a real browser on the demo model.

    bash ptuning/train.sh && python tests/bench/web_demo.py

Starts ptuning/web_demo.sh with tuned model and base side by side. The first row is the time of the model alone, in this
process: the least that the page can reach. Needs Chromium (Debian's package `chromium`).
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from playwright.sync_api import Page, sync_playwright
from rich.table import Table

from common.chat.chat import generation_settings, stream_chat
from common.loading import load_model, load_tokenizer
from common.terminal import console

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["类型#裙*颜色#白色*风格#甜美", "类型#裤*裤型#阔腿裤*风格#潮流", "类型#上衣*颜色#黑色*图案#碎花"]
LIMIT = 300  # milliseconds
# Resolves with the milliseconds until the first column shows one more answer.
FIRST_TEXT = """before => new Promise(resolve => {
    const start = performance.now();
    const look = () => {
        const answers = document.querySelectorAll("#left [data-testid=bot]:not(:has(.note, .waiting))");
        if (answers.length > before && answers[answers.length - 1].innerText.trim()) {
            resolve(performance.now() - start);
        } else requestAnimationFrame(look);
    };
    look();
})"""


def ask(page: Page, question: str) -> float:
    """Milliseconds to the first text; returns when both columns have answered."""
    answers = page.locator("#left [data-testid=bot]:not(:has(.note, .waiting))")
    box = page.locator("#question textarea")
    box.fill(question)
    waiting = page.evaluate_handle(f"before => ({{time: ({FIRST_TEXT})(before)}})", answers.count())
    box.press("Enter")
    milliseconds = waiting.evaluate("started => started.time")
    page.locator("#stop[disabled]").wait_for()
    time.sleep(2)
    return milliseconds


def in_this_process(checkpoint: Path) -> list[float]:
    model, tokenizer = load_model("demo", ptuning_checkpoint=checkpoint), load_tokenizer("demo")
    found = []
    for question in QUESTIONS * 4:
        start = time.perf_counter()
        answer = stream_chat(model, tokenizer, question, **generation_settings(64, 0, 1))
        next(text for text in answer if text)
        found.append(1000 * (time.perf_counter() - start))
        answer.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "ptuning" / "output" / "adgen-demo-pt-32-2e-2")
    parser.add_argument("--pages", type=int, default=5, help="how often the page is opened anew")
    args = parser.parse_args()
    script = ["bash", str(ROOT / "ptuning" / "web_demo.sh"), "--temperature", "0"]
    environ = os.environ | {"CHECKPOINT": str(args.checkpoint)}
    server = subprocess.Popen(script, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True)
    fresh, warm = [], []
    try:
        url = next(line for line in server.stdout if "ready: " in line).split()[3]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            for _ in range(args.pages):
                page = browser.new_page()
                page.goto(url)
                page.locator("#left").wait_for()
                time.sleep(1)
                first, *others = [ask(page, question) for question in QUESTIONS]
                fresh.append(first)
                warm += others
                page.close()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    alone = in_this_process(args.checkpoint)
    table = Table(title="milliseconds to the first text", title_justify="left")
    for column in ("", "questions", "least", "median", "most", f"above {LIMIT}", "of the model alone"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in (("the model alone", alone), ("first of a fresh page", fresh), ("after it", warm)):
        middle = statistics.median(found)
        numbers = [f"{value:.0f}" for value in (min(found), middle, max(found))]
        late = sum(value > LIMIT for value in found)
        table.add_row(name, str(len(found)), *numbers, str(late), f"{middle / statistics.median(alone):.1f}x")
    console().print(table)


if __name__ == "__main__":
    main()
