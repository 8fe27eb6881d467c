"""Old .bin weights: converted to safetensors once, by one of any number of processes, and then mapped by all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.loading import load_model
from common.models import weights
from common.models.weights import weights_folder

# Says that it is there, waits for a line on stdin, and prints where the weights are read from.
ASK = """
import sys
from pathlib import Path
from common.models import weights
weights.CONVERT_FROM = 0
print("ready", flush=True)
sys.stdin.readline()
print(weights.weights_folder(Path(sys.argv[1])))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a conversion of whatever size."""
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "CONVERT_FROM", 0)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def checkpoint(tmp_path, demo_folder) -> Path:
    """The demo in two shards, with a generation_config.json of its own."""
    folder = tmp_path / "chatglm-6b"
    shutil.copytree(demo_folder, folder)
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = {name: names[index % 2] for index, name in enumerate(stored)}
    for shard in names:
        torch.save({name: stored[name] for name in stored if weight_map[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "generation_config.json").write_text('{"top_p": 0.3, "do_sample": true}')
    return folder


def load_converted(folder: Path) -> dict[str, torch.Tensor]:
    """What the files hold, each name by the file that the index says."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    return {name: stored[file][name] for name, file in index["weight_map"].items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_a_converted_model_is_the_same(checkpoint, cache, monkeypatch, capsys):
    monkeypatch.setenv("CONVERT_WEIGHTS", "false")
    expected = load_model(checkpoint, torch.float16)
    assert not cache.exists()
    monkeypatch.delenv("CONVERT_WEIGHTS")
    model = load_model(checkpoint, torch.float16)
    assert same(model.state_dict(), expected.state_dict())
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.generation_config.top_p == 0.3
    (target,) = cache.iterdir()
    said = capsys.readouterr().err
    assert f"converting {checkpoint} to safetensors, once: 0.0 GB in {target} (CONVERT_WEIGHTS=false" in said
    load_model(checkpoint, torch.float16)
    assert "converting" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("convert", ["true", "false"])
def test_weights_on_the_cpu_are_the_files_pages(convert, checkpoint, cache, monkeypatch):
    """A rank that needs no other dtype holds no copy; the demo's weights are all float16 but for the LayerNorms."""
    monkeypatch.setenv("CONVERT_WEIGHTS", convert)
    model = load_model(checkpoint, torch.float16)
    stored = cache if convert == "true" else checkpoint
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(stored) in line:
            start, end = line.split()[0].split("-")
            mapped.append(range(int(start, 16), int(end, 16)))
    in_memory = [
        name
        for name, weight in model.named_parameters()
        if not any(weight.data_ptr() in pages for pages in mapped) and "layernorm" not in name
    ]
    assert in_memory == []


def test_training_mapped_weights_leaves_the_file_alone(checkpoint, cache):
    before = load_model(checkpoint, torch.float16)
    changed = load_model(checkpoint, torch.float16)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.add_(1)
    assert same(load_model(checkpoint, torch.float16).state_dict(), before.state_dict())


def test_many_processes_convert_once(checkpoint, tmp_path):
    """The lines of those that wait may come or not: the conversion may be over before they ask."""
    env = os.environ | {"CHATGLM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", ASK, str(checkpoint)]
    processes = [subprocess.Popen(command, env=env, text=True, **pipes) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers, said = zip(*(process.communicate() for process in processes), strict=True)
    assert "".join(said).count("converting") == 1
    assert [str(folder) for folder in (tmp_path / "cache" / "weights").iterdir()] == [answers[0].strip()]
    assert len(set(answers)) == 1


def test_a_killed_conversion_is_repeated(checkpoint, cache, monkeypatch):
    child = os.fork()
    if child == 0:  # dies when all but the index is written
        monkeypatch.setattr(weights, "write_json", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        weights_folder(checkpoint)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (partial,) = cache.iterdir()
    assert partial.suffix == ".partial"
    assert len(list(partial.iterdir())) == 2
    target = weights_folder(checkpoint)
    assert list(cache.iterdir()) == [target]
    assert len(load_converted(target)) == 82


def test_a_changed_checkpoint_is_converted_again(checkpoint, cache):
    """And what was converted of its former content goes."""
    first = weights_folder(checkpoint)
    shard = checkpoint / "pytorch_model-00002-of-00002.bin"
    changed = {name: tensor + 1 for name, tensor in torch.load(shard, weights_only=True).items()}
    torch.save(changed, shard)
    os.utime(shard, (1, 1))
    second = weights_folder(checkpoint)
    assert list(cache.iterdir()) == [second] != [first]
    stored = load_converted(second)
    assert same({name: stored[name] for name in changed}, changed)


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_strided_and_very_old_weights(zipped, tmp_path, cache):
    """What shares storage gets its own, what is no tensor is left out, and plain pickles are read without mapping."""
    tied = torch.randn(4, 6)
    stored = {"a": tied, "b": tied, "part": tied[1:3], "turned": tied.T, "number": torch.tensor(3), "step": 7}
    torch.save(stored, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    stored.pop("step")
    assert same(load_converted(weights_folder(tmp_path)), stored)


def test_what_is_not_converted(demo_folder, checkpoint, cache, monkeypatch):
    monkeypatch.setenv("CONVERT_WEIGHTS", "False")
    assert weights_folder(checkpoint) == checkpoint
    monkeypatch.delenv("CONVERT_WEIGHTS")
    monkeypatch.setattr(weights, "CONVERT_FROM", 64 * 2**20)
    assert weights_folder(demo_folder) == demo_folder
    monkeypatch.setattr(weights, "CONVERT_FROM", 0)
    save_file({"a": torch.zeros(1)}, checkpoint / "model.safetensors")
    assert weights_folder(checkpoint) == checkpoint
    assert not cache.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_costs_a_line(error, checkpoint, cache, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(weights, "save_file", fails)
    assert weights_folder(checkpoint) == checkpoint
    assert f"{checkpoint} is read as it is: it can't be converted ({error})." in capsys.readouterr().err
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1))
    assert weights_folder(checkpoint) == checkpoint
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{checkpoint} is read as it is: as safetensors it takes 0.0 GB, and {cache} has 0.0 GB left." in said


@pytest.mark.parametrize("content", [b"PK and nothing else", b"\x80\x02}q\x00", b"version https://git-lfs"])
def test_a_file_that_holds_no_weights_is_named(content, checkpoint, cache):
    (checkpoint / "pytorch_model-00002-of-00002.bin").write_bytes(content)
    with pytest.raises(
        UserError, match=r"pytorch_model-00002-of-00002.bin can't be read \(.*copy or download it again"
    ):
        weights_folder(checkpoint)


def test_weights_go_to_the_device_that_is_named(demo_folder):
    assert load_model(demo_folder, device="cpu").device == torch.device("cpu")
    assert load_model(demo_folder, device="meta").device == torch.device("meta")
