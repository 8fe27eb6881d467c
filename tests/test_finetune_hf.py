"""The command line of the ChatGLM3 and GLM-4 repositories: their YAML files, resuming, and one answer at the end."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from common.arguments import FullArguments, LoraArguments, PrefixArguments, TrainingArguments
from common.errors import UserError
from common.finetune_hf import make_method, read_config, resume

ROOT = Path(__file__).resolve().parents[1]
OWN = [ROOT / "lora" / "lora.yaml", ROOT / "ptuning" / "ptuning_v2.yaml", ROOT / "full" / "sft.yaml"]
# The keys and values of the official lora.yaml; ptuning_v2.yaml and sft.yaml differ from it in the last section only.
OFFICIAL = """
data_config:
  train_file: train.json
  val_file: dev.json
  test_file: dev.json
  num_proc: 16
max_input_length: 256
max_output_length: 512
training_args:
  output_dir: ./output
  max_steps: 3000
  learning_rate: 5e-5
  per_device_train_batch_size: 4
  dataloader_num_workers: 16
  remove_unused_columns: false
  save_strategy: steps
  save_steps: 500
  log_level: info
  logging_strategy: steps
  logging_steps: 10
  per_device_eval_batch_size: 16
  evaluation_strategy: steps
  eval_steps: 500
  predict_with_generate: true
  generation_config:
    max_new_tokens: 512
  use_cpu: false
"""
PEFT = {
    "lora": "peft_config: {peft_type: LORA, task_type: CAUSAL_LM, r: 8, lora_alpha: 32, lora_dropout: 0.1}",
    "ptuning_v2": "peft_config: {peft_type: PREFIX_TUNING, task_type: CAUSAL_LM, num_virtual_tokens: 128,"
    " num_attention_heads: 2, token_dim: 256}",
    "sft": "",
}


def write_official(folder: Path, kind: str, **changes: str) -> Path:
    text = OFFICIAL + PEFT[kind]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    file = folder / f"{kind}.yaml"
    file.write_text(text)
    return file


def flags_of(file: Path, data_dir: Path) -> tuple:
    method, (model_args, data_args, training_args) = make_method(*read_config(file, data_dir, "demo3", []))
    return model_args, method.args, data_args, training_args


@pytest.mark.parametrize(
    ("kind", "expected"), [("lora", LoraArguments()), ("ptuning_v2", None), ("sft", FullArguments())]
)
def test_the_official_files_mean_what_they_say(tmp_path, kind, expected):
    _, method, data, training = flags_of(write_official(tmp_path, kind), tmp_path)
    assert method == (expected or PrefixArguments(pre_seq_len=128))
    assert (data.max_source_length, data.max_target_length, data.max_new_tokens) == (256, 512, 512)
    assert (data.train_file, data.conversation_column) == (str(tmp_path / "train.json"), None)
    assert data.max_eval_samples == 50
    assert (training.learning_rate, training.max_steps, training.eval_strategy) == (5e-5, 3000, "steps")
    assert training.per_device_train_batch_size == 4 and training.predict_with_generate


@pytest.mark.parametrize("kind", ["lora", "ptuning_v2", "sft"])
def test_the_files_of_glm4_are_understood(kind, tmp_path, capsys):
    """Those of 2024 lack combine at first; those of 2025 name LoRA's layers as in transformers, and no prefix."""
    later = 'combine: True\nfreezeV: True\nswanlab: "disabled"\nmax_input_length: 256'
    changes = {"train_file: train.json": "train_file: train.jsonl", "evaluation_strategy": "eval_strategy"}
    _, method, data, training = flags_of(write_official(tmp_path, kind, **changes), tmp_path)
    assert data.train_file == str(tmp_path / "train.jsonl") and training.eval_strategy == "steps"
    assert not capsys.readouterr().err
    file = write_official(tmp_path, kind, **changes, **{"max_input_length: 256": later})
    assert flags_of(file, tmp_path)[1:3] == (method, data)
    assert "combine is not read: all answers are learned" in " ".join(capsys.readouterr().err.split())
    tracked = write_official(tmp_path, kind, **{"max_input_length: 256": 'swanlab: "cloud"\nmax_input_length: 256'})
    assert read_config(tracked, tmp_path, "demo3", [])[1]["report_to"] in ("swanlab", ["swanlab"])


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.name)
def test_our_own_files_are_read_and_explain_every_line(file, tmp_path):
    flags_of(file, tmp_path)
    explained = [line for line in file.read_text().splitlines() if ":" in line and not line.lstrip().startswith("#")]
    obvious = ("data_config:", "max_output_length:", "save_strategy:", "logging_steps:", "generation_config:")
    obvious += ("output_dir:", "eval_strategy:", "eval_steps:", "peft_config:", "peft_type:", "task_type:")
    assert [line for line in explained if "#" not in line and not line.strip().startswith(obvious)] == []


