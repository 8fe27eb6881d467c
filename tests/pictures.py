"""Takes the pictures of the README in headless Chromium: the report of a training, and the chat with its model.

    python tests/pictures.py --report OUTPUT_DIR/report.html --checkpoint OUTPUT_DIR

Writes report.png, report_zh.png, chat.png and chat_zh.png, each of at most LARGEST bytes. Needs Debian's packages
`chromium` and `fonts-wqy-microhei`, and requirements-web.txt for the chat.
"""

import argparse
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image  # a requirement of Gradio
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 150_000  # bytes of a picture
SIZE = {"width": 1200, "height": 1320}  # pixels of the report
CHAT_SIZE = {"width": 1200, "height": 720}
LANGUAGES = {"": "en-US", "_zh": "zh-CN"}
QUESTION = "类型#裙*颜色#白色*风格#甜美"
QUIET = 3000  # milliseconds without a change after which an answer is taken for complete
# Resolves when the page shows the question and its text has not changed for a while.
ANSWERED = """([question, quiet]) => new Promise(resolve => {
    let text = "", since = performance.now();
    const look = () => {
        const now = document.body.innerText;
        if (now !== text || !now.includes(question)) [text, since] = [now, performance.now()];
        if (performance.now() - since > quiet) resolve(); else setTimeout(look, 100);
    };
    look();
})"""


def save(page: Page, file: Path) -> None:
    """Writes what the window shows; with fewer colours if it is too large.

    Raises RuntimeError if 32 colours are too large too.
    """
    picture = page.screenshot()
    for colours in (256, 128, 64, 32):
        if len(picture) <= LARGEST:
            file.write_bytes(picture)
            print(f"{file}: {len(picture):,} bytes")
            return
        buffer = io.BytesIO()
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        image.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        picture = buffer.getvalue()
    raise RuntimeError(f"{file}: {len(picture):,} bytes; a smaller window is needed")


def take_report(browser: Browser, report: Path, to: Path) -> None:
    for suffix, language in LANGUAGES.items():
        page = browser.new_page(locale=language, viewport=SIZE)
        page.goto(report.resolve().as_uri())
        page.locator("#curves svg").first.wait_for()
        save(page, to / f"report{suffix}.png")
        page.context.close()


@contextmanager
def chat_of(checkpoint: Path) -> Iterator[str]:
    """The address of the chat with a trained model, which runs as long as the context."""
    command = [
        sys.executable,
        "common/chat/web_demo.py",
        "--checkpoint",
        str(checkpoint.resolve()),
        "--temperature",
        "0",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout
        ready = next((line for line in process.stdout if "ready:" in line), "")
        address = re.search(r"http://\S+", ready)
        if address is None:
            raise RuntimeError("the chat did not start")
        yield address[0]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def take_chat(browser: Browser, address: str, question: str, to: Path) -> None:
    for suffix, language in LANGUAGES.items():
        page = browser.new_page(locale=language, viewport=CHAT_SIZE)
        page.goto(address)
        box = page.locator("textarea:visible").first
        box.fill(question)
        box.press("Enter")
        page.evaluate(ANSWERED, [question, QUIET])
        save(page, to / f"chat{suffix}.png")
        page.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, help="report.html of a finished training")
    parser.add_argument("--checkpoint", type=Path, help="folder of a training, whose chat is started")
    parser.add_argument("--chat", help="address of a chat that runs already, instead of --checkpoint")
    parser.add_argument("--question", default=QUESTION, help="asked in the chat (%(default)s)")
    parser.add_argument("--to", type=Path, default=ROOT / "tests" / "pictures", help="folder (%(default)s)")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        if args.report:
            take_report(browser, args.report, args.to)
        if args.chat:
            take_chat(browser, args.chat, args.question, args.to)
        elif args.checkpoint:
            with chat_of(args.checkpoint) as address:
                take_chat(browser, address, args.question, args.to)
        browser.close()


if __name__ == "__main__":
    main()
