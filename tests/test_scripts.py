"""The scripts as a user types them, on the demo models. Every train.sh and evaluate.sh runs in processes of its own."""

import io
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shell import ROOT, bash, commands_of, environment, run_here, run_program
from transformers import AutoTokenizer, GlmForCausalLM

from common.chat.chat import generation_settings, stream_chat
from common.loading import load_model, load_tokenizer

METHODS = ("ptuning", "lora", "full")


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def predictions(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "generated_predictions.txt").read_text().splitlines()]


def check_same_answers(first: list[dict[str, str]], second: list[dict[str, str]]) -> None:
    """To the same 24 questions, up to one: other rows share a batch, which changes the last digits."""
    assert len(first) == len(second) == 24
    assert [row["labels"] for row in first] == [row["labels"] for row in second]
    assert sum(one == other for one, other in zip(first, second, strict=True)) >= 23


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The scripts in a folder of their own, with no training yet."""
    root = tmp_path_factory.mktemp("house")
    for name in ("common", "AdvertiseGen"):
        (root / name).symlink_to(ROOT / name)
    for method in METHODS:
        shutil.copytree(ROOT / method, root / method, ignore=shutil.ignore_patterns("output", "__pycache__"))
    return root


JOBS: dict[str, tuple[str, list[str], dict[str, str]]] = {  # folder of the result -> script, flags, variables
    "ptuning/output/adgen-demo-pt-32-2e-2": (
        "ptuning/train.sh",
        ["--max_predict_samples", "24", "--max_eval_samples", "24"],
        {"MAX_STEPS": "32", "NUM_PROCESSES": ""},
    ),
    "lora/output/adgen-demo3-lora-8-5e-3": (
        "lora/train.sh",
        ["--max_predict_samples", "24", "--max_eval_samples", "24"],
        {"MODEL": "demo3", "MAX_STEPS": "12", "BATCH_SIZE": "8", "NUM_PROCESSES": "2"},
    ),
    "full/output/adgen-demo-full-1e-3": (
        "full/train.sh",
        ["--save_steps", "4"],
        {"MAX_STEPS": "4", "BATCH_SIZE": "4", "VALIDATION_FILE": "few.json"},
    ),
}
PREFIX, ADAPTER, FULL = JOBS


@pytest.fixture(scope="module")
def trained(house) -> dict[str, str]:
    """Trains with every method at once on an empty cache. Result folder -> what its script said."""
    rows = (house / "AdvertiseGen" / "dev.json").read_text().splitlines(keepends=True)
    (house / "few.json").write_text("".join(rows[:8]))
    jobs = {}
    for folder, (script, flags, variables) in JOBS.items():
        environ = environment(CHATGLM_CACHE=str(house / "cache"), **{"VALIDATION_FILE": ""} | variables)
        command = ["bash", str(house / script), *flags]
        with open(house / f"{folder.replace('/', '-')}.log", "wb") as log:
            jobs[folder] = subprocess.Popen(command, cwd=house, env=environ, stdout=log, stderr=subprocess.STDOUT)
    codes = [job.wait(timeout=600) for job in jobs.values()]
    said = {folder: (house / f"{folder.replace('/', '-')}.log").read_text() for folder in jobs}
    assert codes == [0] * len(jobs), "\n".join(said.values())
    return said


def test_the_demo_learns_the_advertising_style(house, trained):
    """In an eighth of the steps that `bash ptuning/train.sh` takes."""
    scores = read(house / PREFIX, "predict_results.json")
    assert scores["predict_samples"] == 24
    assert scores["predict_rouge-l"] >= 1.5 * scores["predict_base_rouge-l"]
    assert scores["predict_bleu-4"] > scores["predict_base_bleu-4"]
    for part in ("training finished", "tokens/s", "samples/s", "peak host memory", "tuned / base", "ROUGE-L"):
        assert part in trained[PREFIX]


def test_trainings_that_start_at_once_on_an_empty_cache_share_it(house, trained):
    """tests/bench/launches.py does the same with sixteen."""
    said = [re.findall(r"^train: .* rows tokenized", text, re.MULTILINE) for text in trained.values()]
    of_ptuning, of_lora, of_full = said
    assert len(of_ptuning + of_full) == len(of_lora) == 1  # the other training of the demo found it in the cache


def test_lora_learns_the_advertising_style(house, trained):
    """In two processes."""
    scores = read(house / ADAPTER, "predict_results.json")
    assert scores["predict_samples"] == 24
    assert scores["predict_rouge-l"] >= 1.5 * scores["predict_base_rouge-l"]
    assert read(house / ADAPTER, "run_settings.json")["rows_per_step"] == 16
    assert "LoRA" in trained[ADAPTER]
    weights = {file.name for file in (house / ADAPTER).iterdir() if file.suffix in (".bin", ".safetensors")}
    assert weights == {"adapter_model.safetensors", "training_args.bin"}


def test_every_weight_is_trained_and_scored_beside_the_base(house, trained):
    """train.sh, and after it evaluate_finetune.sh on what was saved."""
    scores = read(house / FULL, "predict_results.json")
    assert scores["predict_samples"] == 8 and scores["predict_rouge-l"] != scores["predict_base_rouge-l"]
    assert "tuned / base" in trained[FULL]
    for folder in (house / FULL, house / FULL / "checkpoint-4"):  # each is a model of its own
        assert {"config.json", "model.safetensors", "ice_text.model"} <= {file.name for file in folder.iterdir()}


def test_evaluate_without_variables_repeats_the_answers_of_the_newest_training(house, trained):
    before = predictions(house / PREFIX)
    said = bash("ptuning/evaluate.sh", "--max_predict_samples", "24", root=house)
    assert f"newest training: {house / PREFIX}" in said.stderr
    check_same_answers(before, predictions(house / PREFIX))


def test_one_process_answers_as_two_did(house, trained, tmp_path):
    variables = {"CHECKPOINT": str(house / ADAPTER), "OUTPUT_DIR": str(tmp_path)}
    run_here("lora/evaluate.sh", "--max_predict_samples", "24", root=house, **variables)
    check_same_answers(predictions(house / ADAPTER), predictions(tmp_path))
    before, after = (read(folder, "predict_results.json") for folder in (house / ADAPTER, tmp_path))
    assert after["predict_rouge-l"] == pytest.approx(before["predict_rouge-l"], abs=0.5)


def test_the_chat_demo_answers_and_remembers(house, trained):
    question = "类型#裙*颜色#白色"
    stdin = f"{question}\n\nclear\n{question}\nstop\n"
    said = bash("ptuning/cli_demo.sh", "--temperature", "0", root=house, stdin=stdin).stdout
    answers = [line.removeprefix("ChatGLM：") for line in said.splitlines() if line.startswith("ChatGLM：")]
    assert len(answers) == 2
    assert len(answers[0]) > 20
    assert answers[0] == answers[1]  # greedy, and the conversation was forgotten


def test_a_merged_adapter_answers_as_the_adapter_does(house, trained, monkeypatch, capsys):
    run_here("lora/merge.sh", "--dtype", "float32", root=house)
    merged, question = house / ADAPTER / "merged", "类型#裙*颜色#白色*风格#甜美"
    *_, answer = stream_chat(load_model(merged), load_tokenizer(merged), question, **generation_settings(512, 0, 1))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\nstop\n"))
    run_here("lora/cli_demo.sh", "--temperature", "0", root=house)
    assert f"ChatGLM：{answer}\n" in capsys.readouterr().out
    assert len(answer) > 20


def test_an_exported_adapter_answers_in_plain_transformers_as_the_merged_one(house, trained):
    run_here("lora/export.sh", DTYPE="float32", root=house)
    tokenizer = AutoTokenizer.from_pretrained(house / ADAPTER / "glm")
    exported = GlmForCausalLM.from_pretrained(house / ADAPTER / "glm")
    messages = [{"role": "user", "content": "类型#裙*颜色#白色*风格#甜美"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = exported.generate(**asked, do_sample=False, max_new_tokens=512)[0, asked["input_ids"].shape[1] :]
    model, own = load_model("demo3", adapter=house / ADAPTER), load_tokenizer("demo3")
    *_, expected = stream_chat(model, own, messages[0]["content"], **generation_settings(512, 0, 1))
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == expected


def test_conversations_train_and_evaluate(tmp_path):
    variables = {"OUTPUT_DIR": str(tmp_path), "MAX_STEPS": "2", "BATCH_SIZE": "4", "EVAL_STEPS": "0"}
    run_here("ptuning/train_chat.sh", "--max_predict_samples", "8", **variables)
    assert len(predictions(tmp_path)) == 8
    assert read(tmp_path, "run_settings.json")["test_file"].endswith("/AdvertiseGen/dev_chat.json")


def test_conversations_with_tools_train(tmp_path):
    """Every answer of a conversation is asked for: calls of tools too."""
    variables = {
        "OUTPUT_DIR": str(tmp_path),
        "MAX_STEPS": "2",
        "BATCH_SIZE": "4",
        "MAX_TARGET_LENGTH": "64",
        "EVAL_STEPS": "0",
    }
    run_here("lora/train_chat.sh", "--max_predict_samples", "8", **variables)
    rows = predictions(tmp_path)
    assert len(rows) == 8
    assert any("tool_call(" in row["labels"] for row in rows)
    assert read(tmp_path, "run_settings.json")["test_file"].endswith("/AdvertiseGen/dev_tools.json")


def test_plain_text_prepared_ahead_trains_as_a_language_model(tmp_path):
    """common/preprocess.sh names the length of the blocks differently; evaluate.sh finds the loss of the training."""
    shards, output, again = tmp_path / "shards", tmp_path / "out", tmp_path / "again"
    run_here("common/preprocess.sh", "--num_workers", "1", TEXT_COLUMN="summary", OUTPUT_DIR=str(shards))
    variables = {"TRAIN_DATASETS": str(shards), "OUTPUT_DIR": str(output), "MAX_STEPS": "8", "BATCH_SIZE": "8"}
    run_here("lora/train_text.sh", "--max_eval_samples", "40", **variables)
    settings = read(output, "run_settings.json")
    assert (settings["train_file"], settings["train_datasets"]) == ([], str(shards))
    results = read(output, "eval_results.json")
    assert results["eval_perplexity"] < results["eval_base_perplexity"]
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    variables = {"CHECKPOINT": str(output), "OUTPUT_DIR": str(again), "EVAL_BATCH_SIZE": "50"}
    run_here("lora/evaluate.sh", "--max_eval_samples", "40", **variables)
    assert read(again, "eval_results.json")["eval_loss"] == pytest.approx(results["eval_loss"])


OFFICIAL_TRAIN = """CUDA_VISIBLE_DEVICES=0 python3 main.py
--do_train --train_file {data}/train.json --validation_file {data}/dev.json
--prompt_column content --response_column summary --overwrite_cache --model_name_or_path {model}
--output_dir {output} --overwrite_output_dir --max_source_length 64 --max_target_length 64
--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16
--predict_with_generate --max_steps 1 --logging_steps 10 --save_steps 1000 --learning_rate 2e-2 --pre_seq_len 128
--quantization_bit 4"""
OFFICIAL_EVALUATE = """CUDA_VISIBLE_DEVICES=0 python3 main.py
--do_predict --validation_file {data}/few.json --test_file {data}/few.json --overwrite_cache --prompt_column content
--response_column summary --model_name_or_path {model} --ptuning_checkpoint {output}/checkpoint-1
--output_dir {output} --overwrite_output_dir --max_source_length 64 --max_target_length 64
--per_device_eval_batch_size 1 --predict_with_generate --pre_seq_len 128 --quantization_bit 4"""


def test_the_official_commands_run_unchanged(tmp_path, demo_folder, monkeypatch):
    """The first is typed; the second runs in this process."""
    data = tmp_path / "data"
    shutil.copytree(ROOT / "AdvertiseGen", data)
    (data / "few.json").write_text("".join((data / "dev.json").read_text().splitlines(keepends=True)[:3]))
    train, evaluate = (
        command.format(data=data, model=demo_folder, output=tmp_path / "output").replace("\n", " ")
        for command in (OFFICIAL_TRAIN, OFFICIAL_EVALUATE)
    )
    folder = ROOT / "ptuning"
    done = subprocess.run(["bash", "-c", train], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)
    assert run_program(shlex.split(evaluate)[2:]) == 0
    assert len(predictions(tmp_path / "output")) == 3


def errors_of(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]


def test_bad_input_is_said_once_for_all_processes(tmp_path):
    variables = {"NUM_PROCESSES": "2", "OUTPUT_DIR": str(tmp_path), "TRAIN_FILE": "nowhere.json"}
    done = bash("ptuning/train.sh", check=False, **variables)
    assert done.returncode == 2
    assert errors_of(done.stderr) == [f"no data file nowhere.json (looked in {ROOT})."]


def test_bad_input_gives_one_sentence_and_exit_code_2(capsys):
    assert run_here("ptuning/train.sh", check=False, OUTPUT_DIR="/proc/out") == 2
    (error,) = errors_of(capsys.readouterr().err)
    assert "can't write to the output folder /proc/out" in error


def test_a_full_disk_costs_checkpoints_or_ends_with_one_sentence_and_exit_code_3(tmp_path, capsys):
    """A small file system: room for one checkpoint and the result, then for none; mounting one takes root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        flags = ["--do_predict", "false", "--save_steps", "1", "--max_train_samples", "16", "--report_to", "none"]
        variables = {"OUTPUT_DIR": str(disk / "out"), "MAX_STEPS": "6", "BATCH_SIZE": "2", "EVAL_STEPS": "0"}
        assert run_here("ptuning/train.sh", *flags, check=False, **variables) == 0
        said = capsys.readouterr().err
        assert re.search(r"warning: checkpoint-6 is not saved .*; checkpoint-1 stays the newest", said)
        assert "Traceback" not in said
        whole = {path.name: path.read_bytes() for path in (disk / "out").glob("*.bin")}
        free = shutil.disk_usage(disk).free
        (disk / "other").write_bytes(bytes(max(0, free - 2**16)))
        variables["MAX_STEPS"] = "7"
        assert run_here("ptuning/train.sh", *flags, check=False, **variables) == 3
        (error,) = errors_of(capsys.readouterr().err)
        assert re.search(
            rf"^on the disk of {disk / 'out'}, [\d.,]+ MB are free and [\d.,]+ MB are needed: make room", error
        )
        assert {path.name: path.read_bytes() for path in (disk / "out").glob("*.bin")} == whole
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert run_here("ptuning/train.sh", *flags, check=False, **variables) == 0
        assert read(disk / "out", "trainer_state.json")["global_step"] == 7
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# As files of several years say it: in text, by an old name, and with values that depend on the model.
OLD_ZERO_3 = """{"train_batch_size": "auto", "zero_optimization": {"stage": "3", "reduce_bucket_size": "auto",
"stage3_prefetch_bucket_size": "auto", "stage3_gather_fp16_weights_on_model_save": true}}"""


