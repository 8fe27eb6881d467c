"""Host memory and seconds of loading a model in 4 and 8 bit, and of a forward pass, beside 16 and 32 bit.

    python tests/bench/quantization.py --folder /tmp/bench-loading

The checkpoint is that of loading.py, a billion random float16 weights, made in --folder once, and beside it the same
weights packed in 4 bit as the original chatglm2-6b-int4 stores them. Each way is a process of its own. The peak is that
of its anonymous memory while it loads (RssAnon in /proc/self/status, without what the imports took): mapped files do
not count, for the page cache is not the process's. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import torch
from loading import make_checkpoint

from common.loading import load_model
from common.models.tensors import read_weights

WAYS = {  # name -> (folder, dtype, bits)
    "float16": ("chatglm2-6b", torch.float16, None),
    "float32": ("chatglm2-6b", torch.float32, None),
    "8 bit": ("chatglm2-6b", torch.float32, 8),
    "4 bit": ("chatglm2-6b", torch.float32, 4),
    "4 bit, of packed int4": ("chatglm2-6b-int4", torch.float32, 4),
}
TOKENS = 128


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(two columns a byte, scale of each row) as the original stores 4 bit."""
    scale = (weight.float().abs().amax(-1) / 7).half()
    numbers = (weight.float() / scale.float()[:, None]).round().clamp(-7, 7).to(torch.int8)
    return numbers[:, ::2] << 4 | numbers[:, 1::2] & 15, scale


def make_packed(source: Path, folder: Path) -> None:
    folder.mkdir()
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.bin")):
        for name, weight in read_weights(file).items():
            if ".layers." in name and weight.dim() == 2:
                weights[name], weights[f"{name}_scale"] = pack(weight)
            else:
                weights[name] = weight
    torch.save(weights, folder / "pytorch_model.bin")
    shutil.copy(source / "tokenizer.model", folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_bit": 4}))


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def run_way(way: str, folder: Path) -> None:
    """Prints seconds of loading, peak and rest of its memory in bytes, and seconds of a forward pass."""
    name, dtype, bits = WAYS[way]
    if bits:
        import bitsandbytes  # noqa: F401  (its import is not loading)
    before, peak, loaded = anonymous(), 0, Event()

    def watch() -> None:
        nonlocal peak
        while not loaded.wait(0.005):
            peak = max(peak, anonymous())

    watcher = Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load_model(folder / name, dtype, bits)
    seconds = time.perf_counter() - start
    loaded.set()
    watcher.join()
    rest = anonymous()
    forward = []
    if dtype == torch.float32:  # half precision is no way to compute on a CPU
        ids = torch.arange(TOKENS)[None]
        with torch.no_grad():
            for _ in range(3):
                start = time.perf_counter()
                model.train()(ids)  # as in training; for inference some CPUs have kernels in bfloat16
                forward.append(time.perf_counter() - start)
    print(json.dumps([seconds, peak - before, rest - before, min(forward, default=0)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-loading"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_way(args.way, args.folder)
    else:
        compare(args.folder.resolve())


def compare(place: Path) -> None:
    from rich.table import Table  # not in the processes that are measured

    from common.terminal import console

    source, packed = place / "chatglm2-6b", place / "chatglm2-6b-int4"
    if not source.exists():
        make_checkpoint(source)
    if not packed.exists():
        make_packed(source, packed)
    copy = sum(file.stat().st_size for file in source.glob("*.bin"))
    table = Table(title=f"in float16: {copy:,} bytes", title_justify="left")
    columns = ("", "load, s", "peak, GB", "of float16", "after, GB", f"{TOKENS} tokens, s", "of float32")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    seconds: dict[str, float] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--folder", str(place)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        loading, peak, rest, forward = json.loads(output.splitlines()[-1])
        seconds[way] = forward
        cells = [f"{loading:.1f}", f"{peak / 1e9:.2f}", f"{peak / copy:.2f}x", f"{rest / 1e9:.2f}"]
        timed = [f"{forward:.2f}", f"{forward / seconds['float32']:.2f}x"] if forward else ["", ""]
        table.add_row(way, *cells, *timed)
    console().print(table)


if __name__ == "__main__":
    main()
