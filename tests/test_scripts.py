"""The scripts as a user types them, in processes of their own, on the demo model."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.chat.chat import generation_settings, stream_chat
from common.loading import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PTUNING = ROOT / "ptuning"


def environment(**variables: str) -> dict[str, str]:
    """This Python's environment is the active one, so that the scripts take it."""
    return os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"} | variables


def bash(script: str, *flags: str, cwd: Path = ROOT, check: bool = True, stdin: str = "", **variables: str):
    """In one process, unless said otherwise: to look for GPUs first takes two seconds."""
    command, environ = ["bash", str(ROOT / script), *flags], environment(**{"NUM_PROCESSES": "1"} | variables)
    done = subprocess.run(command, cwd=cwd, env=environ, input=stdin, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> Path:
    """What `bash ptuning/train.sh` makes of the demo, with nothing changed but the output folder."""
    folder = tmp_path_factory.mktemp("demo")
    variables = {"OUTPUT_DIR": str(folder / "output"), "NUM_PROCESSES": ""}
    (folder / "stdout").write_text(bash("ptuning/train.sh", cwd=folder, **variables).stdout)
    return folder


def predictions(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "generated_predictions.txt").read_text().splitlines()]


def test_the_demo_learns_the_advertising_style(demo_run):
    scores = json.loads((demo_run / "output" / "predict_results.json").read_text())
    assert scores["predict_samples"] == 200
    assert scores["predict_rouge-l"] >= 1.5 * scores["predict_base_rouge-l"]
    assert scores["predict_bleu-4"] > scores["predict_base_bleu-4"]
    said = (demo_run / "stdout").read_text()
    for part in ("training finished", "tokens/s", "samples/s", "peak host memory", "tuned / base", "ROUGE-L"):
        assert part in said


def test_evaluate_repeats_the_answers_of_the_training_run(demo_run, tmp_path):
    variables = {"CHECKPOINT": str(demo_run / "output"), "OUTPUT_DIR": str(tmp_path / "eval")}
    bash("ptuning/evaluate.sh", "--max_predict_samples", "50", cwd=tmp_path, **variables)
    pairs = list(zip(predictions(demo_run / "output"), predictions(tmp_path / "eval"), strict=False))
    assert len(pairs) == 50
    assert sum(trained == evaluated for trained, evaluated in pairs) >= 48  # other rows share a batch


def test_the_chat_demo_answers_and_remembers(demo_run, tmp_path):
    said = bash(
        "ptuning/cli_demo.sh",
        "--temperature",
        "0",
        cwd=tmp_path,
        stdin="类型#裙*颜色#白色\n\nclear\n类型#裙*颜色#白色\nstop\n",
        CHECKPOINT=str(demo_run / "output"),
    ).stdout
    answers = [line.removeprefix("ChatGLM：") for line in said.splitlines() if line.startswith("ChatGLM：")]
    assert len(answers) == 2
    assert len(answers[0]) > 20
    assert answers[0] == answers[1]  # greedy, and the conversation was forgotten


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    """A short LoRA training of the ChatGLM3 demo."""
    folder = tmp_path_factory.mktemp("lora")
    variables = {"MODEL": "demo3", "OUTPUT_DIR": str(folder / "output"), "MAX_STEPS": "40"}
    (folder / "stdout").write_text(bash("lora/train.sh", "--max_predict_samples", "50", cwd=folder, **variables).stdout)
    return folder


def test_lora_learns_the_advertising_style(lora_run):
    scores = json.loads((lora_run / "output" / "predict_results.json").read_text())
    assert scores["predict_samples"] == 50
    assert scores["predict_rouge-l"] >= 1.5 * scores["predict_base_rouge-l"]
    assert "LoRA" in (lora_run / "stdout").read_text()
    weights = {file.name for file in (lora_run / "output").iterdir() if file.suffix in (".bin", ".safetensors")}
    assert weights == {"adapter_model.safetensors", "training_args.bin"}


def test_lora_is_evaluated_merged_and_asked(lora_run, tmp_path):
    """evaluate.sh repeats the scores; the merged checkpoint gives the same answers without the adapter."""
    checkpoint = str(lora_run / "output")
    flags = ["--max_predict_samples", "50"]
    variables = {"MODEL": "demo3", "CHECKPOINT": checkpoint}
    bash("lora/evaluate.sh", *flags, cwd=tmp_path, OUTPUT_DIR=str(tmp_path / "eval"), **variables)
    trained, evaluated = (
        json.loads((folder / "predict_results.json").read_text()) for folder in (lora_run / "output", tmp_path / "eval")
    )
    assert evaluated["predict_rouge-l"] == pytest.approx(trained["predict_rouge-l"], abs=0.5)

    merged, question = tmp_path / "merged", "类型#裙*颜色#白色*风格#甜美"
    bash("lora/merge.sh", "--dtype", "float32", cwd=tmp_path, CHECKPOINT=checkpoint, OUTPUT_DIR=str(merged))
    *_, answer = stream_chat(load_model(merged), load_tokenizer(merged), question, **generation_settings(512, 0, 1))
    variables = {"MODEL": "demo3", "CHECKPOINT": checkpoint}
    said = bash("lora/cli_demo.sh", "--temperature", "0", cwd=tmp_path, stdin=f"{question}\nstop\n", **variables)
    assert f"ChatGLM：{answer}\n" in said.stdout
    assert len(answer) > 20


