"""Whatever a file holds, rows or objects come out or a UserError, and the encoders keep their limits.

FUZZ=20000 draws so many examples of each, anew each time; without it they are few, and always the same.
"""

import copy
import json
import math
import os
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.arguments import DataArguments, LoraArguments, TrainingArguments
from common.data.examples import Reading, Split, read_examples
from common.data.formats import Columns, FormatReader
from common.data.messages import plain_turns, read_messages
from common.data.rows import RowError, read_rows
from common.encoding import encode_eval, encode_texts, encode_train, has_roles
from common.errors import UserError
from common.finetune_hf import make_method, read_config
from common.methods.lora import Lora
from common.models.registry import open_model
from common.tokenizers.glm4 import GLM4Adapter
from common.tokenizers.templates import SECONDS, compiled, render

EXAMPLES = int(os.environ.get("FUZZ", "0"))
few, many = (
    settings(
        max_examples=EXAMPLES or number,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    for number in (15, 60)
)
NUMBERS = count()  # a file that is read is remembered by its name, size and time

WORDS = """role content user assistant system observation tool from value human gpt messages conversations conversation
tools functions history instruction input output prompt response text tool_calls function_call function name arguments
parameters loss weight metadata reasoning_content type properties question answer chosen rejected data 指令""".split()
characters = st.characters(exclude_categories=())  # lone surrogates and NUL too
texts = st.sampled_from([*WORDS, "", " ", "\n", "[]", "{}", '[["a", "b"]]', "你好", "<|user|>", "[gMASK]"]) | st.text(
    characters, max_size=12
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
calls = st.fixed_dictionaries({}, optional=dict.fromkeys(("name", "arguments", "parameters", "function"), values))
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool", "observation"]) | values},
    optional={
        "content": texts | values,
        "loss": st.booleans() | values,
        "weight": st.sampled_from([0, 1]) | values,
        "metadata": texts | values,
        "tools": values,
        "tool_calls": st.lists(calls, max_size=2) | values,
        "function_call": calls | values,
        "name": texts,
        "parameters": st.dictionaries(texts, values, max_size=2),
        "observation": values,
    },
)
rounds = st.lists(st.lists(texts, min_size=2, max_size=2), max_size=3)
talks = st.lists(
    st.fixed_dictionaries({"role": st.just("user"), "content": texts})
    | st.fixed_dictionaries({"role": st.just("assistant"), "content": texts}),
    max_size=6,
)
rows = (
    st.dictionaries(texts, values, max_size=5)
    | st.fixed_dictionaries({"prompt": texts, "response": texts}, optional={"history": rounds | values})
    | st.fixed_dictionaries({"messages": talks | st.lists(messages, max_size=6)}, optional={"tools": values})
    | st.fixed_dictionaries({"conversations": talks | st.lists(messages, max_size=6)}, optional={"system": values})
    | st.fixed_dictionaries({"text": texts})
)


@st.composite
def damaged(draw, contents) -> bytes:
    """The bytes of a content, some of them replaced, removed or repeated."""
    content = draw(contents)
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.integers(0, 6))
        piece = st.binary(max_size=4) | st.sampled_from(
            [b'"', b"[", b"]", b"{", b"}", b",", b"\n", b"\\", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\t", b'"",']
        )
        content = content[:start] + draw(piece) + content[end:]
    return content


def dumped(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def data_files(draw) -> bytes:
    found = draw(st.lists(rows, max_size=4))
    kind = draw(st.sampled_from(["lines", "array", "object", "table"]))
    if kind == "lines":
        return b"\n".join(map(dumped, found))
    if kind == "table":
        return "\n".join(",".join(f'"{value}"' for value in row) for row in found).encode("utf-8", "surrogatepass")
    return dumped(found if kind == "array" else {"data": found})


@many
@given(
    content=damaged(data_files()) | st.binary(max_size=80),
    ending=st.sampled_from(["json", "jsonl", "csv", "tsv", "txt", "parquet", "md"]),
    unit=st.sampled_from(["file", "paragraph"]),
)
def test_every_file_gives_rows_or_one_sentence(tmp_path_factory, content, ending, unit):
    file = tmp_path_factory.getbasetemp() / f"{next(NUMBERS)}.{ending}"
    file.write_bytes(content)
    try:
        for row in read_rows(file, unit):
            assert isinstance(row.content, dict) and row.place.startswith(str(file)) and len(row.excerpt) <= 60
    except UserError as error:
        assert str(file) in str(error)
    file.unlink()


@pytest.fixture(scope="module", params=["chatglm", "chatglm2", "chatglm3", "chatglm4", "glm"])
def tokenizer(request):
    names = {"chatglm": "demo_tokenizer"} | {f"chatglm{number}": f"tokenizer{number}" for number in (2, 3, 4)}
    return request.getfixturevalue(names.get(request.param, "thinking_tokenizer"))


@many
@given(found=st.lists(rows, min_size=1, max_size=3), asking=st.booleans(), lengths=st.tuples(*[st.integers(3, 40)] * 2))
def test_every_row_is_read_or_refused_and_encoded_within_the_limits(tokenizer, found, asking, lengths):
    reader, read = FormatReader(Columns(), tokenizer, asking), []
    for row in found:
        try:
            read.append(reader.read(row))
        except RowError as error:
            assert "\n" not in str(error)
    source, target = lengths
    if has_roles(tokenizer):
        source += 12  # the tokens of roles are never cut
    talks = [turns for turns in read if turns and not isinstance(turns, str)]
    together = encode_train(tokenizer, [] if asking else talks, source, target)
    alone = [encode_train(tokenizer, [turns], source, target) for turns in talks if not asking]
    assert [row.columns for row in together] == [row.columns for rows in alone for row in rows]
    for row in together:
        assert len(row.input_ids) == len(row.labels) <= source + target + 1
        assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))
        assert 0 <= row.dropped_turns < len(talks[row.origin.conversation])
    for row in encode_eval(tokenizer, talks, source, target):
        calls = any(turn.role == "assistant" for turn in talks[row.origin.conversation])  # those are never cut
        assert len(row.prompt_ids) <= source or has_roles(tokenizer) and calls
        assert 0 <= row.dropped_turns < len(talks[row.origin.conversation])
    plain = [text for text in read if text and isinstance(text, str)]
    for row in encode_texts(tokenizer, plain, source + 3):
        assert len(row.input_ids) == len(row.labels) <= source + 3
    assert len({row.origin.conversation for row in encode_texts(tokenizer, plain, source + 3)}) == len(plain)


