"""The items of a GPU's day that start with a model of ours, one process each: see gpu.sh.

gpu_items.py kernels | cudnn | parity DEMO | goldens | out-of-memory | plan KIND BITS | measure KIND BITS
"""

import collections
import json
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import gpu_model
import torch
from accelerate.utils import release_memory
from conftest import load_arrays, read_golden
from gpu import CUDA, DEVICE, say, steps_in_time
from gpu_model import (
    SHORTER,
    answer,
    clock,
    make_batch,
    make_model,
    new_method,
    on_device,
    optimizer_of,
    train_step,
)
from memory import make_model as write_model
from tiny_models import CHATGLM, CHATGLM2, CHATGLM3, Spec, write_checkpoint
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from common.arguments import DataArguments, LoraArguments, PrefixArguments
from common.data.collator import left_pad, train_batch
from common.data.dataset import prepare_dataset
from common.errors import UserError
from common.finetune import run
from common.flags import parse_arguments
from common.loading import load_tokenizer
from common.methods.lora import Lora
from common.methods.prefix import PTuning, load_prefix
from common.models.registry import open_model
from common.models.weights import load_base
from common.training.trainer import FinetuneTrainer

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = ("fmha", "flash", "cudnn", "attention", "sdpa", "softmax", "mha")


def kernels_of(work: Callable[[], object]) -> dict[str, float]:
    """Name -> milliseconds of the kernels of attention in a call, the longest first; on a CPU its operators."""
    work()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as recorded:
        work()
        gpu_model.synchronize()
    found = collections.Counter[str]()
    for event in recorded.key_averages():
        spent = event.self_device_time_total if CUDA else event.self_cpu_time_total
        name = event.key.lower().replace("log_softmax", "").replace("logsoftmax", "")  # those of the loss
        if spent and not name.startswith("autograd::") and any(word in name for word in KERNELS):
            found[event.key[:80]] += spent / 1000
    return {name: round(spent, 3) for name, spent in found.most_common(4)}