def test_conversations_train_and_evaluate(tmp_path):
    bash(
        "ptuning/train_chat.sh",
        "--max_predict_samples",
        "8",
        cwd=tmp_path,
        OUTPUT_DIR=str(tmp_path / "chat"),
        MAX_STEPS="3",
        MAX_TARGET_LENGTH="64",
    )
    assert len(predictions(tmp_path / "chat")) == 8
    settings = json.loads((tmp_path / "chat" / "run_settings.json").read_text())
    assert settings["history_column"] == "history"


OFFICIAL_TRAIN = """CUDA_VISIBLE_DEVICES=0 python3 main.py
--do_train --train_file {data}/train.json --validation_file {data}/dev.json
--prompt_column content --response_column summary --overwrite_cache --model_name_or_path {model}
--output_dir {output} --overwrite_output_dir --max_source_length 64 --max_target_length 64
--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16
--predict_with_generate --max_steps 3 --logging_steps 10 --save_steps 1000 --learning_rate 2e-2 --pre_seq_len 128
--quantization_bit 4"""
OFFICIAL_EVALUATE = """CUDA_VISIBLE_DEVICES=0 python3 main.py
--do_predict --validation_file {data}/few.json --test_file {data}/few.json --overwrite_cache --prompt_column content
--response_column summary --model_name_or_path {model} --ptuning_checkpoint {output}/checkpoint-3
--output_dir {output} --overwrite_output_dir --max_source_length 64 --max_target_length 64
--per_device_eval_batch_size 1 --predict_with_generate --pre_seq_len 128 --quantization_bit 4"""