@many
@given(talk=talks | st.lists(messages, max_size=6))
def test_plain_messages_are_read_as_all_others(talk):
    plain, unread = plain_turns(talk), set()
    assert plain is None or (read_messages(talk, "messages", unread), unread) == (plain, set())


TEMPLATES = {
    "bare": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
    "stripped": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.strip() }}{% endfor %}",
    "by position": (
        "[gMASK]<sop>{% for m in messages %}{% if loop.index0 % 2 %}{{ m.content }}#{% else %}<|{{ m.role }}|>"
        "{{ m.content[:1] }}{{ m.content }}{% endif %}{% endfor %}"
    ),
}


@many
@given(found=st.lists(talks, min_size=2, max_size=4), template=st.sampled_from(list(TEMPLATES)))
def test_a_template_writes_each_turn_as_in_its_conversation_alone(thinking_tokenizer, found, template):
    """Whatever a template makes of role, content and position: alone it writes a conversation up to each turn."""
    tokenizer = copy.deepcopy(thinking_tokenizer)
    tokenizer.chat_template = TEMPLATES[template]
    chats = [turns for talk in found if (turns := plain_turns(talk))]
    adapter = GLM4Adapter(tokenizer)
    together = [[turn.ids for turn in turns] for turns in adapter.encode_turns(chats)]
    alone = [[turn.ids for turn in adapter.encode_turns([turns])[0]] for turns in chats]
    assert together == alone


