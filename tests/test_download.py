"""Downloads from a hub of one's own: killed, broken, wrong, at once, refused, offline."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from conftest import ROOT
from hub_server import COMMIT, Hub, running_hub
from huggingface_hub import constants

import common.hub.download
from common.errors import UserError
from common.files import LARGEST_TEXT
from common.hub.download import download, find_complete
from common.locking import cache_folder

NAME = "THUDM/chatglm3-6b"
# For every line of input a child process that downloads and has to import nothing; prints its id and exit code.
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
GUARD = 300  # seconds after which a test that hangs fails; none that passes comes near
NOWHERE = "http://127.0.0.1:9"
SHARD = 2**21


def model_files() -> dict[str, bytes]:
    """A repository like that of ChatGLM3-6B: both formats of weights, Python files, and more that nobody needs."""
    draw = random.Random(0)
    entry = {"dtype": "U8", "shape": [SHARD - 100], "data_offsets": [0, SHARD - 100]}
    header = json.dumps({"weight": entry}).ljust(92).encode()
    start = len(header).to_bytes(8, "little") + header
    shards = {f"model-0000{number}-of-00003.safetensors": start + draw.randbytes(SHARD - 100) for number in (1, 2, 3)}
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
        "model.safetensors.index.json": json.dumps({"weight_map": {name: name for name in shards}}).encode(),
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
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub with one model, the only one that this process and its children know, and folders of this test."""
    with running_hub() as server:
        server.repositories[NAME] = model_files()
        for name in ("HUB", "HF_HUB_CACHE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        folders = {"HF_HOME": tmp_path / "hf", "CHATGLM_CACHE": tmp_path / "cache", "PYTHONPATH": ROOT}
        folders["SSL_CERT_DIR"] = tmp_path  # to read the certificates of the system takes a process a quarter second
        hubs = {"HF_ENDPOINT": server.address, "MODELSCOPE_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0"}
        for name, value in {**folders, **hubs}.items():
            monkeypatch.setenv(name, str(value))
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@contextmanager
def unreachable() -> Iterator[None]:
    """No hub answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", NOWHERE)
        patch.setenv("MODELSCOPE_ENDPOINT", NOWHERE)
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the model belongs."""
    return tmp_path / "hf" / "hub" / "chatglm-tuning" / "main" / NAME


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, *command], bufsize=1, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def refusal(name: str, **options: str) -> str:
    """The sentence with which a download is refused."""
    with pytest.raises(UserError) as error:
        download(name, **options)
    return str(error.value)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GUARD
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def check_folder(folder: Path, files: dict[str, bytes], names: set[str] = WANTED) -> None:
    assert {file.name for file in folder.iterdir()} == names
    assert all((folder / name).read_bytes() == files[name] for name in names)


def test_a_short_name_brings_the_checkpoint_and_nothing_else(hub, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["download.sh", "chatglm3-6b"])
    common.hub.download.main()
    assert capsys.readouterr().out == f"{folder}\n"
    check_folder(folder, hub.repositories[NAME])
    assert sorted(hub.asked()) == sorted(WANTED)
    assert download(NAME, cache_dir=str(tmp_path / "other")).is_relative_to(tmp_path / "other")


def test_bin_weights_are_taken_where_there_are_no_others(hub):
    hub.repositories["me/chatglm-6b"] = files = {
        "config.json": b"{}",
        "ice_text.model": b"words",
        "pytorch_model-00001-of-00001.bin": b"weights",
        "pytorch_model.bin.index.json": b"{}",
        "optimizer.bin": b"not to load",
        "modeling_chatglm.py": b"raise SystemExit",
    }
    check_folder(download("me/chatglm-6b"), files, set(files) - {"optimizer.bin", "modeling_chatglm.py"})


def test_killed_twenty_times_it_goes_on_where_it_was(hub, folder):
    """Five downloads, each killed at four random moments: no byte that was written is asked for again."""
    draw = random.Random(1)
    files, hub.rate = hub.repositories[NAME], 8e6
    total = sum(len(files[name]) for name in WANTED)
    kills = resumed = 0
    with started("-c", RUNS, NAME) as runs:
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
                there = {file.stem: file.stat().st_size for file in folder.glob("*.incomplete")}
            check_folder(folder, files)
            assert there == {}
            shutil.rmtree(folder)
    assert kills == 20 and resumed > 20