def test_the_official_commands_run_unchanged(tmp_path, demo_folder):
    data = tmp_path / "data"
    shutil.copytree(ROOT / "AdvertiseGen", data)
    (data / "few.json").write_text("".join((data / "dev.json").read_text().splitlines(keepends=True)[:3]))
    for command in (OFFICIAL_TRAIN, OFFICIAL_EVALUATE):
        line = command.format(data=data, model=demo_folder, output=tmp_path / "output").replace("\n", " ")
        done = subprocess.run(["bash", "-c", line], cwd=PTUNING, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(predictions(tmp_path / "output")) == 3


def test_trainings_of_all_methods_start_at_once_on_an_empty_cache(tmp_path):
    """One of them in two processes. tests/bench/launches.py does the same with sixteen."""
    flags = ["--do_predict", "false", "--evaluate_base", "false", "--max_train_samples", "16"]
    scripts = {"ptuning/train.sh": "1", "lora/train.sh": "1", "full/train.sh": "2"}
    jobs = [
        subprocess.Popen(
            ["bash", str(ROOT / script), *flags],
            env=environment(
                OUTPUT_DIR=str(tmp_path / str(job)),
                CHATGLM_CACHE=str(tmp_path / "cache"),
                NUM_PROCESSES=processes,
                MAX_STEPS="2",
                BATCH_SIZE="2",
                EVALUATE="false",
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for job, (script, processes) in enumerate((scripts | {"ptuning/./train.sh": "1"}).items())
    ]
    said = [job.communicate(timeout=400)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), "\n".join(said)
    assert sum("rows tokenized" in text for text in said) == 1  # the others found it in the cache
    prefixes = {(tmp_path / str(job) / "pytorch_model.bin").read_bytes() for job in (0, 3)}
    assert len(prefixes) == 1


TWO_PROCESSES = {"NUM_PROCESSES": "2"}


def test_two_processes_train_one_prefix_and_share_the_evaluation(tmp_path):
    flags = ["--max_predict_samples", "7", "--max_train_samples", "16"]
    short = TWO_PROCESSES | {"MODEL": "demo3", "MAX_STEPS": "2", "BATCH_SIZE": "2"}
    bash("ptuning/train.sh", *flags, OUTPUT_DIR=str(tmp_path / "two"), **short)
    settings = json.loads((tmp_path / "two" / "run_settings.json").read_text())
    assert settings["rows_per_step"] == 4
    variables = {"MODEL": "demo3", "CHECKPOINT": str(tmp_path / "two"), "OUTPUT_DIR": str(tmp_path / "one")}
    bash("ptuning/evaluate.sh", *flags[:2], **variables)
    assert len(predictions(tmp_path / "one")) == 7
    assert predictions(tmp_path / "two") == predictions(tmp_path / "one")


def test_bad_input_is_said_once_for_all_processes(tmp_path):
    variables = TWO_PROCESSES | {"OUTPUT_DIR": str(tmp_path), "TRAIN_FILE": "nowhere.json"}
    done = bash("ptuning/train.sh", cwd=tmp_path, check=False, **variables)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: no data file nowhere.json (looked in {tmp_path})."
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "variables", "says"),
    [
        ([], {"NUM_GPUS": "2"}, "NUM_GPUS=2, but 0 GPUs are visible here"),
        ([], {"OUTPUT_DIR": "/proc/out"}, "can't write to the output folder /proc/out"),
    ],
)
def test_bad_input_gives_one_sentence_and_exit_code_2(flags, variables, says, tmp_path):
    done = bash(
        "ptuning/train.sh", *flags, cwd=tmp_path, check=False, **({"OUTPUT_DIR": str(tmp_path / "out")} | variables)
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in done.stderr


def test_a_full_disk_ends_with_one_sentence(tmp_path):
    """A file system of one megabyte, where the second checkpoint does not fit; mounting one takes root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        flags = ["--do_predict", "false", "--save_steps", "1", "--max_train_samples", "16"]
        done = bash(
            "ptuning/train.sh", *flags, check=False, OUTPUT_DIR=str(disk / "out"), MAX_STEPS="6", BATCH_SIZE="2"
        )
        assert done.returncode == 2
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_conversations_with_tools_train(tmp_path):
    """Every answer of a conversation is asked for: calls of tools too."""
    flags = ["--max_predict_samples", "8"]
    bash("lora/train_chat.sh", *flags, cwd=tmp_path, OUTPUT_DIR=str(tmp_path / "chat"), MAX_STEPS="3", BATCH_SIZE="4")
    rows = predictions(tmp_path / "chat")
    assert len(rows) == 8
    assert any("tool_call(" in row["labels"] for row in rows)
    assert json.loads((tmp_path / "chat" / "run_settings.json").read_text())["conversation_column"] == "conversations"


def test_plain_text_prepared_ahead_trains_as_a_language_model(tmp_path):
    """common/preprocess.sh names the length of the blocks differently."""
    shards, output = tmp_path / "shards", tmp_path / "out"
    flags = ["--num_workers", "1"]
    bash("common/preprocess.sh", *flags, cwd=tmp_path, TEXT_COLUMN="summary", OUTPUT_DIR=str(shards))
    variables = {"TRAIN_DATASETS": str(shards), "OUTPUT_DIR": str(output), "MAX_STEPS": "12"}
    bash("lora/train_text.sh", "--max_eval_samples", "40", cwd=tmp_path, **variables)
    settings = json.loads((output / "run_settings.json").read_text())
    assert (settings["train_file"], settings["train_datasets"]) == ([], str(shards))
    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_perplexity"] < results["eval_base_perplexity"]
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))


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


SHARED = ("MODEL", "TRAIN_FILE", "VALIDATION_FILE", "PROMPT_COLUMN", "RESPONSE_COLUMN", "HISTORY_COLUMN")
SHARED += ("CONVERSATION_COLUMN", "MAX_STEPS", "BATCH_SIZE", "EVAL_BATCH_SIZE", "GRAD_ACCUM", "GRADIENT_CHECKPOINTING")


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


@pytest.fixture
def few(tmp_path) -> dict[str, str]:
    """Variables for a short run: few rows to answer, few steps."""
    (tmp_path / "few.json").write_text("".join((ROOT / "AdvertiseGen" / "dev.json").open().readlines()[:8]))
    return {"OUTPUT_DIR": str(tmp_path / "out"), "VALIDATION_FILE": str(tmp_path / "few.json"), "BATCH_SIZE": "4"}


def test_every_weight_is_trained_and_scored_beside_the_base(tmp_path, few):
    """train.sh, and after it evaluate_finetune.sh on what was saved; from another folder."""
    said = bash("full/train.sh", "--save_steps", "6", cwd=tmp_path, MAX_STEPS="6", **few).stdout
    scores = json.loads((tmp_path / "out" / "predict_results.json").read_text())
    assert scores["predict_samples"] == 8 and scores["predict_rouge-l"] != scores["predict_base_rouge-l"]
    assert "tuned / base" in said
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-6"):  # each is a model of its own
        assert {"config.json", "model.safetensors", "ice_text.model"} <= {file.name for file in folder.iterdir()}


def test_deepspeed_trains_in_one_process_too(tmp_path, few):
    bash("full/ds_train_finetune.sh", cwd=tmp_path, MAX_STEPS="2", EVALUATE="false", **few)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_fsdp_without_a_gpu_is_one_sentence(tmp_path, few):
    done = bash("full/fsdp_train_finetune.sh", cwd=tmp_path, check=False, **few)
    assert done.returncode == 2
    assert "--fsdp needs GPUs" in done.stderr and "Traceback" not in done.stderr


def test_an_output_folder_that_the_evaluation_would_miss_is_refused(tmp_path):
    done = bash("full/train.sh", "--output_dir", str(tmp_path), check=False)
    assert done.returncode == 2 and "set OUTPUT_DIR" in done.stderr