def test_deepspeed_trains_in_one_process_too(tmp_path):
    """With an old file."""
    (tmp_path / "ds.json").write_text(OLD_ZERO_3)
    variables = {
        "OUTPUT_DIR": str(tmp_path),
        "MAX_STEPS": "2",
        "BATCH_SIZE": "4",
        "EVALUATE": "false",
        "EVAL_STEPS": "0",
    }
    variables["DEEPSPEED"] = str(tmp_path / "ds.json")
    bash("full/ds_train_finetune.sh", **variables)
    assert (tmp_path / "model.safetensors").is_file()


def test_fsdp_without_a_gpu_is_one_sentence(tmp_path, capsys):
    assert run_here("full/fsdp_train_finetune.sh", check=False, OUTPUT_DIR=str(tmp_path)) == 2
    (error,) = errors_of(capsys.readouterr().err)
    assert "--fsdp needs GPUs" in error


def test_an_output_folder_that_the_evaluation_would_miss_is_refused(tmp_path):
    done = bash("full/train.sh", "--output_dir", str(tmp_path), check=False)
    assert done.returncode == 2 and "set OUTPUT_DIR" in done.stderr


@pytest.mark.parametrize("method", ["ptuning", "lora", "full"])
def test_every_method_prints_help(method, monkeypatch, capsys):
    program = str(ROOT / method / "main.py")
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(program, run_name="__main__")
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    flags = {"ptuning": ["--pre_seq_len", "--prefix_projection"], "lora": ["--lora_rank", "--use_dora"], "full": []}
    for flag in (*flags[method], "--history_column", "--conversation_column", "--learning_rate", "--evaluate_base"):
        assert flag in said