def test_our_files_differ_in_the_method_only():
    contents = [yaml.safe_load(file.read_text()) for file in OWN]
    for content in contents:
        content.pop("peft_config", None)
        content["training_args"].pop("learning_rate")
    assert contents[0] == contents[1] == contents[2]


@pytest.fixture
def run_hf(tmp_path, monkeypatch, capsys):
    """Runs finetune_hf.py or inference_hf.py in ``tmp_path`` and in this process: (exit code, stdout, stderr)."""

    def run(program: str, *arguments: str) -> tuple[int, str, str]:
        file = str(ROOT / "common" / f"{program}_hf.py")
        monkeypatch.setattr(sys, "argv", [file, *arguments])
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 12), ("dev", 2)):
        lines = (ROOT / "AdvertiseGen" / f"{name}_tools.json").read_text().splitlines(keepends=True)
        (folder / f"{name}.json").write_text("".join(lines[:count]))
    return folder


FAST = ("--max_steps", "2", "--save_steps", "1", "--max_new_tokens", "8", "--dataloader_num_workers", "0")


def test_train_continue_from_a_number_and_answer(tmp_path, data_dir, run_hf):
    """LoRA with the official file: checkpoints, a further step from checkpoint 1, refusal of one that is not there."""
    file = write_official(tmp_path, "lora")
    command = ("finetune", str(data_dir), "demo3", str(file))
    assert run_hf(*command, *FAST)[0] == 0
    output = tmp_path / "output"
    assert {"checkpoint-1", "checkpoint-2", "adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in output.iterdir()
    }
    assert json.loads((output / "predict_results.json").read_text())["predict_samples"] >= 2
    trained = (output / "adapter_model.safetensors").read_bytes()

    code, said, _ = run_hf(*command, "1", *FAST)
    assert code == 0
    assert f"continuing from {Path('output') / 'checkpoint-1'}" in said
    assert (output / "adapter_model.safetensors").read_bytes() == trained

    code, _, error = run_hf(*command, "7", *FAST)
    assert code == 2
    assert "no checkpoint 7 in output: there are 1, 2; or yes for the newest" in error

    code, answer, _ = run_hf("inference", "output", "--prompt", "白色的裙子还有货吗？", "--max_new_tokens", "8")
    assert code == 0
    assert answer.strip()


@pytest.mark.parametrize(("kind", "saved"), [("ptuning_v2", "pytorch_model.bin"), ("sft", "model.safetensors")])
def test_the_other_methods_train_and_answer(tmp_path, data_dir, run_hf, kind, saved):
    file = write_official(tmp_path, kind, **{"  predict_with_generate: true\n": ""})
    assert run_hf("finetune", str(data_dir), "demo3", str(file), "no", *FAST, "--eval_strategy", "no")[0] == 0
    assert (tmp_path / "output" / saved).is_file()
    code, answer, _ = run_hf("inference", "output", "--prompt", "你好", "--max_new_tokens", "4", "--temperature", "0")
    assert code == 0
    assert answer.strip()


def test_what_the_last_argument_asks_for(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for choice in ("", "yes"):  # nothing to continue: from the beginning, as the official script
        resume(choice, args)
        assert (args.resume_from_checkpoint, args.overwrite_output_dir) == (None, False)
    resume("NO", args)
    assert args.overwrite_output_dir
    with pytest.raises(UserError, match="no checkpoint 500 in .*: there is none"):
        resume("500", args)
