"""Two processes under every engine train what one process trains, save it whole, and go on from their checkpoints."""

import json
import os
import time
from pathlib import Path

import psutil
import pytest
import torch
from engine_runs import STEPS, interrupt, reload_difference, run, start, train
from safetensors.torch import load_file

from common.loading import load_model
from common.output import is_complete_checkpoint

# What DeepSpeed compiles takes most of a minute: once a machine, not once a test run.
EXTENSIONS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatglm-tuning" / "extensions"
# The deepspeed.json of the official ChatGLM-6B repository: its settings, without those that we would say ourselves.
OFFICIAL = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
    },
}


@pytest.fixture(autouse=True)
def compiled_extensions(monkeypatch):
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """method -> (the losses, the folder) of a training in one process, without any engine."""
    done: dict[str, tuple[list[float], Path]] = {}

    def expected(method: str) -> tuple[list[float], Path]:
        if method not in done:
            folder = tmp_path_factory.mktemp(method) / "out"
            done[method] = train(method, "DDP", folder, processes=1), folder
        return done[method]

    return expected


def assert_same_weights(folder: Path, expected: Path) -> None:
    """Adam moves every weight by about the learning rate, whatever its gradient: noise there shows in few of them."""
    name = next(file.name for file in expected.iterdir() if file.name.endswith("model.safetensors"))
    ours, theirs = load_file(folder / name), load_file(expected / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.shape == ours[key].shape
        assert (ours[key] - tensor).abs().mean() < 1e-4, key


@pytest.mark.parametrize(("engine", "method"), [("ZeRO-3", "full"), ("FSDP2", "lora"), ("DDP", "full")])
def test_two_processes_equal_one(engine, method, one_process, tmp_path):
    """Also after an interruption: the second half is trained again from the checkpoint in the middle."""
    expected, folder = one_process(method)
    output = tmp_path / "out"
    assert train(method, engine, output) == pytest.approx(expected, abs=1e-4)
    assert_same_weights(output, folder)
    assert reload_difference(method, output) < 1e-5
    interrupt(output)
    assert train(method, engine, output) == pytest.approx(expected, abs=1e-4)
    assert_same_weights(output, folder)


def test_the_official_deepspeed_file_runs_unchanged(one_process, tmp_path):
    """ZeRO stage 2, with a whole checkpoint in the format that the original code reads; later in another number."""
    expected, _ = one_process("full")
    (tmp_path / "deepspeed.json").write_text(json.dumps(OFFICIAL))
    flags = ["--deepspeed", str(tmp_path / "deepspeed.json"), "--save_format", "bin", "--save_total_limit", "1"]
    output = tmp_path / "out"
    assert train("full", "DDP", output, *flags) == pytest.approx(expected, abs=1e-4)
    saved = torch.load(output / "pytorch_model.bin", weights_only=True)
    assert "transformer.layers.0.attention.rotary_emb.inv_freq" in saved  # which the original code asks for
    assert not list(output.rglob("model*.safetensors"))
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    live = load_model(output)
    assert all(
        torch.equal(weight, saved[name]) for name, weight in live.state_dict().items() if name != "lm_head.weight"
    )

    code, said = run("full", "DDP", output, *flags, "--max_steps", "6", processes=1)
    assert code == 2
    assert "was written by 2 processes" in said and "over 1" in said and "Traceback" not in said


def test_a_prefix_under_zero_1(one_process, tmp_path):
    expected, folder = one_process("ptuning")
    output = tmp_path / "out"
    assert train("ptuning", "ZeRO-1", output) == pytest.approx(expected, abs=1e-4)
    ours, theirs = (torch.load(path / "pytorch_model.bin", weights_only=True) for path in (output, folder))
    key = "transformer.prefix_encoder.embedding.weight"
    assert list(ours) == list(theirs) == [key]
    assert (ours[key] - theirs[key]).abs().mean() < 1e-4


def test_a_killed_process_ends_all_of_them(tmp_path):
    """One sentence, nobody is left, and the checkpoint that was there is whole."""
    output = tmp_path / "out"
    job = start("full", "DDP", output, "--max_steps", "100000", "--save_steps", "20")
    try:
        while not (output / "checkpoint-20" / "trainer_state.json").exists():
            assert job.poll() is None
            time.sleep(0.2)
        family = psutil.Process(job.pid).children(recursive=True)
        workers = [process for process in family if "engine_program.py" in " ".join(process.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        said = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode == 1
    assert "was killed by SIGKILL" in said and "Traceback" not in said
    assert not [process for process in family if process.is_running()]
    assert is_complete_checkpoint(output / "checkpoint-20")
