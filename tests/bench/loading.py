"""Host memory and seconds of N processes that load the same model at once, beside the way of the official scripts.

    python tests/bench/loading.py --folder /tmp/bench-loading

The checkpoint has ChatGLM2's shape with a billion random float16 weights, in .bin shards of 500 MB with an index. It is
made in --folder once and kept there. The ranks are processes of their own that start together, load, touch every
weight, and hold the model until all have done so. Measured is the sum of their proportional set sizes (PSS in
/proc/PID/smaps_rollup): a page that n processes share counts 1/n in each. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from common.loading import load_model
from common.models.chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration
from common.models.registry import DEMOS
from common.models.tensors import read_weights

SHARD = 500e6  # bytes
SHAPE = {"hidden_size": 2048, "num_layers": 17, "num_attention_heads": 16, "ffn_hidden_size": 5504}
ALLOWED = 1.3  # copies of the weights, beside which each rank may hold 300 MB of its own


def empty_model() -> ChatGLMForConditionalGeneration:
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(ChatGLMConfig(**SHAPE, generation="chatglm2")).half()


def make_checkpoint(folder: Path) -> None:
    """As the original is stored: shards of .bin, an index, and its vocabulary, here the demo's."""
    folder.mkdir(parents=True)
    model = empty_model()
    model.config.save_pretrained(folder)
    shutil.copy(DEMOS["demo3"] / "tokenizer.model", folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, weight in model.state_dict().items():
        if size + weight.nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = torch.randn(weight.shape).mul_(0.02).half()
        size += weight.nbytes
    names = [f"pytorch_model-{number:05}-of-{len(shards):05}.bin" for number in range(1, len(shards) + 1)]
    weight_map = {}
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_safetensors(bin_folder: Path, folder: Path) -> None:
    """The same model as a checkpoint of safetensors."""
    folder.mkdir()
    weight_map = {}
    for file in sorted(bin_folder.glob("*.bin")):
        name, tensors = f"{file.stem}.safetensors", read_weights(file)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(bin_folder / name, folder)


def load_official(folder: Path) -> torch.nn.Module:
    """What transformers 4.27 does in every rank (low_cpu_mem_usage=False): a whole model, then shard after shard."""
    model = empty_model().to_empty(device="cpu")
    for file in sorted(folder.glob("*.bin")):
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=False)
    return model


def run_rank(way: str, folder: Path) -> None:
    """Loads, touches every weight, says how many seconds that took, and holds the model until its input ends."""
    start = time.perf_counter()
    if way != "imports":
        model = load_official(folder) if way == "official" else load_model(folder, torch.float16)
        for weight in model.parameters():
            weight.view(torch.int16).max()
    print(time.perf_counter() - start, flush=True)
    sys.stdin.read()


def pss(pid: int) -> int:
    """Bytes of a process; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def measure(way: str, folder: Path, ranks: int) -> tuple[float, int]:
    """Seconds of the slowest rank, without its imports, and the largest sum of the PSS of all."""
    command = [sys.executable, __file__, "--rank", way, "--folder", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        for _ in range(ranks)
    ]
    seconds: list[float] = []
    readers = [Thread(target=lambda rank=rank: seconds.append(float(rank.stdout.readline()))) for rank in processes]
    for reader in readers:
        reader.start()
    peak = 0
    while any(reader.is_alive() for reader in readers):
        peak = max(peak, sum(pss(process.pid) for process in processes))
        time.sleep(0.2)
    peak = max(peak, sum(pss(process.pid) for process in processes))
    for process in processes:
        process.communicate()
    if len(seconds) < ranks:
        raise SystemExit(f"{way}: {ranks - len(seconds)} of {ranks} ranks failed")
    return max(seconds), peak


def compare(place: Path, ranks: int, official_ranks: int) -> None:
    from rich.table import Table  # not in the ranks, which import no more than loading needs

    from common.terminal import console

    folder, safetensors = place / "chatglm2-6b", place / "chatglm2-6b-safetensors"
    if not folder.exists():
        make_checkpoint(folder)
    if not safetensors.exists():
        make_safetensors(folder, safetensors)

    copy = sum(weight.nbytes for weight in empty_model().parameters())
    table = Table(title=f"one copy: {copy:,} bytes", title_justify="left")
    beyond = f"MB a rank beyond {ALLOWED} copies"
    for column in ("", "ranks", "seconds", "peak PSS, GB", "of one copy", "MB a rank", beyond):
        table.add_column(column, justify="right" if column else "left")

    def add(title: str, way: str, model: Path, ranks: int) -> None:
        seconds, peak = measure(way, model, ranks)
        per_rank = [peak / ranks / 1e6, (peak - ALLOWED * copy) / ranks / 1e6]
        cells = [f"{ranks}", f"{seconds:.1f}", f"{peak / 1e9:.2f}", f"{peak / copy:.2f}"]
        table.add_row(title, *cells, *(f"{megabytes:,.0f}" for megabytes in per_rank))

    add("imports only", "imports", folder, ranks)
    add("ours, safetensors", "ours", safetensors, ranks)
    add("ours, .bin", "ours", folder, ranks)
    add("the official way", "official", folder, official_ranks)
    console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the two checkpoints")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--official-ranks", type=int, default=2, help="each holds a whole copy and a shard")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        run_rank(args.rank, args.folder)
    else:
        compare(args.folder.resolve(), args.ranks, args.official_ranks)


if __name__ == "__main__":
    main()