def test_of_two_at_once_one_downloads_and_the_other_waits(hub, folder, capfd):
    hub.gate.clear()
    with started("-m", "common.hub.download", NAME) as first:
        wait_until(hub.asked)
        second = Thread(target=download, args=("chatglm3-6b",), daemon=True)
        second.start()
        errors: list[str] = []
        wait_until(lambda: errors.append(capfd.readouterr().err) or any(errors))
        assert "".join(errors).startswith(f"waiting for model {NAME}: held by process {first.pid} on ")
        hub.gate.set()
        assert first.communicate(timeout=GUARD)[0] == f"{folder}\n" and first.returncode == 0
        second.join(timeout=GUARD)
    assert find_complete(NAME) == folder
    assert sorted(hub.asked()) == sorted(WANTED) and {start for _, start in hub.starts} == {0}


def test_a_complete_model_needs_no_hub(hub, folder, monkeypatch):
    assert find_complete(NAME) is None
    assert download(NAME) == folder
    hub.forget()
    with unreachable():
        assert download(NAME) == download(NAME, weights=False) == find_complete("chatglm3-6b") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(NAME) == find_complete(NAME) == folder
    assert find_complete(NAME, "v2") is find_complete(NAME, "main", "/other") is None
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert find_complete(NAME) is None and download(NAME, weights=False) == folder
    assert "can't be downloaded" in refusal(NAME)  # what is known to be incomplete is not taken offline


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_in_a_folder_of_another_user_the_owner_and_the_remedies_are_named(hub, monkeypatch):
    """What is complete there is taken all the same."""
    nobody, place = 65534, Path(tempfile.mkdtemp(prefix="shared-models-"))
    try:
        place.chmod(0o755)
        (place / "cache").mkdir()
        os.chown(place / "cache", nobody, nobody)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(place / "token"))
        complete = download(NAME)
        monkeypatch.setenv("CHATGLM_CACHE", str(place / "cache"))
        hub.repositories["me/chatglm3-6b"] = hub.repositories[NAME]
        os.seteuid(nobody)
        assert download(NAME) == complete
        sentence = refusal("me/chatglm3-6b")
    finally:
        os.seteuid(0)
        shutil.rmtree(place)
    assert f"Permission denied; {complete.parent.parent} belongs to user root." in sentence
    assert sentence.endswith("Choose another folder by HF_HOME, --cache_dir or --local_dir.")


def test_broken_connections_are_resumed(hub):
    shard = "model-00002-of-00003.safetensors"
    hub.break_at[shard] = SHARD // 3 + 1
    hub.failing[shard] = 1
    check_folder(download(NAME), hub.repositories[NAME])
    assert hub.asked().count(shard) == 3 and hub.sent[shard] == SHARD


