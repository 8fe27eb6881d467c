"""Downloads by the real program from a hub of one's own: killed, broken, wrong, at once, refused, offline."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import COMMIT, running_hub, sha256
from huggingface_hub import constants

import common.hub.download
from common.errors import UserError

NAME = "THUDM/chatglm3-6b"
# Runs the program once a line, each time in a process of its own, which has to import nothing: says its number and how
# it ended.
RUNS = """
import os, sys
from common.hub.download import main
for line in sys.stdin:
    if (child := os.fork()) == 0:
        os.dup2(2, 1)
        main()
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
SHARD = 2**21


def model_files() -> dict[str, bytes]:
    """A repository like that of ChatGLM3-6B: both formats of weights, Python files, and more that nobody needs."""
    draw = random.Random(0)
    shards = {f"model-0000{number}-of-00003.safetensors": draw.randbytes(SHARD) for number in (1, 2, 3)}
    return {
        ".gitattributes": b"*.bin filter=lfs\n",
        "README.md": b"# ChatGLM3",
        "config.json": json.dumps({"model_type": "chatglm", "padded_vocab_size": 65024}).encode(),
        "configuration_chatglm.py": b"raise SystemExit\n",
        "modeling_chatglm.py": b"raise SystemExit\n",
        "tokenization_chatglm.py": b"raise SystemExit\n",
        "tokenizer_config.json": b"{}",
        "tokenizer.model": draw.randbytes(1000),
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": b'{"weight_map": {}}',
        **shards,
        "pytorch_model.bin.index.json": b'{"weight_map": {}}',
        "pytorch_model-00001-of-00001.bin": draw.randbytes(1000),
        "training_args.bin": b"pickle",
        "consolidated.safetensors": b"other names",
        "flax_model.msgpack": b"flax",
        "tf_model.h5": b"keras",
        "chatglm3.gguf": b"gguf",
        "onnx/model.safetensors": b"onnx",
        "original/config.json": b"{}",
    }


WANTED = {
    "config.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "model.safetensors.index.json",
    *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
}


@pytest.fixture
def hub():
    with running_hub() as server:
        server.repositories[NAME] = model_files()
        yield server


@pytest.fixture
def environ(hub, tmp_path) -> dict[str, str]:
    """Variables with which a program knows this hub alone, and folders of this test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUB"))}
    folders = {"HF_HOME": str(tmp_path / "hf"), "CHATGLM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    return kept | folders | {"HF_ENDPOINT": hub.address, "MODELSCOPE_ENDPOINT": hub.address}


@pytest.fixture
def start(environ):
    """Starts the program of download.sh."""
    processes = []

    def start_download(*arguments: object, **variables: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "common" / "hub" / "download.py"), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environ | variables, **pipes))
        return processes[-1]

    yield start_download
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def download(start):
    """Runs the program to its end, which must be a good one: the folder that its last line says."""

    def run(*arguments: object, **variables: str) -> Path:
        output, errors = (process := start(*arguments, **variables)).communicate(timeout=60)
        assert process.returncode == 0, errors
        return Path(output.splitlines()[-1])

    return run


@pytest.fixture
def download_here(hub, tmp_path, monkeypatch):
    """The function itself, in this process, whose library believes in this hub meanwhile."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    return common.hub.download.download


@pytest.fixture
def refusal(download_here):
    """The sentence with which a download is refused."""

    def refuse(name: str, **options: str) -> str:
        with pytest.raises(UserError) as error:
            download_here(name, **options)
        return str(error.value)

    return refuse


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60  # no test that passes takes so long
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def check_folder(folder: Path, files: dict[str, bytes], names: set[str] = WANTED) -> None:
    assert {file.name for file in folder.iterdir() if file.is_file()} == names
    assert {name: sha256((folder / name).read_bytes()) for name in names} == {
        name: sha256(files[name]) for name in names
    }


def total_size(files: dict[str, bytes]) -> int:
    return sum(len(files[name]) for name in WANTED)


def test_a_short_name_brings_the_checkpoint_and_nothing_else(hub, download, tmp_path):
    folder = download("chatglm3-6b")
    assert folder == tmp_path / "hf" / "hub" / "models--THUDM--chatglm3-6b" / "snapshots" / COMMIT
    check_folder(folder, hub.repositories[NAME])
    assert sorted(hub.asked()) == sorted(WANTED)


def test_bin_weights_are_taken_where_there_are_no_others(hub, download):
    hub.repositories["me/chatglm-6b"] = files = {
        "config.json": b"{}",
        "ice_text.model": b"words",
        "pytorch_model-00001-of-00001.bin": b"weights",
        "pytorch_model.bin.index.json": b"{}",
        "optimizer.bin": b"not to load",
        "modeling_chatglm.py": b"raise SystemExit",
    }
    check_folder(download("me/chatglm-6b"), files, set(files) - {"optimizer.bin", "modeling_chatglm.py"})