def training(kind: str, method: str, dtype: torch.dtype) -> Callable[[], None]:
    """Steps of two layers of the real width, with rows of different lengths, as the programs pad them."""
    model = new_method(method).attach(make_model(kind, None, dtype, layers=2)).train()
    batch, optimizer = make_batch(model.config, 4, 256 // SHORTER, 512 // SHORTER, pads=True), optimizer_of(model)
    return lambda: train_step(model, optimizer, batch)


def decoding(dtype: torch.dtype, first: bool, pads: bool) -> Callable[[], None]:
    """The pass over 8 questions, or the next token after them; ``pads``: they have different lengths."""
    model = make_model("chatglm3", None, dtype, layers=2).eval()
    prompts = [[5] * (128 // SHORTER - pads * index % 2) for index in range(8)]
    inputs = on_device(left_pad(prompts, 0))
    inputs = inputs if pads else {"input_ids": inputs["input_ids"]}

    @torch.no_grad()
    def work() -> None:
        mask = {} if first or not pads else {"attention_mask": torch.ones(8, cache.get_seq_length() + 1, device=DEVICE)}
        tokens = inputs if first else {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache, **mask}
        model(**tokens, use_cache=True)

    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    return work


def kernels() -> None:
    cases = {
        "train, right-padded": lambda dtype: training("chatglm3", "lora", dtype),
        "train with prefix": lambda dtype: training("chatglm3", "ptuning", dtype),
        "ChatGLM-6B, train": lambda dtype: training("chatglm", "lora", dtype),
        "prefill": lambda dtype: decoding(dtype, first=True, pads=False),
        "prefill with left pads": lambda dtype: decoding(dtype, first=True, pads=True),
        "decode": lambda dtype: decoding(dtype, first=False, pads=False),
        "decode with left pads": lambda dtype: decoding(dtype, first=False, pads=True),
    }
    for name, case in steps_in_time([(name, case) for name in DTYPES for case in cases], reserve=5):
        say(case=case, dtype=name, kernels=kernels_of(cases[case](DTYPES[name])))


def cudnn() -> None:
    """Steps and answers of lengths that come for the first time, without cuDNN's attention and with it."""
    model = new_method("lora").attach(make_model("chatglm3", None, gpu_model.half()))
    optimizer = optimizer_of(model)

    def train(length: int) -> None:
        model.train()
        train_step(model, optimizer, make_batch(model.config, 4, length // 3, length - length // 3, pads=True))

    def generate(length: int) -> None:
        model.eval()
        answer(model, 8, length, 32)

    train(50)
    generate(30)
    for way, on in steps_in_time([("not preferred", False), ("preferred", True)], reserve=60):
        torch.backends.cuda.enable_cudnn_sdp(on)
        for what, work, lengths in (
            ("a training step of 4 rows of up to 100 to 760 tokens", train, range(100, 768, 60)),
            ("32 tokens of 8 answers to 40 to 76 tokens", generate, range(40, 80, 12)),
        ):
            times = sorted(clock(partial(work, length)) for length in lengths)
            mean, chosen = sum(times) / len(times), list(kernels_of(partial(work, lengths[0])))[:2]
            say(cudnn=way, what=what, mean_ms=milliseconds(mean), most_ms=milliseconds(times[-1]), chosen=chosen)


def demo_batches(demo: str, count: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Training batches of 8 rows of the shipped data, and a batch of 8 questions."""
    columns = DataArguments(
        prompt_column="content", response_column="summary", max_source_length=64, max_target_length=64
    )
    tokenizer = load_tokenizer(demo)
    rows = prepare_dataset(columns, str(ROOT / "AdvertiseGen" / "dev.json"), tokenizer, "train").rows
    rows = [rows[index] for index in range(8 * count)]
    batches = [train_batch(rows[start : start + 8], tokenizer.pad_token_id) for start in range(0, len(rows), 8)]
    questions = [row["input_ids"][: row["labels"].count(-100)] for row in rows[:8]]
    return batches, left_pad(questions, tokenizer.pad_token_id)


def train_demo(
    demo: str, method: str, device: str, dtype: torch.dtype, bits: int | None, steps: int, start: dict[str, Tensor]
) -> tuple[list[float], Tensor]:
    """Losses of a few steps without dropout, and greedy ids of 8 answers. ``start``: new parameters; empty: filled."""
    torch.manual_seed(0)
    model = load_base(open_model(demo), dtype, bits, device)
    made = Lora(LoraArguments()) if method == "lora" else PTuning(PrefixArguments(pre_seq_len=16))
    model = made.attach(model)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):  # which each kind of device draws in its own way
            part.p = 0.0
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in trained.items():
        weight.data.copy_(start.setdefault(name, weight.detach().cpu().clone()))
    batches, questions = demo_batches(demo, steps)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    model.train()
    for batch in batches:
        moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        losses.append(train_step(model, optimizer, moved))
    model.eval()
    moved = {name: tensor.to(device) for name, tensor in questions.items()}
    with torch.no_grad():
        answers = model.generate(**moved, max_new_tokens=16, do_sample=False)
    return torch.stack(losses).tolist(), answers[:, moved["input_ids"].shape[1] :].cpu()


def parity(demo: str) -> None:
    """Losses and greedy answers of a demo beside those of a CPU in fp32 with the same bits."""
    expected: dict[tuple[str, int | None], tuple[list[float], Tensor]] = {}
    starts: dict[str, dict[str, Tensor]] = {"lora": {}, "ptuning": {}}
    ways = [("fp32", None), ("bf16", None), ("fp16", None), ("fp32", 4), ("bf16", 4), ("fp32", 8), ("bf16", 8)]
    steps = [(method, name, bits) for name, bits in ways for method in starts]
    for method, name, bits in steps_in_time(steps, reserve=8):
        if (method, bits) not in expected:
            expected[method, bits] = train_demo(demo, method, "cpu", torch.float32, bits, 5, starts[method])
        losses, answers = expected[method, bits]
        run = {"demo": demo, "method": method, "dtype": name, "bits": bits}
        try:
            here = train_demo(demo, method, DEVICE, DTYPES[name], bits, 5, starts[method])
        except (RuntimeError, NotImplementedError) as error:
            say(**run, equal_answers="", failed=str(error).splitlines()[0][:200])
            continue
        off = max(abs(mine / loss - 1) for mine, loss in zip(here[0], losses, strict=True))
        same = sum(map(torch.equal, answers, here[1])) if answers.shape == here[1].shape else 0
        say(**run, largest_loss_error=rounded(off), equal_answers=f"{same} of 8")


def milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 1)


def compare(model: PreTrainedModel, spec: Spec, arrays: dict[str, Tensor], case: str, name: str) -> tuple[float, float]:
    """Largest difference of the logits of real tokens, and the relative one of the loss; 0 if none is stored."""
    names = [name for name in ("input_ids", "labels", "attention_mask", "position_ids") if f"{case}/{name}" in arrays]
    batch = {name: arrays[f"{case}/{name}"] for name in names}
    real = torch.ones_like(batch["input_ids"]).bool()
    if spec is CHATGLM:  # its masks have four dimensions
        batch.pop("attention_mask", None)
        if case == "left_pad_batch":
            real = batch["input_ids"] != model.config.pad_token_id
            batch["attention_mask"] = real.long()
    else:
        real = batch["attention_mask"].bool()
    out, wanted = model(**batch), arrays[f"{name}/lg_cols"][real]
    logits = (out.logits.float()[real][:, arrays["cols"]] - wanted).abs().max().item()
    if spec is CHATGLM:
        loss = arrays[f"{name}/loss"].item() if f"{name}/loss" in arrays else None
    else:
        loss = read_golden(spec, "training.json").get(name, {}).get("loss")
    return logits, abs(out.loss.item() / loss - 1) if loss else 0.0


def compare_all(spec: Spec, folder: str, dtype: torch.dtype) -> tuple[float, float]:
    """The largest differences over the cases of one model."""
    first = spec is CHATGLM
    cases = ["train_64_64", "left_pad_batch"] if first else ["train_b4", "train_rounds", "leftpad_batch"]
    arrays = {name: array.to(DEVICE) for name, array in load_arrays(spec.goldens / "model.npz").items()}
    model = spec.model_class.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    found = [compare(model, spec, arrays, case, case) for case in cases]
    load_prefix(model, spec.goldens / ("prefix16-plain" if first else "prefix_proj0"))
    prefixed = "prefix16_plain" if first else "prefix_proj0_train_b4"
    found.append(compare(model.eval(), spec, arrays, cases[0], prefixed))
    return max(logits for logits, _ in found), max(loss for _, loss in found)


@torch.no_grad()
def goldens() -> None:
    """The numbers of the original code, computed by the tiny models of tests/goldens on the device."""
    for spec in (CHATGLM, CHATGLM2, CHATGLM3):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(spec, Path(folder))
            for name in steps_in_time(DTYPES, reserve=4):
                logits, loss = compare_all(spec, folder, DTYPES[name])
                say(model=spec.name, dtype=name, largest_logit_error=rounded(logits), largest_loss_error=rounded(loss))


def rounded(value: float) -> float:
    return float(f"{value:.2g}")


def both(toggle: str, without: Callable[[], object], with_it: Callable[[], object], **more: Any) -> None:
    """Says the median of steps without and with something, taken in turn."""
    without(), with_it()
    times = [(clock(without), clock(with_it)) for _ in range(7)]
    medians = [sorted(times)[3] for times in zip(*times, strict=True)]
    say(toggle=toggle, without_ms=milliseconds(medians[0]), with_ms=milliseconds(medians[1]), **more)


def scaled_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], scaler: Any
) -> None:
    loss = model(**batch, loss_only=True, use_cache=False).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def toggle(model: PreTrainedModel) -> None:
    """ChatGLM3-6B in half precision with LoRA, 4 rows of up to 768 tokens: what the programs leave out, put back."""
    model.train()
    gpu_model.set_checkpointing(model, None, False)
    optimizer, pad = optimizer_of(model), model.config.pad_token_id
    batch = make_batch(model.config, 4, 256 // SHORTER, 512 // SHORTER, pads=True)
    step = partial(train_step, model, optimizer, batch)
    masked = batch | {"attention_mask": batch["input_ids"] != pad}
    searched = {name: tensor for name, tensor in batch.items() if name != "label_positions"}

    def four(work: Callable[[], None], then: Callable[[], object] = lambda: None) -> None:
        for _ in range(4):
            work()
            then()

    def count() -> int:
        return int((batch["input_ids"] != pad).sum())

    def scaler() -> None:
        for weight in model.parameters():
            weight.data = weight.data if weight.requires_grad else weight.data.half()
        off, on = (
            partial(scaled_step, model, optimizer, batch, torch.amp.GradScaler(DEVICE, enabled=way))
            for way in (False, True)
        )
        both("a loss scaler, base in fp16", off, on)

    search = partial(train_step, model, optimizer, searched)
    toggles: dict[str, Callable[[], None]] = {
        "mask": lambda: both("an attention mask", step, partial(train_step, model, optimizer, masked)),
        "labels": lambda: both("4 x a search for the labels", partial(four, step), partial(four, search)),
        "tokens": lambda: both("4 x tokens counted after it", partial(four, step), partial(four, step, count)),
        "scaler": scaler,
    }
    for name in steps_in_time(toggles, reserve=14):
        toggles[name]()


def train_rows(model: Path, output_dir: Path, flags: str) -> list[float]:
    """The losses of three steps with LoRA in float32, of 32 rows of up to 512 tokens."""
    release_memory()  # of the training before
    source, target = 256 // SHORTER, 256 // SHORTER
    given = f"""--do_train --model_name_or_path {model} --train_file {model}/rows.jsonl --output_dir {output_dir}
    --prompt_column content --response_column summary --max_source_length {source} --max_target_length {target}
    --max_steps 3 --logging_steps 1 --learning_rate 1e-3 --precision fp32 --lora_dropout 0 --report_to none
    --save_strategy no --disable_tqdm true --activation_checkpointing false {flags}"""
    model_args, lora_args, *others = parse_arguments(LoraArguments, given.split())
    run(Lora(lora_args), model_args, *others)
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [round(entry["loss"], 6) for entry in history if "loss" in entry]


def limit_memory(peak: int) -> None:
    """Leaves room for a few rows; the plan looks at all of the card. A CPU only seems to run out."""
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(2.5 * peak / torch.cuda.mem_get_info()[1])
        return
    loss = FinetuneTrainer.compute_loss

    def compute_loss(trainer: FinetuneTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return loss(trainer, model, inputs, *args, **kwargs)

    FinetuneTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def out_of_memory() -> None:
    """Memory runs out in a batch that was chosen: the losses must be those of small batches. A given one is refused."""
    shape = (64, 2, 2, 256, 3584) if gpu_model.TINY else (1024, 16, 8, 4096, 3584)  # 0.25 billion parameters
    rows = [
        {"content": f"类型#裙*数量#{i}*颜色#红色" * (8 + i % 40), "summary": f"第{i}条红色的裙子，" * (20 + i % 40)}
        for i in range(96)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model("chatglm3", folder / "chatglm3", shape, DEVICE)
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (model / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        small = train_rows(model, folder / "1", "--per_device_train_batch_size 1 --gradient_accumulation_steps 32")
        peak = torch.cuda.max_memory_reserved() if CUDA else 0
        limit_memory(peak)
        halved = train_rows(model, folder / "2", "--rows_per_step 32")
        off = max(abs(mine / loss - 1) for mine, loss in zip(halved, small, strict=True))
        peak_halved = torch.cuda.max_memory_reserved() if CUDA else 0
        say(small=small, halved=halved, largest_difference=rounded(off), peak_small=peak, peak_halved=peak_halved)
        try:
            train_rows(model, folder / "3", "--per_device_train_batch_size 32")
            say(sentence="", failed="a batch of 32 rows went through")
        except UserError as error:
            say(sentence=str(error))
    assert off < 1e-4, "the losses differ"


def main() -> None:
    what, *words = sys.argv[1:]
    random.seed(0)
    if what in ("plan", "measure"):
        kind, bits = words[0], int(words[1])
        made = vars(gpu_model)[what](kind, None if bits == 16 else bits)
        if (what, kind, bits) == ("measure", "chatglm3", 16):
            toggle(made)
    else:
        items = {"kernels": kernels, "cudnn": cudnn, "parity": parity, "goldens": goldens}
        (items | {"out-of-memory": out_of_memory})[what](*words)


if __name__ == "__main__":
    main()
