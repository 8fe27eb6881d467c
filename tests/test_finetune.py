"""The whole job on the demo model, in this process: what it trains, writes, continues and refuses."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.arguments import FullArguments, PrefixArguments
from common.errors import UserError
from common.finetune import run
from common.flags import parse_arguments
from common.loading import load_model
from common.methods.full import Full
from common.methods.prefix import PTuning, read_prefix
from common.metrics import score
from common.models.registry import DEMOS
from common.models.weights import load_base

ROOT = Path(__file__).resolve().parents[1]
LOCK = {".lock", ".lock.holder"}
SAVED = {"config.json", "ice_text.model", "pytorch_model.bin", "tokenizer_config.json", "training_args.bin"}
STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
TRAINING = f"""--do_train --train_file {ROOT}/AdvertiseGen/train.json --model_name_or_path demo --pre_seq_len 8
--prompt_column content --response_column summary --max_source_length 64 --max_target_length 64 --use_cpu
--per_device_train_batch_size 4 --max_train_samples 64 --learning_rate 2e-2 --logging_steps 1"""
PREDICTION = f"""--do_predict --test_file {ROOT}/AdvertiseGen/dev.json --model_name_or_path demo --use_cpu
--prompt_column content --response_column summary --max_source_length 64 --max_target_length 16
--per_device_eval_batch_size 4 --max_predict_samples 6"""


def finetune(flags: str, output_dir: Path) -> None:
    model_args, prefix_args, *others = parse_arguments(
        PrefixArguments, [*flags.split(), "--output_dir", str(output_dir)]
    )
    run(PTuning(prefix_args), model_args, *others)


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """Six steps without a pause, with a checkpoint after the third."""
    folder = tmp_path_factory.mktemp("whole")
    finetune(f"{TRAINING} --max_steps 6 --save_steps 3", folder)
    return folder


def test_training_saves_the_prefix_and_nothing_of_the_base(whole_run):
    own = {"all_results.json", "manifest.json", "run_settings.json", "runs", "train_results.json", "trainer_state.json"}
    report = {"run.json", "report.html", "train.log", "README.md"}
    assert files(whole_run) == SAVED | own | report | LOCK | {"checkpoint-3", "checkpoint-6"}
    assert files(whole_run / "checkpoint-6") == SAVED | STATE | {"manifest.json"}
    names = set(torch.load(whole_run / "pytorch_model.bin", weights_only=True))
    assert names == {"transformer.prefix_encoder.embedding.weight"}


def test_training_lowers_the_loss(tmp_path):
    flags = "--max_train_samples 4 --max_steps 20 --learning_rate 5e-2 --save_strategy no"  # one batch, again
    finetune(f"{TRAINING} {flags}", tmp_path)
    assert losses(tmp_path)[-1] < 0.9 * losses(tmp_path)[0]


def test_rows_beyond_the_context_of_the_model_are_a_warning(tmp_path, capsys):
    flags = f"{TRAINING} --max_steps 1 --dry_run --max_source_length"
    finetune(f"{flags} 447", tmp_path)
    assert "longer than the context" not in capsys.readouterr().err
    finetune(f"{flags} 448", tmp_path)
    assert "rows of 513 tokens are longer than the context of demo, 512 tokens" in capsys.readouterr().err


def test_training_moves_the_prefix(whole_run):
    assert len(losses(whole_run)) == 6
    first, last = read_prefix(whole_run / "checkpoint-3"), read_prefix(whole_run / "checkpoint-6")
    assert not torch.equal(first["embedding.weight"], last["embedding.weight"])
    assert torch.equal(last["embedding.weight"], read_prefix(whole_run)["embedding.weight"])


def test_a_continued_training_equals_an_uninterrupted_one(whole_run, tmp_path, capfd):
    shutil.copytree(whole_run / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(whole_run / "run_settings.json", tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / ".saving").mkdir()  # as a kill in the middle of saving leaves it
    finetune(f"{TRAINING} --max_steps 6 --save_steps 3", tmp_path)
    printed = capfd.readouterr()
    assert f"continuing from {tmp_path / 'checkpoint-3'}" in printed.out
    assert f"{tmp_path / 'checkpoint-5'} is damaged: manifest.json is missing. It is now" in printed.err
    assert (tmp_path / "checkpoint-5.damaged").is_dir()
    assert not (tmp_path / ".saving").exists()
    assert losses(tmp_path) == losses(whole_run)
    assert torch.equal(read_prefix(tmp_path)["embedding.weight"], read_prefix(whole_run)["embedding.weight"])


def test_a_finished_training_is_left_as_it_is(whole_run, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    finetune(f"{TRAINING} --max_steps 6 --save_steps 3", folder)
    assert "the training was finished before" in capfd.readouterr().out
    assert files(folder) == files(whole_run)
    assert (folder / "pytorch_model.bin").read_bytes() == (whole_run / "pytorch_model.bin").read_bytes()
    finetune(f"{TRAINING} --max_steps 7 --save_steps 3", folder)  # it may be prolonged
    assert len(losses(folder)) == 7


def test_other_settings_are_refused_and_overwriting_starts_over(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    with pytest.raises(UserError, match=r"learning_rate was 0.02, now 0.01"):
        finetune(f"{TRAINING} --max_steps 6 --learning_rate 1e-2", folder)
    assert files(folder) == files(whole_run)
    finetune(f"{TRAINING} --max_steps 2 --learning_rate 1e-2 --overwrite_output_dir", folder)
    assert not (folder / "checkpoint-6").exists()
    assert len(losses(folder)) == 2


def test_an_incomplete_checkpoint_is_not_continued(whole_run, tmp_path):
    broken = tmp_path / "checkpoint-3"
    shutil.copytree(whole_run / "checkpoint-3", broken)
    (broken / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-3 is not whole: optimizer.pt is missing"):
        finetune(f"{TRAINING} --max_steps 6 --resume_from_checkpoint {broken}", tmp_path / "out")


@pytest.fixture(scope="module")
def strong_prefix(whole_run, tmp_path_factory) -> Path:
    """A prefix that no answer can be the same with: six steps of training hardly move a greedy one."""
    folder = tmp_path_factory.mktemp("strong")
    tensors = torch.load(whole_run / "pytorch_model.bin", weights_only=True)
    torch.save({name: 10 * tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    return folder


def test_predictions_are_written_in_the_official_form_and_scored(strong_prefix, tmp_path):
    finetune(f"{PREDICTION} --ptuning_checkpoint {strong_prefix} --evaluate_base", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "generated_predictions.txt").read_text().splitlines()]
    assert len(rows) == 6
    assert all(list(row) == ["labels", "predict"] for row in rows)
    scores = json.loads((tmp_path / "predict_results.json").read_text())
    expected = score([row["predict"] for row in rows], [row["labels"] for row in rows])
    assert {name: scores[f"predict_{name}"] for name in expected} == expected

    finetune(PREDICTION, tmp_path / "base")
    base = (tmp_path / "base_predictions.txt").read_text()
    assert base == (tmp_path / "base" / "generated_predictions.txt").read_text()
    assert base != (tmp_path / "generated_predictions.txt").read_text()


def test_batched_predictions_equal_single_ones(whole_run, tmp_path):
    for size in (1, 6):
        flags = f"{PREDICTION} --ptuning_checkpoint {whole_run} --per_device_eval_batch_size {size}"
        finetune(flags, tmp_path / str(size))
    answers = [(tmp_path / str(size) / "generated_predictions.txt").read_text() for size in (1, 6)]
    assert answers[0] == answers[1]


def test_evaluation_reports_the_loss_and_the_scores(whole_run, tmp_path):
    flags = PREDICTION.replace("--do_predict --test_file", "--do_eval --predict_with_generate --validation_file")
    flags = flags.replace("max_predict_samples", "max_eval_samples")
    finetune(f"{flags} --ptuning_checkpoint {whole_run}", tmp_path)
    found = json.loads((tmp_path / "eval_results.json").read_text())
    assert {"eval_loss", "eval_rouge-l", "eval_bleu-4"} <= set(found)
    assert 0 < found["eval_loss"] < 20


def test_evaluating_while_training_keeps_the_best_checkpoint(tmp_path):
    flags = f"--do_eval --validation_file {ROOT}/AdvertiseGen/dev.json --max_eval_samples 4 --predict_with_generate"
    flags += " --eval_strategy steps --eval_steps 1 --save_steps 1 --load_best_model_at_end --max_steps 3"
    flags += " --metric_for_best_model rouge-l --per_device_eval_batch_size 4"
    finetune(f"{TRAINING} {flags}", tmp_path)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_rouge-l"] for entry in state["log_history"] if "eval_rouge-l" in entry}
    assert set(scores) == {1, 2, 3}
    assert state["best_metric"] == max(scores.values())
    best = read_prefix(state["best_model_checkpoint"])["embedding.weight"]
    assert torch.equal(read_prefix(tmp_path)["embedding.weight"], best)


@pytest.mark.parametrize("flags", ["--do_sample --temperature 9 --top_p 1", "--generation_max_length 36"])
def test_other_ways_of_generating(flags, whole_run, tmp_path):
    finetune(f"{PREDICTION} --ptuning_checkpoint {whole_run}", tmp_path / "greedy")
    finetune(f"{PREDICTION} --ptuning_checkpoint {whole_run} {flags}", tmp_path / "other")
    greedy, other = ((tmp_path / way / "generated_predictions.txt").read_text() for way in ("greedy", "other"))
    assert len(other.splitlines()) == 6
    assert other != greedy


# Full-parameter training

FULL = TRAINING.replace("--pre_seq_len 8", "--max_steps 4 --save_steps 2 --report_to none").replace("2e-2", "1e-3")


def finetune_full(flags: str, output_dir: Path) -> None:
    model_args, full_args, *others = parse_arguments(FullArguments, [*flags.split(), "--output_dir", str(output_dir)])
    run(Full(full_args), model_args, *others)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    finetune_full(FULL, folder)
    return folder


def test_full_training_moves_every_weight_and_saves_a_whole_model(full_run):
    """Under the original names; it loads by itself and is no longer the demo."""
    base, tuned = load_model("demo"), load_model(full_run)
    for (name, before), (_, after) in zip(base.named_parameters(), tuned.named_parameters(), strict=True):
        assert not torch.equal(before, after), name
    original = torch.load(DEMOS["demo"] / "pytorch_model.bin", weights_only=True)
    stored = set(load_file(full_run / "model.safetensors")) | {"lm_head.weight"}
    assert {name for name in original if "inv_freq" not in name} <= stored
    assert len(losses(full_run)) == 4


def test_a_continued_full_training_equals_an_uninterrupted_one(full_run, tmp_path):
    shutil.copytree(full_run / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(full_run / "run_settings.json", tmp_path)
    finetune_full(FULL, tmp_path)
    assert losses(tmp_path) == losses(full_run)
    expected, found = (load_file(folder / "model.safetensors") for folder in (full_run, tmp_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_base_of_a_full_training_is_read_again(tmp_path):
    finetune_full(PREDICTION, tmp_path / "demo")
    predict = f"{PREDICTION} --do_train --max_steps 1 --learning_rate 1e-2 --evaluate_base"
    finetune_full(f"{FULL} {predict}", tmp_path)
    base = (tmp_path / "base_predictions.txt").read_text()
    assert base == (tmp_path / "demo" / "generated_predictions.txt").read_text()
    assert base != (tmp_path / "generated_predictions.txt").read_text()


def test_the_base_of_a_full_training_is_evaluated_with_its_own_answers(tmp_path):
    validation = PREDICTION.replace("--do_predict", "--do_eval --predict_with_generate --evaluate_base")
    validation = validation.replace("--test_file", "--validation_file").replace("predict_samples", "eval_samples")
    finetune_full(f"{FULL.replace('--max_steps 4', '--max_steps 1').replace('1e-3', '1e-2')} {validation}", tmp_path)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_base_rouge-1"] != results["eval_rouge-1"]
    assert results["eval_base_loss"] != results["eval_loss"]


def test_base_and_tuned_model_are_never_in_memory_together(full_run, tmp_path, monkeypatch):
    """The base answers first, alone; that changes nothing of the training."""
    alive: weakref.WeakSet = weakref.WeakSet()
    loaded: list[tuple[str, int]] = []  # name of a model, how many others were in memory

    def counted(folder, *args):
        loaded.append((folder.name, len(alive)))
        alive.add(model := load_base(folder, *args))
        return model

    gc.collect()
    monkeypatch.setattr("common.finetune.load_base", counted)
    answers = f"{PREDICTION} --evaluate_base".replace("--max_target_length 16", "--max_target_length 64")
    finetune_full(f"{FULL} {answers}", tmp_path / "out")
    expected, found = (load_file(folder / "model.safetensors") for folder in (full_run, tmp_path / "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    gc.collect()
    finetune_full(answers.replace("_path demo", f"_path {full_run}"), tmp_path / "again")
    assert loaded == [("demo", 0), ("demo", 0), ("demo", 0), (str(full_run), 0)]
    for name in ("base_predictions.txt", "generated_predictions.txt"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "again" / name).read_text()


def test_a_chosen_checkpoint_is_not_continued_with_other_settings(full_run):
    flags = FULL.replace("1e-3", "5e-3") + f" --resume_from_checkpoint {full_run / 'checkpoint-2'}"
    with pytest.raises(UserError, match="learning_rate was 0.001, now 0.005"):
        finetune_full(flags, full_run)


HOLD = """
import sys, time
from pathlib import Path
from common.locking import guard
with guard("output folder", Path(sys.argv[1]), inside=True):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_jobs_do_not_share_an_output_folder(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"output folder .* is in use by process {holder.pid} "):
            finetune(f"{TRAINING} --max_steps 1", tmp_path)
    finally:
        holder.kill()
        holder.wait()
    assert files(tmp_path) == LOCK
    finetune(f"{TRAINING} --max_steps 1 --save_strategy no", tmp_path)  # the killed holder blocks nobody