def test_a_hub_that_can_not_resume_starts_over(hub, folder):
    """Its answer to a range is the whole file, which must not be appended."""
    hub.ranges = False
    content = hub.repositories[NAME]["model-00002-of-00003.safetensors"]
    folder.mkdir(parents=True)
    (folder / "model-00002-of-00003.safetensors.incomplete").write_bytes(content[: SHARD // 2])
    check_folder(download(NAME), hub.repositories[NAME])


def test_connections_that_bring_nothing_are_given_up(hub, monkeypatch):
    shard = "model-00002-of-00003.safetensors"
    hub.break_at[shard] = 0
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert f"{NAME} is not here and can't be downloaded" in refusal(NAME)
    assert hub.asked().count(shard) == common.hub.download.ATTEMPTS
    hub.break_at.clear()
    hub.claimed_sizes[shard] = SHARD + 1
    assert f"{shard} ends after {SHARD:,} bytes instead of {SHARD + 1:,}" in refusal(NAME)


def test_a_wrong_file_is_fetched_once_more_then_named(hub, folder):
    shard = "model-00001-of-00003.safetensors"
    hub.spoilt.update({shard: 1, "config.json": 1})
    check_folder(download(NAME), hub.repositories[NAME])
    assert {path for path in WANTED if hub.asked().count(path) == 2} == {shard, "config.json"}
    shutil.rmtree(folder)
    hub.spoilt[shard] = 2
    assert f"{shard} arrived twice, both times with a wrong hash" in refusal(NAME)
    assert not list(folder.glob(f"{shard}*"))


def test_weights_that_changed_are_fetched_again_but_not_a_text_of_the_user(hub, folder):
    download(NAME)
    shard = folder / "model-00003-of-00003.safetensors"
    with open(shard, "r+b") as content:
        content.write(b"rotten bits")
    os.utime(folder / "tokenizer.model")  # only its time has changed
    (folder / "config.json").write_text('{"generation": "chatglm3"}')
    hub.forget()
    assert download(NAME) == folder
    assert hub.asked() == [shard.name]
    assert shard.read_bytes() == hub.repositories[NAME][shard.name]
    assert (folder / "config.json").read_text() == '{"generation": "chatglm3"}'


def test_a_plain_folder_is_filled_and_what_a_user_has_there_is_left_alone(hub, tmp_path):
    plain = tmp_path / "plain"
    assert download(NAME, local_dir=str(plain)) == plain
    check_folder(plain, hub.repositories[NAME])
    with unreachable():
        assert download(NAME, local_dir=str(plain)) == plain
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("my own")
    assert f"{mine / 'config.json'} differs from the hub's file" in refusal(NAME, local_dir=str(mine))
    assert [file.name for file in mine.iterdir()] == ["config.json"] and (mine / "config.json").read_text() == "my own"


def test_modelscope_keeps_the_same_promises(hub, monkeypatch):
    monkeypatch.setenv("HUB", "modelscope")
    hub.repositories = {"ZhipuAI/chatglm3-6b": hub.repositories[NAME]}
    hub.rate, hub.spoilt["config.json"] = 8e6, 1
    with started("-m", "common.hub.download", "chatglm3-6b"):
        wait_until(lambda: hub.sent.total() > SHARD)
    hub.rate = 0
    folder = download(NAME)
    check_folder(folder, hub.repositories["ZhipuAI/chatglm3-6b"])
    assert max(start for _, start in hub.starts) > 0
    with unreachable():
        assert download("zai-org/chatglm3-6b") == folder
    assert folder.name == "chatglm3-6b" and folder.parent.name == "ZhipuAI"


def test_what_hugging_faces_cache_has_is_verified_and_not_downloaded_again(hub, folder, capfd, tmp_path):
    shard = "model-00002-of-00003.safetensors"
    snapshot = Path(huggingface_hub.snapshot_download(NAME, allow_patterns=sorted(WANTED)))
    assert snapshot.name == COMMIT and sorted(hub.asked()) == sorted(WANTED)
    hub.forget()
    with unreachable():
        assert download(NAME) == download(NAME, weights=False) == snapshot
        assert "is taken as it is, unchecked" in capfd.readouterr().err
        blob = (snapshot / shard).resolve()
        moved = blob.rename(tmp_path / "blob")
        assert "can't be downloaded" in refusal(NAME)  # only what is whole is taken
        moved.rename(blob)
    assert download(NAME) == folder and hub.asked() == []
    check_folder(folder, hub.repositories[NAME])
    shutil.rmtree(tmp_path / "cache")
    blob.write_bytes(b"rotten bits")
    assert download(NAME) == folder and hub.asked() == [shard]
    assert blob.read_bytes() == b"rotten bits" and not (folder / shard).is_symlink()
    shutil.rmtree(snapshot.parents[1])
    hub.forget()
    assert download(NAME) == folder and sorted(hub.asked()) == sorted(WANTED - {shard})
    shutil.rmtree(tmp_path / "cache")
    with unreachable():
        assert download(NAME) == folder  # downloaded by another user, whose records we do not have


def test_a_broken_record_and_a_folder_in_place_of_a_file_are_mended(hub):
    folder = download(NAME)
    (record,) = (cache_folder() / "models").iterdir()
    whole = record.read_text()
    entry = '{"files": {"config.json": %s}}'
    for text in (
        "",
        "[]",
        "{}",
        '{"files": 7}',
        *(entry % value for value in ("7", "{}", '{"digest": 7, "stamp": 1}')),
    ):
        record.write_text(text)
        hub.forget()
        assert download(NAME) == folder and hub.asked() == []
        assert record.read_text() == whole
    (folder / "config.json").unlink()
    (folder / "config.json" / "other").mkdir(parents=True)
    assert download(NAME) == folder and hub.asked() == ["config.json"]
    check_folder(folder, hub.repositories[NAME])


def test_what_the_hub_refuses_is_said(hub):
    assert "there is no folder me/nothing, and" in (sentence := refusal("me/nothing")) and "HF_TOKEN" in sentence
    hub.repositories |= {"me/gated": {}, "me/empty": {"config.json": b"{}", "model.gguf": b""}}
    hub.statuses["me/gated"] = (403, "GatedRepo")
    assert f"me/gated is gated: accept its terms at {hub.address}/me/gated" in refusal("me/gated")
    assert "me/empty is no model in the format of transformers: it has no weights" in refusal("me/empty")
    hub.statuses[NAME] = (404, "RevisionNotFound")
    assert f"{NAME} has no revision v9" in refusal(NAME, revision="v9")


def test_the_users_token_reaches_hugging_face_and_no_other_host(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(NAME)
    assert hub.tokens == {"hub": {"Bearer hf_secret"}, "cdn": {None}}


def test_without_a_network_the_sentence_helps_and_nothing_heavy_is_imported(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    program = "import sys, common.hub.download; print(*sys.modules, flush=True); common.hub.download.main()"
    run = subprocess.run([sys.executable, "-c", program, NAME], capture_output=True, text=True, timeout=GUARD)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert all(word in run.stderr for word in (NAME, NOWHERE, "HF_ENDPOINT", "HUB=modelscope", "folder"))
    assert not {"torch", "transformers", "numpy", "datasets"} & set(run.stdout.split())


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(hub, tmp_path):
    hub.claimed_sizes["model-00001-of-00003.safetensors"] = 10**18
    sentence = refusal(NAME)
    assert f"{NAME} needs 1,000,000,000.00 GB more in {tmp_path / 'hf'}" in sentence
    assert "GB are free" in sentence and "HF_HOME" in sentence
    assert hub.asked() == []


@pytest.mark.parametrize("name", ["chatglm4", "./THUDM/chatglm3-6b", "a--b/c", ""])
def test_unknown_names_are_answered_with_the_known_ones(name):
    assert refusal(name).startswith(f"no model is known as {name}: give chatglm-6b, ")


def test_without_a_name_the_known_ones_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["download.sh"])
    with pytest.raises(SystemExit, match="2"):
        common.hub.download.main()
    output, errors = capsys.readouterr()
    assert output == "" and "chatglm2-6b-32k" in errors


def test_the_small_files_come_first_and_may_be_edited_before_the_weights_come(hub, folder, monkeypatch):
    assert download("chatglm3-6b", weights=False) == folder
    small = {name for name in WANTED if not name.endswith(".safetensors")}
    check_folder(folder, hub.repositories[NAME], small)
    assert sorted(hub.asked()) == sorted(small) and find_complete(NAME) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("chatglm3-6b", weights=False) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (folder / "config.json").write_text('{"generation": "chatglm3"}')
    assert download(NAME) == find_complete(NAME) == folder
    assert (folder / "config.json").read_text() == '{"generation": "chatglm3"}'
    assert sorted(hub.asked()) == sorted(WANTED)


# A hub that lies


def listed(**entry: object) -> Callable[[dict], dict]:
    """Changes what the listing says of config.json, in the words of either hub."""

    def change(listing: dict) -> dict:
        files = listing["siblings"] if "siblings" in listing else listing["Data"]["Files"]
        next(file for file in files if "config.json" in (file.get("rfilename"), file.get("Path"))).update(entry)
        return listing

    return change


def also_listed(name: str) -> Callable[[dict], dict]:
    """One more file, with the content of config.json."""

    def change(listing: dict) -> dict:
        files = listing["siblings"] if "siblings" in listing else listing["Data"]["Files"]
        files.append(next(file for file in files if "config.json" in file.values()) | {"rfilename": name, "Path": name})
        return listing

    return change


OUTSIDE = "../" * 9 + "tmp/evil"
LIES = {  # what the hub says in place of the truth, and what the sentence says
    "a size below 0": (listed(size=-1, Size=-1), "config.json with -1 bytes"),
    "a size of text": (listed(size="12", Size="12"), "config.json with '12' bytes"),
    "a size of 1.5": (listed(size=1.5, Size=1.5), "config.json with 1.5 bytes"),
    "a config of a million million bytes": (listed(size=10**12, Size=10**12), "config.json with 1000000000000 bytes"),
    "a hash that is a path": (listed(blobId=OUTSIDE, Sha256=OUTSIDE), "config.json with the hash '../"),
    "a hash of another kind": (listed(blobId=7, Sha256=7), "config.json with the hash 7"),
    "a name with a backslash": (also_listed("..\\evil.json"), "a file named"),
    "a name with a NUL": (also_listed("evil\0.json"), "a file named"),
    "a name that is none": (listed(rfilename=7, Path=7), "can't be read"),
    "files that are none": (lambda listing: listing | {"siblings": [1], "Data": 1}, "can't be read"),
    "a list": (lambda listing: [listing], "can't be read"),
    "depth": (lambda _: b"[" * 10**6, "can't be read"),
    "a listing without end": (lambda _: b" " * (LARGEST_TEXT + 1), "has no end"),
    "too many files": (
        lambda listing: [also_listed(f"a{number}.json")(listing) for number in range(1001)][0],
        "lists 1,004 files|lists 1,00",
    ),
}


@pytest.mark.parametrize("on", ["huggingface", "modelscope"])
@pytest.mark.parametrize("lie", LIES)
def test_a_hub_that_lies_is_answered_by_one_sentence(lie, on, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HUB", on)
    hub.repositories["ZhipuAI/chatglm3-6b"] = hub.repositories[NAME]
    hub.change_listing, says = LIES[lie]
    assert re.search(says, sentence := refusal(NAME)) and "\n" not in sentence
    assert hub.asked() == [] and not list(tmp_path.rglob("*evil*"))


def test_a_commit_is_no_path(hub, tmp_path):
    """Nor is one for huggingface_hub itself, through which datasets are downloaded."""
    for hub.commit in (OUTSIDE, "main", "0" * 39, 7):
        assert "names a commit or a file by" in refusal(NAME)
        with pytest.raises(UserError, match="names a commit or a file by"):
            huggingface_hub.hf_hub_download(NAME, "config.json")
    assert not list(tmp_path.rglob("evil*"))


def test_a_file_that_is_not_there_is_no_lie(hub):
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
        huggingface_hub.hf_hub_download(NAME, ".huggingface.yaml")


def test_a_body_ends_at_its_announced_size(hub, folder):
    hub.more["config.json"] = b"x" * 2**20
    assert "sends more than the" in refusal(NAME)
    assert sum(file.stat().st_size for file in folder.glob("config.json*")) < 2**20


def test_a_redirect_without_end_is_given_up(hub):
    hub.loops = True
    assert "can't be downloaded" in refusal(NAME)


@pytest.mark.parametrize("revision", ["../../other", "/etc", "a\\b", "", "a\0", "x\ny"])
def test_a_revision_is_no_path(revision):
    with pytest.raises(UserError, match="give a branch, a tag or a commit"):
        download(NAME, revision)


def test_links_in_the_cache_are_not_written_through(hub, folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to(precious)
    (folder / "tokenizer.model.incomplete").symlink_to(precious)
    check_folder(download(NAME), hub.repositories[NAME])
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "cache")
    assert f"leads through a link to {tmp_path / 'elsewhere'}" in refusal(NAME)
    assert precious.read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())