@many
@given(content=damaged(data_files()), name=st.sampled_from(["train", "test"]), column=st.none() | texts)
def test_every_file_gives_examples_or_one_sentence(tmp_path_factory, tokenizer3, content, name, column):
    file = tmp_path_factory.getbasetemp() / f"{next(NUMBERS)}.json"
    file.write_bytes(content)
    args = DataArguments(prompt_column=column, source_prefix="x")
    try:
        examples = list(read_examples(Split(name, args, tokenizer3, str(file), [file], None), Reading()))
        assert all(-(2**63) <= example.row < 2**63 for example in examples)
    except UserError:
        pass
    file.unlink()


def changes(*objects: dict) -> st.SearchStrategy[dict]:
    """One of these objects with some values replaced, added or removed, also in the objects inside."""

    @st.composite
    def change(draw) -> dict:
        content = json.loads(json.dumps(draw(st.sampled_from(objects))))
        for _ in range(draw(st.integers(1, 2))):
            part = content
            while (inside := [value for value in part.values() if isinstance(value, dict)]) and draw(st.booleans()):
                part = draw(st.sampled_from(inside))
            name = draw((st.sampled_from(sorted(part)) if part else texts) | texts)
            if draw(st.booleans()):
                part[name] = draw(values | st.sampled_from([0, -1, 10**30, math.nan, math.inf, "auto", [], {}]))
            else:
                part.pop(name, None)
        return content

    return change()


def config_of(name: str) -> dict:
    return json.loads((Path(__file__).parents[1] / "common" / "demo" / name / "config.json").read_text())


@few
@given(content=changes(config_of("chatglm")).map(dumped) | damaged(changes(config_of("chatglm")).map(dumped)))
def test_every_config_json_is_read_or_refused(tmp_path_factory, demo_folder, content):
    folder = tmp_path_factory.mktemp("model")
    for name in ("ice_text.model", "pytorch_model.bin"):
        (folder / name).symlink_to(demo_folder / name)
    (folder / "config.json").write_bytes(content)
    try:
        open_model(folder)
    except UserError as error:
        assert str(folder) in str(error)
    shutil.rmtree(folder)


ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["query_key_value"]}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """The folder of an adapter of the demo."""
    folder = tmp_path_factory.mktemp("adapter")
    names = [f"base_model.model.transformer.layers.{number}.attention.query_key_value" for number in range(6)]
    weights = {f"{name}.lora_A.weight": torch.zeros(8, 192) for name in names}
    weights |= {f"{name}.lora_B.weight": torch.zeros(576, 8) for name in names}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@few
@given(content=changes(ADAPTER | {"task_type": "CAUSAL_LM", "modules_to_save": None}).map(dumped))
def test_every_adapter_config_is_read_or_refused(adapter, content):
    (adapter / "adapter_config.json").write_bytes(content)
    try:
        Lora(LoraArguments(lora_checkpoint=str(adapter))).check(open_model("demo"), do_train=False)
    except UserError as error:
        assert str(adapter) in str(error)


DEEPSPEED = (
    {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8}},
    {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": "auto"}},
    {"fp16": {"enabled": "auto", "loss_scale": 0}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, "gradient_clipping": 1.0},
)


@few
@given(config=changes(*DEEPSPEED))
def test_every_file_of_deepspeed_is_read_or_refused(config):
    try:
        assert TrainingArguments("output", use_cpu=True, deepspeed=json.dumps(config)).engine.name == "DeepSpeed"
    except (UserError, ValueError) as error:
        assert "\n" not in str(error)


YAML = {
    "data_config": {"train_file": "train.json", "val_file": "dev.json", "num_proc": 16},
    "max_input_length": 256,
    "max_output_length": 512,
    "training_args": {"output_dir": "out", "max_steps": 3, "learning_rate": 5e-5, "generation_config": {"top_p": 0.7}},
    "peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
}