def test_a_training_writes_through_no_link(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="trainer_state.json is a link to .*: remove the link"):
        finetune(f"{TRAINING} --max_steps 1", tmp_path / "out")
    assert not (tmp_path / "precious").exists()


def make_model_folder(path: Path, demo_folder: Path, without: str = "", config: dict | None = None) -> Path:
    shutil.copytree(demo_folder, path)
    if without:
        (path / without).unlink()
    if config is not None:
        original = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(original | config))
    return path


@pytest.mark.parametrize(
    ("without", "config", "says"),
    [
        ("", {"hidden_size": 96}, "other shapes than its config.json says"),
    ],
)
def test_unusable_model_folders_are_refused(without, config, says, tmp_path, demo_folder):
    model = make_model_folder(tmp_path / "model", demo_folder, without, config)
    with pytest.raises(UserError, match=says):
        finetune(f"{TRAINING} --model_name_or_path {model}", tmp_path / "out")


def test_truncated_weights_are_refused(tmp_path, demo_folder):
    model = make_model_folder(tmp_path / "model", demo_folder)
    content = (model / "pytorch_model.bin").read_bytes()
    (model / "pytorch_model.bin").write_bytes(content[:-1000])
    with pytest.raises(UserError, match="pytorch_model.bin is truncated"):
        finetune(f"{TRAINING} --model_name_or_path {model}", tmp_path / "out")


