"""Training data that is tokenized ahead: the shards hold what a training would make, and fit only its settings."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from test_caches import DAMAGES, full_disk, names
from test_data import counts, prepare, write_lines

from common.arguments import DataArguments, PrefixArguments
from common.data.shards import load_shards, summary_of
from common.encoding import encode_train
from common.errors import SaveError, UserError, exit_on_user_error
from common.finetune import run
from common.flags import parse_arguments
from common.loading import load_tokenizer
from common.locking import guard
from common.methods.prefix import PTuning
from common.preprocess import main
from common.sharding import shard_bounds

LENGTHS = {"max_source_length": 16, "max_target_length": 16}
COUNTS = ("rows", "dropped", "first_dropped", "truncated", "shortened", "unlabelled")


def row(number: int) -> dict[str, str]:
    """Short, but every 7th is cut, and every 400th has nothing to learn."""
    text = "" if number % 400 == 399 else f"{number}件白色的裙子。" + "很长" * 20 * (number % 7 == 0)
    return {"content": f"类型#裙*数量#{number}", "summary": text}


def write_rows(file: Path, count: int, **others) -> Path:
    return write_lines(file, [others.get(f"row{number}", row(number)) for number in range(count)])


def arguments(**kwargs) -> DataArguments:
    return DataArguments(**({"prompt_column": "content", "response_column": "summary"} | LENGTHS | kwargs))


def preprocess(file: Path, folder: Path, *flags: str) -> None:
    lengths = [word for name, value in LENGTHS.items() for word in (f"--{name}", str(value))]
    columns = ["--prompt_column", "content", "--response_column", "summary"]
    main(["--train_file", str(file), "--output_dir", str(folder), "--num_shards", "3", *columns, *lengths, *flags])


def content(folder: Path) -> dict[str, bytes]:
    """The shards and their summaries; a kill may leave an empty file that was to become one."""
    return {file.name: file.read_bytes() for pattern in ("*.arrow", "shard-*.json") for file in folder.glob(pattern)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json", 3300)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "train_datasets"
    preprocess(data, folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(finished, tmp_path / "train_datasets"))


@pytest.mark.parametrize(
    ("count", "kwargs"), [(3300, {}), (5, {}), (3300, {"text_column": "summary"})], ids=["pairs", "few", "text"]
)
def test_shards_hold_what_a_training_would_prepare(count, kwargs, tmp_path, demo_tokenizer):
    file = write_rows(tmp_path / "rows.json", count)
    preprocess(file, tmp_path / "out", *(word for name, value in kwargs.items() for word in (f"--{name}", value)))
    expected = prepare(arguments(**kwargs), file, demo_tokenizer)
    found = load_shards(arguments(), tmp_path / "out", demo_tokenizer)
    assert found.rows.features == expected.rows.features
    assert found.rows.to_dict() == expected.rows.to_dict()
    assert (found.content, *counts(found, *COUNTS)) == (expected.content, *counts(expected, *COUNTS))
    assert len(summary_of(tmp_path / "out")["shards"]) == (3 if count == 3300 else 1)


def test_several_files_and_a_shard_without_rows(tmp_path, demo_tokenizer):
    """Shards begin anywhere in the files; one in which all rows are dropped is empty."""
    empty = {f"row{number}": {"content": "裙", "summary": ""} for number in range(1000)}
    write_rows(tmp_path / "a.json", 1500, **empty)
    rows = [row(number) for number in range(1200)]
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    preprocess(tmp_path / "*.json", tmp_path / "out")
    expected = prepare(arguments(), tmp_path / "*.json", demo_tokenizer)
    found = load_shards(arguments(), tmp_path / "out", demo_tokenizer)
    assert found.rows.to_dict() == expected.rows.to_dict()
    assert [shard["rows"] for shard in summary_of(tmp_path / "out")["shards"]] == [0, 998, 698]


@pytest.mark.parametrize(("rows", "shards"), [(0, 8), (1, 8), (999, 1), (8000, 8), (12_345, 8), (100_001, 64)])
def test_the_bounds_of_shards_are_those_of_batches(rows, shards):
    bounds = shard_bounds(rows, shards)
    assert (bounds[0], bounds[-1]) == (0, rows)
    assert len(bounds) - 1 <= shards
    assert all(begin < end and begin % 1000 == 0 for begin, end in zip(bounds, bounds[1:], strict=False)) or not rows


def test_only_missing_shards_are_made(data, finished, folder, capsys):
    first, second, _ = sorted(folder.glob("*.arrow"))
    before = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:-100])
    preprocess(data, folder)
    assert "2 of 3 shards were finished before" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == before
    assert content(folder) == content(finished)
    assert summary_of(folder) == summary_of(finished)


def encode_up_to_5000(tokenizer, conversations, *lengths):
    if int(conversations[0][0].content.rpartition("#")[2]) >= 5000:
        time.sleep(600)
    return encode_train(tokenizer, conversations, *lengths)


def as_program(*args) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    with exit_on_user_error():
        preprocess(*args)


@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)], ids=["kill", "ctrl-c"]
)
def test_a_stopped_run_goes_on_where_it_was(stop, code, tmp_path, monkeypatch, capfd):
    """Its workers end with it, in the middle of their shards, and let go of the lock."""
    file, out, flags = write_rows(tmp_path / "rows.json", 8000), tmp_path / "out", ["--num_shards", "8"]
    with monkeypatch.context() as patch:
        patch.setattr("common.data.tables.encode_train", encode_up_to_5000)
        args = (file, out, *flags, "--num_workers", "2")
        job = multiprocessing.get_context("fork").Process(target=as_program, args=args)
        job.start()
    while len(list(out.glob("shard-*.json"))) < 5:
        time.sleep(0.01)
    os.kill(job.pid, stop)
    job.join()
    assert job.exitcode == code
    assert "Traceback" not in capfd.readouterr().err
    assert not (out / "manifest.json").exists()
    preprocess(file, out, *flags)
    assert "5 of 8 shards were finished before" in capfd.readouterr().out
    preprocess(file, tmp_path / "whole", *flags)
    assert content(out) == content(tmp_path / "whole")


def test_a_killed_worker_is_one_sentence(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("common.data.tables.encode_train", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match="a worker was killed, perhaps for lack of memory: .* fewer --num_workers"):
            preprocess(data, tmp_path / "out", "--num_workers", "2")
    assert not multiprocessing.active_children()


def test_a_bad_row_is_named_and_a_mended_file_is_tokenized_anew(tmp_path, capsys):
    file = write_rows(tmp_path / "rows.json", 3300, row2345={"content": "裙", "summary": 7})
    with pytest.raises(UserError, match=r"rows.json, line 2346: column 'summary' holds int 7, expected a string"):
        preprocess(file, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    write_rows(file, 3300)
    preprocess(file, tmp_path / "out")
    assert "finished before" not in capsys.readouterr().out
    broken = tmp_path / "broken.json"
    broken.write_text(file.read_text() + '{"content": \n')
    with pytest.raises(UserError, match=r"broken.json, line 3301: broken JSON"):
        preprocess(broken, tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--train_file", "nowhere.json"], "no data file nowhere.json"),
        (["--prompt_colum", "content"], "unknown flag --prompt_colum: did you mean --prompt_column"),
        (["--num_shards", "0"], "--num_shards must be at least 1"),
        (["--response_column", "answer"], "line 1: no column 'answer'; there are 'content', 'summary'"),
    ],
)
def test_bad_flags_are_refused(flags, says, data, tmp_path):
    with pytest.raises(UserError, match=says):
        preprocess(data, tmp_path / "out", *flags)


def test_a_finished_folder_is_not_overwritten_by_accident(data, finished, folder, capsys):
    with pytest.raises(UserError, match=r"max_target_length was 16, now 12.*--overwrite_cache"):
        preprocess(data, folder, "--max_target_length", "12")
    assert content(folder) == content(finished)
    preprocess(data, folder, "--max_target_length", "12", "--overwrite_cache")
    assert summary_of(folder)["max_target_length"] == 12
    assert content(folder) != content(finished)


def test_a_second_job_waits_and_finds_it_finished(data, finished, folder, capsys):
    with guard("folder", folder, inside=True):
        second = threading.Thread(target=preprocess, args=(data, folder))
        second.start()
        while "waiting for folder" not in capsys.readouterr().err:
            time.sleep(0.01)
    second.join()
    assert "3 of 3 shards were finished before" in capsys.readouterr().out


# What a training takes


@pytest.mark.parametrize(
    ("model", "kwargs", "says"),
    [
        ("demo", {"max_source_length": 32}, "max_source_length was 16, now 32"),
        ("demo", {"max_target_length": 32}, "max_target_length was 16, now 32"),
        ("demo3", {}, r"tokenizer was 'ChatGLMTokenizer', now 'ChatGLM3Tokenizer'; vocabulary was '\w+', now '\w+'"),
    ],
)
def test_other_settings_are_refused(model, kwargs, says, finished):
    with pytest.raises(UserError, match=says):
        load_shards(arguments(**kwargs), finished, load_tokenizer(model))


def test_other_columns_are_no_matter(finished, demo_tokenizer):
    args = arguments(prompt_column="question", history_column="history", source_prefix="问")
    assert len(load_shards(args, finished, demo_tokenizer).rows) == 3292


def test_an_incomplete_folder_is_refused(folder, tmp_path):
    shard = folder / "shard-00001-of-00003.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard-00001-of-00003.arrow has [\d,]+ bytes instead of [\d,]+: copy it"):
        summary_of(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001-of-00003.arrow is missing: copy it again"):
        summary_of(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing"):
        summary_of(folder)
    with pytest.raises(UserError, match="no folder"):
        summary_of(tmp_path / "nowhere")


def train(flags: str, output_dir: Path) -> list[float]:
    common = f"""--do_train --model_name_or_path demo --pre_seq_len 8 --prompt_column content --response_column summary
    --max_source_length 16 --use_cpu --per_device_train_batch_size 2 --max_train_samples 64 --max_steps 3
    --learning_rate 2e-2 --logging_steps 1 --save_steps 3 --report_to none --output_dir {output_dir}"""
    model_args, prefix_args, *others = parse_arguments(PrefixArguments, f"{common} {flags}".split())
    run(PTuning(prefix_args), model_args, *others)
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_training_on_shards_equals_training_on_the_file(data, finished, tmp_path, capfd):
    expected = train(f"--train_file {data} --max_target_length 16", tmp_path / "file")
    assert train(f"--train_datasets {finished} --max_target_length 16", tmp_path / "shards") == expected
    assert "64 of 3,292 rows" in capfd.readouterr().out
    assert train(f"--train_datasets {finished} --max_target_length 16", tmp_path / "file") == expected
    assert "the training was finished before" in capfd.readouterr().out  # the rows are the same


def test_training_refuses_what_does_not_fit(data, finished, folder, tmp_path):
    with pytest.raises(UserError, match="max_target_length was 16, now 24"):
        train(f"--train_datasets {finished} --max_target_length 24", tmp_path / "out")
    with pytest.raises(UserError, match="the training data are in --train_file and in --train_datasets"):
        train(f"--train_datasets {finished} --train_file {data}", tmp_path / "out")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing"):
        train(f"--train_datasets {folder} --max_target_length 16", tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["shard-00001-of-00003.arrow", "summary.json", "manifest.json", "held_out/1-rows.jsonl"]
)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_folder_of_shards_is_named_and_mended(how, name, data, finished, tmp_path, demo_tokenizer, capsys):
    """Only what is damaged is made again."""
    folder = Path(shutil.copytree(finished, tmp_path / "train_datasets"))
    load_shards(arguments(), folder, demo_tokenizer)
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.arrow")}
    DAMAGES[how](folder / name)
    with pytest.raises(UserError, match=rf"{folder}: {name} .*: copy it again, or run common/preprocess.sh again"):
        load_shards(arguments(), folder, demo_tokenizer)
    capsys.readouterr()
    preprocess(data, folder)
    kept = "2 of 3" if name.endswith(".arrow") else "3 of 3"
    assert f"{kept} shards were finished before" in capsys.readouterr().out or kept == "3 of 3"
    assert content(folder) == content(finished)
    assert summary_of(folder) == summary_of(finished)
    changed = {file.name for file in folder.glob("*.arrow") if file.stat().st_mtime_ns != times[file.name]}
    assert changed == ({name} if name.endswith(".arrow") else set())


def test_a_full_disk_leaves_finished_shards(data, finished, tmp_path, capsys):
    folder = tmp_path / "out"
    with pytest.raises(SaveError, match=r"shard-0000\d-of-00003.arrow could not be written \(File too large\)"):
        with full_disk(120_000):  # the third shard is the smallest
            preprocess(data, folder, "--num_workers", "1")
    assert not [name for name in names(folder) if name.endswith(".arrow") and name[:-5] + "json" not in names(folder)]
    preprocess(data, folder)
    assert content(folder) == content(finished)