@few
@given(content=changes(YAML).map(lambda config: yaml.safe_dump(config, allow_unicode=True)))
def test_every_yaml_file_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "lora.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        make_method(*read_config(folder / "lora.yaml", folder, "demo3", ["--use_cpu"]))
    except UserError as error:
        assert "\n" not in str(error)


GIVEN = [{"role": "user", "content": "你好", "tools": [{"name": "f"}]}, {"role": "assistant", "content": "hello"}]
FILTERS = [*sorted(compiled("").environment.filters), "round", "slice", "wordwrap"]
METHODS = """append keys values get format replace join split rsplit strip ljust zfill center expandtabs encode
count find index splitlines translate title upper extend insert pop update setdefault isdigit partition items""".split()
NAMES = """messages m x s f g n loop loop.index range namespace dict cycler joiner lipsum raise_exception strftime_now
add_generation_prompt self none true messages[0] messages[0].content""".split()
atoms = st.sampled_from(
    [
        *NAMES,
        "0",
        "1",
        "-1",
        "7",
        "1000",
        "1000000",
        "10**9",
        "9999999999",
        "0.5",
        "''",
        "'ab'",
        "'{:>9}'",
        "'%9d'",
        "[]",
        "{}",
    ]
) | st.text(st.characters(codec="utf-8"), max_size=3).map(lambda text: json.dumps(text, ensure_ascii=False))


def expressions(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    some = st.lists(inner, max_size=3).map(", ".join)
    operators = st.sampled_from("+ - * / // % ** ~ == < in and or if is".split())
    return (
        st.builds("({} {} {})".format, inner, operators, inner)
        | st.builds("({}|{}({}))".format, inner, st.sampled_from(FILTERS), some)
        | st.builds("({}|map('{}', {}))".format, inner, st.sampled_from(FILTERS), inner)
        | st.builds("{}.{}({})".format, inner, st.sampled_from(METHODS), some)
        | st.builds("{}({})".format, inner, some)
        | st.builds("{}[{}]".format, inner, inner)
        | st.builds("[{}]".format, some)
    )


expression = st.recursive(atoms, expressions, max_leaves=5)


def statements(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    each = st.builds("{{% for {} in {} %}}{}{{% endfor %}}".format, st.sampled_from("xmn"), expression, inner)
    return (
        each
        | st.builds(
            "{{% for x in range({}) recursive %}}{}{{{{ loop({}) }}}}{{% endfor %}}".format,
            expression,
            inner,
            expression,
        )
        | st.builds("{{% if {} %}}{}{{% endif %}}".format, expression, inner)
        | st.builds("{{% macro f(x) %}}{}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f({}) }}}}".format, inner, expression)
        | st.builds(
            "{{% macro g(x) %}}{}{{{{ caller() }}}}{{% endmacro %}}{{% call g({}) %}}{}{{% endcall %}}".format,
            inner,
            expression,
            inner,
        )
        | st.builds("{{% set s %}}{}{{% endset %}}".format, inner)
        | st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(FILTERS), inner)
        | st.lists(inner, min_size=2, max_size=4).map("".join)
    )


templates = st.recursive(
    st.builds("{{{{ {} }}}}".format, expression)
    | st.builds("{{% set {} = {} %}}".format, st.sampled_from(["x", "s", "n"]), expression)
    | st.builds("{{% set x = x {} %}}".format, st.sampled_from(["+ x", "* 9", "~ x", "* x", "+ [x]", "|string * 9"]))
    | st.builds("{{% include {} %}}".format, expression),
    statements,
    max_leaves=6,
)


@few
@given(
    template=st.one_of(
        templates,
        templates.map(lambda text: "{% set x = 'ab' %}{% for n in range(9999) %}" + text + "{% endfor %}"),
        texts,
    )
)
def test_every_template_ends_in_time_and_memory(template):
    begun = time.thread_time()
    try:
        assert isinstance(render(template, "a model", [{"messages": GIVEN, "x": 3, "s": "ab"}])[0], str)
    except UserError as error:
        assert "\n" not in str(error)
    assert time.thread_time() - begun < 3 * SECONDS
