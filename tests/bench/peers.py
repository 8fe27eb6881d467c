"""LLaMA-Factory, ms-swift and TRL beside ours: whole programs in turn, equal settings, one thread, CPU seconds.

    LLAMAFACTORY_PYTHON=… SWIFT_PYTHON=… TRL_PYTHON=… python tests/bench/peers.py [--data DEV.json] [WORK...]

The only common ground is GLM-4's shape by LoRA: the models of ChatGLM do not run in the others. A variable is the
Python of an environment with torch 2.13 and LLaMA-Factory 0.9.5 (with jieba, nltk and rouge_chinese), ms-swift 4.6.0,
or TRL 1.16.0 and PEFT; what has none is left out, and named. Nothing of theirs is here.

89.1 million random weights in float32, LoRA of rank 8 on q, k, v and o, batches of 4, no activation checkpointing, a
tokenizer made of the rows. CPU seconds are those of all processes of a command. A ratio: ours by the best other.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from official import run_whole
from peft import LoraConfig, get_peft_model
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from common.terminal import console

CLOCK = Path(__file__).with_name("peers_clock.py")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
SPECIALS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    **{"vocab_size": 65024, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 64},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192},
}
EXPRESSION = (  # as in GLM-4's tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS = 3000  # a row of AdvertiseGen has about as many tokens as GLM-4's tokenizer makes of it
STEPS = 11  # 10 count
ROWS = {"train": 1000, "answers": 32, "many": 20_000, "wrong": 1000}


class Program(NamedTuple):
    variable: str  # its Python; "" is this one
    train: str
    answers: str
    help: str


SHARED = """--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --max_steps {steps} --learning_rate 5e-5
--logging_steps 1 --save_strategy no --report_to none --output_dir {folder}/out"""
FACTORY = """{bin}/llamafactory-cli train --stage sft --finetuning_type lora --model_name_or_path {model}
--template glm4 --dataset_dir {folder} --cutoff_len 128 --overwrite_cache true
--report_to none --output_dir {folder}/out"""
SWIFT = "--model {model} --model_type glm4 --template glm4 --torch_dtype float32 --max_length 128"
PROGRAMS = {
    "ours": Program(
        "",
        """env MODEL={model} TRAIN_FILE={folder}/{rows}.json CONVERSATION_COLUMN=messages MAX_STEPS={steps} EVAL_STEPS=0
        BATCH_SIZE=4 GRAD_ACCUM=1 MAX_SOURCE_LENGTH=64 MAX_TARGET_LENGTH=64 GRADIENT_CHECKPOINTING=false
        QUANTIZATION_BIT= PROBE_FILE= LORA_TARGET=q_proj,k_proj,v_proj,o_proj OUTPUT_DIR={folder}/out
        bash {root}/lora/train.sh --do_predict false --evaluate_base false --logging_steps 1 --save_strategy no""",
        """env CHECKPOINT={adapter} MODEL={model} TEST_FILE={folder}/answers.json CONVERSATION_COLUMN=messages
        MAX_SOURCE_LENGTH=64 MAX_TARGET_LENGTH=64 EVAL_BATCH_SIZE=16 OUTPUT_DIR={folder}/out
        bash {root}/lora/evaluate.sh --max_new_tokens 64""",
        "bash {root}/lora/train.sh --help",
    ),
    "LLaMA-Factory": Program(
        "LLAMAFACTORY_PYTHON",
        FACTORY
        + """ --do_train --dataset {rows} --lora_rank 8 --lora_alpha 32 --lora_dropout 0.1
        --lora_target q_proj,k_proj,v_proj,o_proj --disable_gradient_checkpointing true """
        + SHARED,
        FACTORY
        + """ --do_predict --predict_with_generate --eval_dataset answers --adapter_name_or_path {adapter}
        --per_device_eval_batch_size 16 --max_new_tokens 64 --do_sample false""",
        "{bin}/llamafactory-cli train --help",
    ),
    "ms-swift": Program(
        "SWIFT_PYTHON",
        "{bin}/swift sft "
        + SWIFT
        + """ --truncation_strategy right --dataset {folder}/{rows}.json --split_dataset_ratio 0 --tuner_type lora
        --lora_rank 8 --lora_alpha 32 --lora_dropout 0.1 --target_modules q_proj k_proj v_proj o_proj
        --gradient_checkpointing false --dataloader_num_workers 0 """
        + SHARED,
        "{bin}/swift infer "
        + SWIFT
        + """ --adapters {adapter} --load_args false --val_dataset {folder}/answers.json --max_batch_size 16
        --max_new_tokens 64 --temperature 0 --infer_backend transformers --result_path {folder}/out/answers.jsonl""",
        "{bin}/swift sft --help",
    ),
    "TRL": Program(
        "TRL_PYTHON",
        """{bin}/trl sft --model_name_or_path {model} --dataset_name {folder}/pairs/{rows} --use_peft --lora_r 8
        --lora_alpha 32 --lora_dropout 0.1 --lora_target_modules q_proj k_proj v_proj o_proj --max_length 128
        --dtype float32 --bf16 false --gradient_checkpointing false """
        + SHARED,
        "",
        "{bin}/trl sft --help",
    ),
}


MEASURES = {  # work -> {measure: what it is}
    "steps": {
        "step": "a step of 4 rows, CPU s",
        "start": "from the command to the end of step 1, CPU s",
        "memory": "peak memory, GB",
        "positions": "positions of a batch",
        "labels": "labels of a batch",
    },
    "answers": {
        "answers": "answers of 64 tokens, rows a CPU s",
        "evaluation": "the whole evaluation of 32 rows, CPU s",
    },
    "encoding": {"encoding": "20,000 rows encoded, rows a CPU s"},
    "help": {"help": "--help, CPU s"},
    "wrong": {"wrong": "rows without the column, CPU s", "lines": "lines that it prints"},
}
RATES = {"answers", "encoding"}  # more is better
NO_RACE = {"positions", "labels"}


def make_model(folder: Path, rows: list[dict]) -> None:
    """A random GLM-4 with a tokenizer of the rows, and beside it a random adapter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(EXPRESSION), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((row["content"] + row["summary"] for row in rows), trainer)
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    ends = {"pad_token_id": fast.pad_token_id, "eos_token_id": fast.pad_token_id}
    model = GlmForCausalLM(GlmConfig(**SIZES, **ends, attention_bias=True))
    model.save_pretrained(folder / "model")
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=list(LAYERS), init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")