def test_killed_twenty_times_it_goes_on_where_it_was(hub, environ, tmp_path):
    """Five downloads, each killed at four random moments: no byte that was written is asked for again."""
    draw = random.Random(1)
    files, total = hub.repositories[NAME], total_size(hub.repositories[NAME])
    names = {sha256(files[name]): name for name in WANTED}
    hub.rate = 8e6
    command = [sys.executable, "-c", RUNS, NAME]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    kills = resumed = 0
    with subprocess.Popen(command, env=environ, bufsize=1, **pipes) as runs:
        for _ in range(5):
            hub.sent.clear()
            there: dict[str, int] = {}
            for moment in [*sorted(draw.uniform(0, total) for _ in range(4)), None]:
                hub.starts.clear()
                runs.stdin.write("\n")
                child = int(runs.stdout.readline())
                if moment is not None:
                    wait_until(lambda enough=moment: hub.sent.total() >= enough)
                    os.kill(child, signal.SIGKILL)
                    kills += int(runs.stdout.readline()) == -signal.SIGKILL
                else:
                    assert int(runs.stdout.readline()) == 0
                first_bytes = dict(reversed(hub.starts))
                assert all(first_bytes.get(name, size) == size for name, size in there.items())
                resumed += len(first_bytes.keys() & there.keys())
                partials = tmp_path.glob("**/*.incomplete")
                there = {names[file.stem]: file.stat().st_size for file in partials if file.stem in names}
            check_folder(tmp_path / "hf" / "hub" / "models--THUDM--chatglm3-6b" / "snapshots" / COMMIT, files)
            assert there == {} and hub.sent.total() < 2 * total
            shutil.rmtree(tmp_path / "hf")
        runs.stdin.close()
    assert kills == 20 and resumed > 20


def test_of_two_at_once_one_downloads_and_the_other_waits(hub, start, download):
    hub.gate.clear()
    first = start(NAME)
    wait_until(hub.asked)
    second = start("chatglm3-6b")
    assert second.stderr.readline().startswith(f"waiting for model {NAME}: held by process {first.pid} on ")
    hub.gate.set()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0
    assert outputs[0] == outputs[1] != ""
    assert sorted(hub.asked()) == sorted(WANTED)
    assert hub.sent.total() == total_size(hub.repositories[NAME])


def test_a_complete_model_needs_no_hub(hub, download):
    folder = download(NAME)
    asked = len(hub.requests)
    assert download(NAME, HF_ENDPOINT="http://127.0.0.1:9") == folder
    assert download(NAME, HF_HUB_OFFLINE="1") == folder
    assert download(NAME) == folder and len(hub.requests) == asked


def test_broken_connections_are_gone_on_with(hub, download):
    shard = "model-00002-of-00003.safetensors"
    hub.break_at[shard] = SHARD // 3 + 1
    check_folder(download(NAME), hub.repositories[NAME])
    assert hub.asked().count(shard) == 3 and hub.sent[shard] == SHARD