SHARED = ("MODEL", "TRAIN_FILE", "TRAIN_DATASETS", "EPOCHS", "MAX_STEPS", "EVAL_STEPS", "BEST_METRIC", "EARLY_STOPPING")
SHARED += ("DEFAULT_STEPS", "BATCH_SIZE", "EVAL_BATCH_SIZE", "GRAD_ACCUM", "GRADIENT_CHECKPOINTING")


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh"])
def test_the_methods_have_the_same_variables_and_flags(script):
    """What is not the method's own is written the same way in both."""
    texts = {method: (ROOT / method / script).read_text() for method in ("ptuning", "lora")}
    own = r"--(pre_seq_len|ptuning_checkpoint|lora_\w+)\b"
    flags = {
        method: [f for f in re.findall(r"--\w+", text) if not re.fullmatch(own, f)] for method, text in texts.items()
    }
    assert flags["ptuning"] == flags["lora"]
    if script == "train.sh":
        for variable in SHARED:
            assert all(re.search(rf"\b{variable}=\$\{{{variable}[:-]", text) for text in texts.values()), variable


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chat", ["cli_demo.sh", "web_demo.sh"])
def test_chats_take_the_newest_training_or_a_base_model_alone(method, chat):
    ((program, *flags),) = commands_of(f"{method}/{chat}", SYSTEM_PROMPT="你好")
    assert program == str(ROOT / "common" / "chat" / chat.replace(".sh", ".py"))
    assert flags[:2] == ["--checkpoint", str(ROOT / method / "output")]
    assert flags[flags.index("--system_prompt") + 1] == "你好"
    ((_, *flags),) = commands_of(f"{method}/{chat}", CHECKPOINT="", MODEL="demo3", QUANTIZATION_BIT="")
    assert flags[:4] == ["--model_name_or_path", "demo3", "--quantization_bit", "0"]