def write_rows(folder: Path, rows: list[dict]) -> None:
    """The same rows in the forms that the programs read; the 20,000 are the given ones with numbers."""
    datasets = {}
    for name, count in ROWS.items():
        column = "mesages" if name == "wrong" else "messages"
        chats, pairs = [], []
        for index in range(count):
            row, again = rows[index % len(rows)], index // len(rows)
            question = {"role": "user", "content": row["content"] + f"*款号#{again}" * (again > 0)}
            answer = {"role": "assistant", "content": row["summary"] + f"第{again}款" * (again > 0)}
            chats.append({column: [question, answer]})
            pairs.append({"prompts" if name == "wrong" else "prompt": [question], "completion": [answer]})
        (folder / "pairs" / name).mkdir(parents=True)
        for file, lines in ((f"{name}.json", chats), (f"pairs/{name}/train.json", pairs)):
            (folder / file).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        datasets[name] = {"file_name": f"{name}.json", "formatting": "sharegpt", "tags": tags}
        datasets[name]["columns"] = {"messages": "messages"}
    (folder / "dataset_info.json").write_text(json.dumps(datasets))


def run(name: str, command: str, folder: Path, clock: bool = True, **values: object) -> tuple[dict, str]:
    """What the clock noted of one program, with the CPU seconds of all of it, and what it printed."""
    record, log = folder / "record", folder / "log"
    record.unlink(missing_ok=True)
    for made in ("out", "hf", "cache"):
        shutil.rmtree(folder / made, ignore_errors=True)
    python = Path(os.environ[variable] if (variable := PROGRAMS[name].variable) else sys.executable)
    places = {"folder": folder, "model": folder / "model", "adapter": folder / "adapter", "root": ROOT}
    words = command.format(bin=python.parent, **places, **values).split()
    environment = {"CHATGLM_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"), "PEERS_RECORD": str(record)}
    environment |= {"MODELSCOPE_CACHE": str(folder / "hf"), "USE_HF": "1"}
    environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "VIRTUAL_ENV": str(python.parent.parent)}
    if clock:
        environment["PYTHONPATH"] = str(folder / "clock")
    code, seconds, memory = run_whole(words, folder, log, environment)
    notes = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return {"code": code, "seconds": seconds, "memory": memory, "notes": notes}, log.read_text(errors="replace")