def test_a_prefix_is_no_model(whole_run, tmp_path):
    with pytest.raises(
        UserError,
        match=r"describes 1,794,048 weights, and the weight files have [\d,]+ bytes",
    ):
        finetune(f"{PREDICTION} --model_name_or_path {whole_run}", tmp_path / "out")


@pytest.mark.parametrize("trackers", ["none", "all", "tensorboard"])
def test_trackers_that_are_there_are_no_mistake(trackers, tmp_path):
    finetune(f"{TRAINING} --dry_run --report_to {trackers}", tmp_path)


def test_a_folder_of_runs_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="wandb is not installed here"):
        finetune(f"{TRAINING} --report_to wandb", tmp_path / "out")


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    """Before it is saved, also between two logs: the last checkpoint is whole, and named."""
    flags = FULL.replace("--max_steps 4", "--max_steps 40").replace("1e-3", "1e12")
    flags = flags.replace("--logging_steps 1", "--logging_steps 30")
    with pytest.raises(UserError, match=r"no longer finite \(nan or inf\) at step \d+: lower --learning_rate") as error:
        finetune_full(flags.replace("--save_steps 2", "--save_steps 1"), tmp_path)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    assert str(error.value).endswith(f"Last good checkpoint: {checkpoints[-1]}.")
    for checkpoint in checkpoints:
        assert all(torch.isfinite(weight).all() for weight in load_file(checkpoint / "model.safetensors").values())


