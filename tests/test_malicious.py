"""Folders of strangers: nothing in them is run or written outside, and each is answered by one sentence, soon.

All are opened in one child process with a limit of memory and of CPU time, so that a hang or a flood fails here.
"""

import json
import os
import pickle
import re
import resource
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import write_poison
from transformers import GlmConfig, GlmForCausalLM

from common.arguments import LoraArguments
from common.encoding import conversation_of, encode_train
from common.errors import UserError
from common.files import check_no_links, check_states
from common.loading import find_trained, load_model, load_tokenizer
from common.locking import guard
from common.manifest import seal
from common.methods.adapter import is_plain
from common.methods.lora import Lora, attach_lora
from common.methods.prefix import KEY_PREFIX
from common.models.registry import DEMOS
from common.training.saves import publish, remove_training

MEMORY = 4 * 2**30  # bytes above what the tests use themselves
SECONDS = 10.0  # of CPU for one folder
SENTINEL = "executed"


class Payload:
    """A pickle of it opens a file when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


class Flood:
    def __reduce__(self):
        return bytearray, (2**36,)


def edit(name: str, **entries: Any) -> Callable[[Path], None]:
    """Changes entries of a JSON file."""

    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(content | entries))

    return change


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content.encode() if isinstance(content, str) else content))


def void(_: object) -> None:
    """Takes away a result."""


def sparse(name: str) -> Callable[[Path], None]:
    """Gives a file 5 GB of zeros, which take no room on the disk."""
    return lambda folder: os.truncate((folder / name).open("a").name, 5 * 10**9)


def store(name: str, make: Callable[[Path], Any], old: bool = False) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(make(folder), folder / name, _use_new_zipfile_serialization=not old)

    return write


def payload(folder: Path) -> Any:
    return {"a": torch.zeros(1), "b": Payload(folder / SENTINEL)}


def plain_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / SENTINEL), protocol=2))


def compress(folder: Path) -> None:
    """A thousandth of the bytes that it promises."""
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.infolist():
            archive.writestr(entry.filename, stored.read(entry) if entry.filename.endswith("pkl") else bytes(2**20))
    os.replace(folder / "new", file)


def starve(folder: Path) -> None:
    """Half of the bytes of each tensor are gone, and their table is whole."""
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(folder / "new", "w") as archive:
        for entry in stored.infolist():
            content = stored.read(entry)
            archive.writestr(entry.filename, content[: len(content) // 2] if "/data/" in entry.filename else content)
    os.replace(folder / "new", file)


def embedded(folder: Path) -> None:
    shutil.copytree(folder.parent / "adapter", folder, dirs_exist_ok=True)


def pipe(name: str) -> Callable[[Path], None]:
    """Who opens it waits for a writer."""
    return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))[1]


def code(folder: Path) -> None:
    """Python files that config.json and tokenizer_config.json name."""
    write_poison(folder)
    edit("config.json", auto_map={"AutoConfig": "configuration_chatglm.ChatGLMConfig"})(folder)
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]})(folder)


def read_chatglm(folder: Path) -> None:
    load_tokenizer(folder)
    load_model(folder)


def read_glm(folder: Path) -> None:
    encode_train(load_tokenizer(folder), [conversation_of("q", "a")], 100, 100)


def read_adapter(folder: Path) -> None:
    find_trained(str(folder))
    load_model("demo3", adapter=folder)


def read_prefix(folder: Path) -> None:
    find_trained(str(folder), "demo3")
    load_model("demo3", ptuning_checkpoint=folder)


class Kind(NamedTuple):
    """A kind of folder: which honest one is changed, and what opens it."""

    honest: str
    read: Callable[[Path], None]


MODEL, GLM = Kind("chatglm3-6b", read_chatglm), Kind("glm-4", read_glm)
ADAPTER, PREFIX, CHECKPOINT = (
    Kind("adapter", read_adapter),
    Kind("prefix", read_prefix),
    Kind("checkpoint", check_states),
)
EMBEDDING = f"{KEY_PREFIX}embedding.weight"
WEIGHT = "transformer.encoder.final_layernorm.weight"
DEEP = "[" * 10**6
REGEX = '{"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}}'
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
SQUARES = "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}"

CASES = {  # name: (kind, what the stranger did, what the sentence says; "": it is read, and does no harm)
    "code in weights": (MODEL, store("pytorch_model.bin", payload), r"holds code or objects \(.*open\)"),
    "code in old weights": (MODEL, store("pytorch_model.bin", payload, old=True), "holds code or objects"),
    "code alone": (MODEL, plain_pickle, "holds code or objects"),
    "64 GB of zeros": (
        MODEL,
        store("pytorch_model.bin", lambda _: {"a": Flood()}),
        "holds code or objects",
    ),
    "compressed weights": (MODEL, compress, "is compressed"),
    "weights without bytes": (MODEL, starve, "pytorch_model.bin"),
    "one number as a million million": (
        MODEL,
        store("pytorch_model.bin", lambda _: {WEIGHT: torch.zeros(1).expand(10**6, 10**6)}),
        "describes .* weights|claims more numbers|pytorch_model.bin",
    ),
    "weights that are a list": (MODEL, store("pytorch_model.bin", lambda _: [1, 2]), "describes .* weights"),
    "an index that points outside": (
        MODEL,
        edit("pytorch_model.bin.index.json", weight_map={"a": "../../outside.bin"}),
        "index.json is broken",
    ),
    "an index of numbers": (MODEL, edit("pytorch_model.bin.index.json", weight_map={"a": 1}), "index.json is broken"),
    "a safetensors table of a million million bytes": (
        MODEL,
        put("model.safetensors", (10**12).to_bytes(8, "little") + b"{}"),
        "truncated",
    ),
    "a deep config": (MODEL, put("config.json", DEEP), "config.json is no JSON object"),
    "a config of 5 GB": (MODEL, sparse("config.json"), "config.json is no JSON object"),
    "a thousand million layers": (MODEL, edit("config.json", num_layers=10**9), "num_layers is 1000000000"),
    "layers under another name": (MODEL, edit("config.json", num_hidden_layers=10**9), "num_hidden_layers is"),
    "a size that is none": (MODEL, edit("config.json", hidden_size=float("nan")), "hidden_size is nan"),
    "no heads": (MODEL, edit("config.json", num_attention_heads=0), "num_attention_heads is 0"),
    "a vocabulary of 10**12": (MODEL, edit("config.json", padded_vocab_size=10**12), "padded_vocab_size is"),
    "an angle without a base": (MODEL, edit("config.json", rope_ratio=0), "rope_ratio is 0"),
    "heads that do not fit": (MODEL, edit("config.json", kv_channels=6), "fit no model"),
    "16 TB of weights that are not there": (
        MODEL,
        edit("config.json", hidden_size=2**16, num_layers=1000),
        "describes .* weights, and the weight files have",
    ),
    "a thousand million labels": (MODEL, edit("config.json", num_labels=10**9), ""),
    "attention from a hub": (MODEL, edit("config.json", _attn_implementation="evil/kernel"), ""),
    "methods replaced": (MODEL, edit("config.json", to_dict="x", from_dict=1, get_text_config=[]), ""),
    "code files that are named": (MODEL, code, ""),
    "a thousand million beams": (MODEL, edit("generation_config.json", num_beams=10**9), "num_beams is"),
    "a temperature of text": (MODEL, edit("generation_config.json", temperature="hot"), "temperature is 'hot'"),
    "an adapter in a model": (MODEL, embedded, "holds an adapter beside a model"),
    "a vocabulary of 5 GB": (MODEL, sparse("tokenizer.model"), "bytes, too many"),
    "a vocabulary of noise": (MODEL, put("tokenizer.model", bytes(range(256)) * 400), "is no vocabulary"),
    "tokens that are no text": (
        MODEL,
        edit("tokenizer_config.json", added_tokens_decoder={"5": 7}, model_max_length=[]),
        "is no vocabulary",
    ),
    "a pipe in place of settings": (MODEL, pipe("generation_config.json"), ""),
    "a template that loops": (GLM, put("chat_template.jinja", LOOPS), "takes longer than"),
    "a template of 10 GB": (GLM, put("chat_template.jinja", "{{ 'a' * 10000000000 }}"), "takes more than .* GB"),
    "a template that doubles": (GLM, put("chat_template.jinja", DOUBLES), "takes more than .* GB"),
    "a template that squares": (GLM, put("chat_template.jinja", SQUARES), "a number without end"),
    "a template of powers": (
        GLM,
        put("chat_template.jinja", "{{ 10 ** 10 ** 10 }}"),
        "powers, which may take",
    ),
    "a template that calls itself": (
        GLM,
        put("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "calls itself without end",
    ),
    "a template that asks for classes": (
        GLM,
        put("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "chat template .* is unsafe",
    ),
    "a deep vocabulary": (GLM, put("tokenizer.json", '{"model":' * 10**5), "tokenizer.json can't be read"),
    "an endless expression in a vocabulary": (GLM, put("tokenizer.json", REGEX), "may take for ever"),
    "an endless pattern": (ADAPTER, edit("adapter_config.json", target_modules="(a+)+$"), "may take for ever"),
    "many stars": (ADAPTER, edit("adapter_config.json", target_modules=".*" * 12 + "x"), "may take for ever"),
    "an endless layer": (
        ADAPTER,
        edit("adapter_config.json", layers_pattern="(.*)*x", layers_to_transform=[0]),
        "layers_pattern holds the pattern",
    ),
    "an endless rank": (ADAPTER, edit("adapter_config.json", rank_pattern={"(x+x+)+y": 4}), "rank_pattern holds the"),
    "a rank of a thousand million": (ADAPTER, edit("adapter_config.json", r=10**9), "r is 1000000000"),
    "a rank without weights": (ADAPTER, edit("adapter_config.json", r=2**15), "names the rank 32,768"),
    "a scale that is none": (ADAPTER, edit("adapter_config.json", lora_alpha=float("nan")), "lora_alpha is nan"),
    "a beginning from a file": (ADAPTER, edit("adapter_config.json", init_lora_weights="loftq"), "init_lora_weights"),
    "a million iterations": (ADAPTER, edit("adapter_config.json", init_lora_weights="pissa_niter_1000000"), "not read"),
    "megatron": (ADAPTER, edit("adapter_config.json", megatron_config={"a": 1}, megatron_core="os"), "not supported"),
    "parameters by name": (ADAPTER, edit("adapter_config.json", target_parameters=["x"]), "target_parameters is"),
    "a module to import": (ADAPTER, edit("adapter_config.json", auto_mapping={"parent_library": "evil"}), ""),
    "a list of bases": (
        ADAPTER,
        edit("adapter_config.json", base_model_name_or_path=["demo"]),
        "base|short text",
    ),
    "code in a prefix": (PREFIX, store("pytorch_model.bin", payload), "holds code or objects"),
    "an empty prefix": (
        PREFIX,
        store("pytorch_model.bin", lambda _: {EMBEDDING: torch.zeros(10**9, 0)}),
        "does not",
    ),
    "a prefix without its table": (
        PREFIX,
        store("pytorch_model.bin", lambda _: {f"{KEY_PREFIX}trans.0.weight": torch.zeros(1)}),
        "no whole prefix",
    ),
    "code in an optimizer": (CHECKPOINT, store("optimizer.pt", payload), "optimizer.pt holds code"),
    "code in random states": (CHECKPOINT, store("rng_state.pth", payload), "rng_state.pth holds code"),
    "code in a state of DeepSpeed": (CHECKPOINT, store("global_step2/a.pt", payload), "a.pt holds code"),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory, thinking_tokenizer) -> Path:
    """A folder with an honest one of each kind."""
    place = tmp_path_factory.mktemp("honest")
    shutil.copytree(DEMOS["demo3"], place / "chatglm3-6b")
    adapted = attach_lora(load_model("demo3"), LoraArguments(lora_rank=2))
    Lora(LoraArguments()).save(adapted, place / "adapter")
    edit("adapter_config.json", base_model_name_or_path="demo3")(place / "adapter")
    (place / "prefix").mkdir()
    (place / "checkpoint").mkdir()
    sizes = {"vocab_size": 288, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 256}
    GlmForCausalLM(GlmConfig(**sizes, **heads)).save_pretrained(place / "glm-4")
    thinking_tokenizer.save_pretrained(place / "glm-4")
    return place


@pytest.fixture(scope="module")
def answers(honest, tmp_path_factory) -> dict[str, tuple[str, float]]:
    """{case: (sentence, seconds of CPU)}, from one child process with limits."""
    place = tmp_path_factory.mktemp("hostile")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
        for name, (kind, change, _) in CASES.items():
            os.write(writing, (json.dumps([name, *answer(honest, place, kind, change)]) + "\n").encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        found = [json.loads(line) for line in lines]
    os.waitpid(child, 0)
    return {name: (sentence, seconds) for name, sentence, seconds in found}


def answer(honest: Path, place: Path, kind: Kind, change: Callable[[Path], None]) -> tuple[str, float]:
    """The sentence about a changed folder, and the seconds of CPU until it came."""
    for name in {kind.honest, "adapter"}:
        shutil.copytree(honest / name, place / name)
    folder = place / kind.honest
    change(folder)
    start = time.process_time()
    try:
        kind.read(folder)
        sentence = ""
    except UserError as error:
        sentence = str(error)
    except BaseException as error:
        sentence = f"a traceback: {type(error).__name__}: {error}\n"
    seconds = time.process_time() - start
    executed = [str(file) for file in place.rglob(SENTINEL)]
    for each in place.iterdir():
        shutil.rmtree(each)
    return (f"executed: {executed}\n" if executed else sentence), seconds


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_a_stranger_is_answered_by_one_sentence(name, answers):
    assert name in answers, "the process ended or hung before this case"
    sentence, seconds = answers[name]
    says = CASES[name][2]
    assert seconds < SECONDS and "\n" not in sentence
    assert re.search(says, sentence) if says else sentence == "", sentence


def test_honest_patterns_of_other_programs_are_plain():
    for pattern in (
        r".*\.query_key_value",
        r".*layers\.\d+\.(self_attention|mlp)\.(query_key_value|dense)",
        r"^(?!.*(?:lm_head|visual)).*(?:q_proj|k_proj|v_proj)$",
        "transformer.encoder.layers.0.self_attention.dense",
    ):
        assert is_plain(pattern)


def test_links_in_an_output_folder_are_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    out = tmp_path / "out"
    for name in ("adapter_model.safetensors", "all_results.json", ".lock", "runs", "checkpoint-3/optimizer.pt"):
        shutil.rmtree(out, ignore_errors=True)
        (out / name).parent.mkdir(parents=True)
        (out / name).symlink_to(precious)
        with pytest.raises(UserError, match=f"{name} is a link to {precious}.*: remove the link"):
            check_no_links(out)
    (out / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match=f".lock is a link to {precious}"), guard("output folder", out, inside=True):
        pass
    (out / ".lock").unlink()
    assert precious.read_text() == "mine"
    (out / "checkpoint-3/optimizer.pt").unlink()
    (out / "best").symlink_to("checkpoint-3")  # nothing of ours writes there
    (tmp_path / "link").symlink_to(out)
    check_no_links(tmp_path / "link")


def test_no_file_behind_a_link_is_replaced_or_removed(tmp_path):
    """A manifest names it: that of a result which is to be replaced or removed, or that of a result on its way."""
    out, precious = tmp_path / "out", tmp_path / "elsewhere" / "file"
    for folder in (out, out / ".result", precious.parent):
        (folder / "best").mkdir(parents=True)
        (folder / "best" / "file").write_text("theirs")
        seal(folder)
    precious.write_text("mine")
    shutil.rmtree(out / "best")
    (out / "best").symlink_to(precious.parent)
    says = pytest.raises(UserError, match="best is a link out of .*: remove the link")
    with says:
        remove_training(out, [])
    with says:
        publish(out)
    shutil.rmtree(out / ".result" / "best")
    seal(out / ".result")
    with says:
        publish(out)
    assert precious.read_text() == "mine"