def test_a_hub_that_can_not_go_on_starts_over(hub, download_here, tmp_path):
    """Its answer to a range is the whole file, which must not be appended."""
    hub.ranges = False
    content = hub.repositories[NAME]["model-00002-of-00003.safetensors"]
    blobs = tmp_path / "hf" / "hub" / "models--THUDM--chatglm3-6b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(content)}.incomplete").write_bytes(content[: SHARD // 2])
    check_folder(download_here(NAME), hub.repositories[NAME])


def test_connections_that_bring_nothing_are_given_up(hub, refusal, monkeypatch):
    shard = "model-00002-of-00003.safetensors"
    hub.break_at[shard] = 0
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert f"{NAME} is not here and can't be downloaded" in refusal(NAME)
    assert hub.asked().count(shard) == common.hub.download.FRUITLESS


def test_a_wrong_file_is_fetched_once_more_then_named(hub, download, refusal, tmp_path):
    shard = "model-00001-of-00003.safetensors"
    hub.spoilt.update({shard: 1, "config.json": 1})
    check_folder(download(NAME), hub.repositories[NAME])
    assert {path for path in WANTED if hub.asked().count(path) == 2} == {shard, "config.json"}
    shutil.rmtree(tmp_path / "hf")
    hub.spoilt[shard] = 2
    assert f"{shard} came twice with another content than its hash says" in refusal(NAME)
    assert not list(tmp_path.glob(f"**/{sha256(hub.repositories[NAME][shard])}*"))


def test_weights_that_changed_are_fetched_again_but_not_a_text_of_the_user(hub, download):
    folder = download(NAME)
    shard = folder / "model-00003-of-00003.safetensors"
    with open(shard, "r+b") as content:
        content.write(b"rotten bits")
    os.utime(folder / "tokenizer.model")  # only its time has changed
    (folder / "config.json").write_text('{"generation": "chatglm3"}')
    hub.forget()
    assert download(NAME) == folder
    assert hub.asked() == [shard.name]
    assert sha256(shard.read_bytes()) == sha256(hub.repositories[NAME][shard.name])
    assert (folder / "config.json").read_text() == '{"generation": "chatglm3"}'


def test_a_plain_folder_is_filled_and_what_a_user_has_there_is_left_alone(hub, download, refusal, tmp_path):
    folder = tmp_path / "plain"
    assert download(NAME, "--local_dir", folder) == folder
    check_folder(folder, hub.repositories[NAME])
    assert not any(file.is_symlink() for file in folder.iterdir())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("my own")
    assert f"{mine / 'config.json'} is there and is not the hub's" in refusal(NAME, local_dir=str(mine))
    assert [file.name for file in mine.iterdir()] == ["config.json"] and (mine / "config.json").read_text() == "my own"


def test_modelscope_keeps_the_same_promises(hub, start, download):
    hub.repositories = {"ZhipuAI/chatglm3-6b": hub.repositories[NAME]}
    hub.rate, hub.spoilt["config.json"] = 8e6, 1
    process = start("chatglm3-6b", HUB="modelscope")
    wait_until(lambda: hub.sent.total() > SHARD)
    process.kill()
    folder = download(NAME, HUB="modelscope")
    check_folder(folder, hub.repositories["ZhipuAI/chatglm3-6b"])
    assert download("zai-org/chatglm3-6b", HUB="modelscope", HF_HUB_OFFLINE="1") == folder
    assert folder.name == "chatglm3-6b" and folder.parent.name == "ZhipuAI"
    assert max(start for _, start in hub.starts) > 0


def test_the_cache_is_shared_with_hugging_faces_own_library(hub, environ, download, tmp_path):
    """What ours has downloaded, theirs finds; what theirs has downloaded, ours does not fetch again, only checks."""
    program = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:]))"

    def theirs() -> Path:
        command = [sys.executable, "-c", program, NAME, *sorted(WANTED)]
        return Path(subprocess.check_output(command, env=environ, stderr=subprocess.DEVNULL, text=True).strip())

    folder = download(NAME)
    hub.forget()
    assert theirs() == folder and hub.asked() == []
    shutil.rmtree(tmp_path / "hf")
    assert theirs() == folder and sorted(hub.asked()) == sorted(WANTED)
    shutil.rmtree(tmp_path / "cache")
    hub.forget()
    assert download(NAME, HF_ENDPOINT="http://127.0.0.1:9") == folder  # unchecked, without a hub
    assert download(NAME) == folder and hub.asked() == []


def test_what_the_hub_refuses_is_said(hub, refusal):
    assert "there is no folder me/nothing, and" in (sentence := refusal("me/nothing")) and "HF_TOKEN" in sentence
    hub.repositories |= {"me/gated": {}, "me/empty": {"config.json": b"{}", "model.gguf": b""}}
    hub.statuses["me/gated"] = (403, "GatedRepo")
    assert f"me/gated is gated: accept its terms at {hub.address}/me/gated" in refusal("me/gated")
    assert "me/empty is no model in the format of transformers: it has no weights" in refusal("me/empty")
    hub.statuses[NAME] = (404, "RevisionNotFound")
    assert f"{NAME} has no revision v9" in refusal(NAME, revision="v9")


def test_without_a_network_it_is_said_what_helps(start):
    process = start(NAME, HF_ENDPOINT="http://127.0.0.1:9")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == "" and errors.startswith("error: ") and errors.count("\n") == 1
    assert all(word in errors for word in (NAME, "http://127.0.0.1:9", "HF_ENDPOINT", "HUB=modelscope", "folder"))


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(hub, refusal, tmp_path):
    hub.claimed_sizes["model-00001-of-00003.safetensors"] = 10**18
    sentence = refusal(NAME)
    assert f"{NAME} needs 1,000,000,000.00 GB more in {tmp_path / 'hf'}" in sentence
    assert "GB are free" in sentence and "HF_HOME" in sentence
    assert hub.asked() == []


@pytest.mark.parametrize("name", ["chatglm4", "./THUDM/chatglm3-6b", "a--b/c", ""])
def test_unknown_names_are_answered_with_the_known_ones(name, refusal):
    assert refusal(name).startswith(f"no model is known as {name}: give chatglm-6b, ")


def test_without_a_name_the_known_ones_are_listed(start):
    process = start()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == "" and "chatglm2-6b-32k" in errors


def test_only_the_config_can_be_fetched(hub, download_here, monkeypatch):
    """And edited, before the weights come."""
    content = hub.repositories[NAME]["config.json"]
    assert common.hub.download.fetch_config("chatglm3-6b").read_bytes() == content
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = common.hub.download.fetch_config("chatglm3-6b")
    assert config.read_bytes() == content
    assert sorted(hub.asked()) == ["config.json", "tokenizer_config.json"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config.write_text('{"generation": "chatglm3"}')
    assert download_here(NAME) == config.parent
    assert config.read_text() == '{"generation": "chatglm3"}'
    assert sorted(hub.asked()) == sorted(WANTED)


def test_nothing_heavy_is_imported():
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common.hub.download; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert not {"torch", "transformers", "numpy", "datasets"} & set(modules)