def test_weights_are_saved_as_the_original_code_reads_them(tmp_path):
    run_folder, again = tmp_path / "bin", tmp_path / "again"
    finetune_full(f"{FULL} --save_format bin", run_folder)
    assert not list(run_folder.rglob("*.safetensors"))
    saved = torch.load(run_folder / "pytorch_model.bin", weights_only=True)
    loaded = load_model(run_folder).state_dict()
    assert "lm_head.weight" in saved and all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())
    shutil.copytree(run_folder / "checkpoint-2", again / "checkpoint-2")
    shutil.copyfile(run_folder / "run_settings.json", again / "run_settings.json")
    finetune_full(f"{FULL} --save_format bin", again)  # goes on from the .bin file
    assert all(
        torch.equal(tensor, saved[name])
        for name, tensor in torch.load(again / "pytorch_model.bin", weights_only=True).items()
    )


def test_what_was_not_saved_at_the_end_is_taken_from_the_last_checkpoint(full_run, tmp_path):
    """A training that was killed after its last step, or in the middle of the last save, is finished."""
    shutil.copytree(full_run, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    saved = weights.read_bytes()
    weights.write_bytes(saved[:1000])
    finetune_full(FULL, tmp_path / "out")
    assert weights.read_bytes() == saved
    assert not (tmp_path / "out" / "optimizer.pt").exists()