def measure(work: str, name: str, folder: Path) -> dict[str, float]:
    """The measures of one run. Ends this program if that run did not do its work."""
    program, printed = PROGRAMS[name], ""
    if work == "help":
        found, printed = run(name, program.help, folder, clock=False)
        return {"help": found["seconds"]}
    if work == "wrong":
        found, printed = run(name, program.train, folder, clock=False, rows="wrong", steps=1)
        return {"wrong": found["seconds"], "lines": len(printed.splitlines())}
    command = program.answers if work == "answers" else program.train
    rows, steps = {"steps": ("train", STEPS), "encoding": ("many", 1), "answers": ("answers", 1)}[work]
    found, printed = run(name, command, folder, rows=rows, steps=steps)
    notes = {what: [note[1:] for note in found["notes"] if note[0] == what] for what, *_ in found["notes"]}
    if found["code"] or not notes.get("answers" if work == "answers" else "step"):
        sys.exit(f"{name}, {work}: it ended with {found['code']}:\n{printed[-3000:]}")
    if work == "answers":
        answered = sum(shape[0] for *_, shape in notes["answers"])
        return {"answers": answered / computed(notes["answers"]), "evaluation": found["seconds"]}
    if work == "encoding":
        return {"encoding": ROWS["many"] / computed(notes["encoding"])}
    ends = [after for _, after, _ in notes["step"]]
    sizes = [size for *_, size in notes["batch"][1:]]
    return {
        "step": statistics.median(after - before for before, after in zip(ends, ends[1:], strict=False)),
        "start": ends[0],
        "memory": found["memory"] / 1e9,
        "positions": statistics.mean(positions for positions, _ in sizes),
        "labels": statistics.mean(labels for _, labels in sizes),
    }


def computed(notes: list) -> float:
    """CPU seconds within the noted calls."""
    return sum(after - before for before, after, _ in notes)


def add_row(table: Table, measure: str, what: str, found: dict[str, list[float]]) -> None:
    """Adds the medians of the programs, and ours by the best other with the least and the most of a round."""
    cells = [f"{statistics.median(found[name]):,.2f}" if name in found else "" for name in PROGRAMS]
    others = [name for name in found if name != "ours"]
    if measure in NO_RACE or not others:
        table.add_row(what, *cells)
        return
    choose = max if measure in RATES else min
    best = choose(others, key=lambda name: statistics.median(found[name]))
    ratio = statistics.median(found["ours"]) / statistics.median(found[best])
    rounds = [own / other for own, other in zip(found["ours"], found[best], strict=True)]
    table.add_row(what, *cells, f"{ratio:.2f}x", f"{min(rounds):.2f}x", f"{max(rounds):.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"{', '.join(MEASURES)}; default: all")
    parser.add_argument("--data", default=str(ROOT / "AdvertiseGen/train.json"), help="lines of content and summary")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    set_up = [name for name, program in PROGRAMS.items() if not program.variable or program.variable in os.environ]
    for name in PROGRAMS.keys() - set_up:
        print(f"{name}: left out, because {PROGRAMS[name].variable} is not set")
    table = Table("", *PROGRAMS, "ours / best", "least", "most")
    with tempfile.TemporaryDirectory(prefix="peers") as temporary:
        folder = Path(temporary)
        with open(args.data, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        make_model(folder, rows)
        write_rows(folder, rows)
        (folder / "clock").mkdir()
        shutil.copy(CLOCK, folder / "clock" / "sitecustomize.py")
        for work, measures in MEASURES.items():
            if args.works and work not in args.works:
                continue
            found: dict[str, dict[str, list[float]]] = {each: {} for each in measures}
            for _ in range(args.rounds):
                for name in set_up:
                    if work == "answers" and not PROGRAMS[name].answers:
                        continue
                    for each, value in measure(work, name, folder).items():
                        found[each].setdefault(name, []).append(value)
                    print(work, name, {each: found[each][name][-1] for each in measures}, flush=True)
            for each, what in measures.items():
                add_row(table, each, what, found[each])
    console().print(table)


if __name__ == "__main__":
    main()
