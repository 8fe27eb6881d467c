"""Whatever is wrong: one sentence, exit code 2, nothing changed, no model loaded, and never a traceback.

Each case is a command line, the files that it needs, and a part of its sentence. Files stand in bad_inputs/.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from shell import run_program
from transformers import PreTrainedModel

BAD = ROOT / "tests" / "bad_inputs"
TRAIN = "--do_train --train_file train.json --model_name_or_path demo --max_steps 1 --use_cpu --report_to none"
PREDICT = "--do_predict --test_file train.json --model_name_or_path demo --use_cpu --max_target_length 8"
ROWS = "".join(json.dumps({"content": f"裙{number}", "summary": f"白{number}"}) + "\n" for number in range(4))


class Case(NamedTuple):
    flags: str  # {bad}: bad_inputs/; {trained}: the folder of the trainings
    says: str  # a pattern
    program: str = "lora"
    base: str = TRAIN
    files: dict[str, str | bytes | dict | None] = {}  # None: it is missing
    environ: dict[str, str] = {}


def cases(*pairs: tuple[str, str], **shared) -> list[Case]:
    return [Case(*pair, **shared) for pair in pairs]


NUMBERS = [
    Case(f"--{flag} {value}", rf"--{flag}\)? must be {must}, not {re.escape(says or value)}", program)
    for program, flag, value, must, says in (
        ("lora", "lora_rank", "0", "at least 1", ""),
        ("lora", "lora_alpha", "-1", "at least 1", ""),
        ("lora", "lora_dropout", "1", "below 1", "1.0"),
        ("lora", "loraplus_lr_ratio", "nan", "a number", ""),
        ("ptuning", "pre_seq_len", "0", "at least 1", ""),
        ("lora", "validation_split", "inf", "at most 1e[+]09", ""),
        ("lora", "max_source_length", "1", "at least 3", ""),
        ("lora", "max_target_length", "10000000000000", "at most 1e[+]09", ""),
        ("lora", "val_max_target_length", "-5", "at least 3", ""),
        ("lora", "max_train_samples", "0", "at least 1", ""),
        ("lora", "max_eval_samples", "-1", "at least 1", ""),
        ("lora", "max_predict_samples", "0", "at least 1", ""),
        ("lora", "num_beams", "0", "at least 1", ""),
        ("lora", "max_new_tokens", "-5", "at least 1", ""),
        ("lora", "top_p", "nan", "a number", ""),
        ("lora", "top_p", "1.5", "at most 1", ""),
        ("lora", "temperature", "-1", "at least 0", "-1.0"),
        ("lora", "learning_rate", "-0.0001", "above 0", ""),
        ("lora", "learning_rate", "1e30", "at most 1e[+]12", "1e+30"),
        ("full", "learning_rate", "nan", "a number", ""),
        ("lora", "weight_decay", "-3", "at least 0", "-3.0"),
        ("lora", "adam_beta1", "1", "below 1", "1.0"),
        ("lora", "adam_beta2", "-0.1", "at least 0", ""),
        ("lora", "adam_epsilon", "0", "at least 1e-38", "0.0"),
        ("lora", "max_grad_norm", "-1", "at least 0", "-1.0"),
        ("lora", "max_grad_norm", "inf", "finite", ""),
        ("lora", "label_smoothing_factor", "-0.1", "at least 0", ""),
        ("lora", "neftune_noise_alpha", "nan", "a number", ""),
        ("lora", "rows_per_step", "0", "at least 1", ""),
        ("lora", "tokens_per_batch", "0", "at least 1", ""),
        ("lora", "gradient_accumulation_steps", "-1", "at least 1", ""),
        ("lora", "gradient_accumulation_steps", "0", "at least 1", ""),
        ("lora", "max_steps", "0", "at least 1", ""),
        ("lora", "max_steps", "-5", "at least 1", ""),
        ("lora", "default_steps", "-1", "at least 0", ""),
        ("lora", "num_train_epochs", "0", "above 0", "0.0"),
        ("lora", "num_train_epochs", "-1", "above 0", "-1.0"),
        ("lora", "num_train_epochs", "nan", "a number", ""),
        ("lora", "warmup_steps", "-1", "at least 0", "-1.0"),
        ("lora", "logging_steps", "inf", "at most 1e[+]12", ""),
        ("lora", "save_steps", "nan", "a number", ""),
        ("lora", "save_steps", "-1", "at least 0", "-1.0"),
        ("lora", "eval_steps", "-1", "at least 0", "-1.0"),
        ("lora", "eval_delay", "-1", "at least 0", "-1.0"),
        ("lora", "early_stopping", "0", "at least 1", ""),
        ("lora", "save_total_limit", "-1", "at least 0", ""),
        ("lora", "eval_accumulation_steps", "0", "at least 1", ""),
        ("lora", "torch_empty_cache_steps", "0", "at least 1", ""),
        ("lora", "seed", "-1", "at least 0", ""),
        ("lora", "data_seed", "4294967296", "at most 4.29497e[+]09", ""),
        ("lora", "dataloader_num_workers", "-1", "at least 0", ""),
        ("lora", "dataloader_prefetch_factor", "0", "at least 1", ""),
        ("lora", "ddp_bucket_cap_mb", "0", "at least 1", ""),
        ("lora", "ddp_timeout", "-1", "at least 1", ""),
    )
]
FLAGS = cases(
    ("--lerning_rate 1", "unknown flag --lerning_rate: did you mean --learning_rate"),
    ("--learning_rate fast", "learning_rate.*invalid float value: 'fast'"),
    ("--max_steps 1.5", "max_steps.*invalid int value: '1.5'"),
    ("--model_name_or_path", "model_name_or_path.*expected one argument"),
    ("--pre_seq_len 8", "unknown flag --pre_seq_len"),
    ("--per_device_train_batch_size big", "--per_device_train_batch_size big: give a number of rows, or auto"),
    ("--per_device_train_batch_size -1", "a batch must have at least 1 row"),
    ("--per_device_eval_batch_size 0", "a batch must have at least 1 row"),
    ("--activation_checkpointing often", "--activation_checkpointing often: give true, false or auto"),
    ("--validation_split 1.5", "--validation_split must be a share below 1, or a number of rows"),
    ("--save_steps 2.5", "--save_steps must be an integer if bigger than 1"),
    ("--logging_steps 0", "requires non-zero --logging_steps"),
    ("--quantization_bit 3", "--quantization_bit 3: only 4 and 8 exist"),
    ("--precision int8", "--precision int8: there are auto, fp32, bf16 and fp16"),
    ("--fp16", "--fp16 needs a GPU"),
    ("--text_unit word", "text_unit.*invalid choice: 'word'"),
    ("--optim adam", "optim.*invalid choice: 'adam'"),
    ("--lr_scheduler_type cos", "lr_scheduler_type.*invalid choice: 'cos'"),
    ("--eval_strategy often", "eval_strategy.*invalid choice: 'often'"),
    ("--save_strategy often", "save_strategy.*invalid choice: 'often'"),
    ("--hub_strategy often", "hub_strategy.*invalid choice: 'often'"),
    ("--log_level loud", "log_level must be one of .*not 'loud'"),
    ("--train_sampling_strategy best", "train_sampling_strategy.*invalid choice: 'best'"),
    ("--include_num_input_tokens_seen some", "include_num_input_tokens_seen.*invalid choice: 'some'"),
    ("--ddp_backend tcp", "ddp_backend.*invalid choice: 'tcp'"),
    ("--dataset_name some/data", "the training data are in --train_file and in --dataset_name: give one of them"),
    ("--train_datasets .", "the training data are in --train_file and in --train_datasets: give one of them"),
    (
        "--conversation_column content --history_column summary",
        "--conversation_column can't be used with --history_column",
    ),
    (
        "--conversation_column content --text_column summary",
        "--conversation_column can't be used with .* --text_column",
    ),
    ("--do_sample --temperature 0", "--temperature must be above 0, --top_p above 0 and at most 1"),
    ("--do_sample --top_p 0", "--temperature must be above 0, --top_p above 0 and at most 1"),
    ("--label_smoothing_factor 0.1", "--label_smoothing_factor is not supported"),
    ("--mix 1,x", r"MIX=1,x \(--mix\): give numbers with commas between them"),
    ("--mix 1,1", "numbers for 2 files, but the training has 1"),
    ("--mix nan", "a share is at least 0, and that of the first file is above 0"),
    ("--mix 1 --train_sampling_strategy sequential", "--mix draws rows at random"),
    (
        "--tokens_per_batch 64",
        r"--tokens_per_batch 64 \(TOKENS_PER_BATCH\): a row may count for 1,153 tokens: raise it, or lower",
    ),
    ("--tokens_per_batch 20 --max_source_length 8 --max_target_length 8", "a row may count for 32 tokens"),
    ("--tokens_per_batch 4096 --mix 1", r"batches of like length from .* all files: leave out MIX \(--mix\)"),
    ("--tokens_per_batch 4096 --group_by_length false", "leave out --train_sampling_strategy random"),
    ("--tokens_per_batch 4096 --dataloader_drop_last", "leave out --dataloader_drop_last"),
    ("--tokens_per_batch 4096 --rows_per_step 4", "leave out BATCH_SIZE .* and ROWS_PER_STEP"),
    ("--packing --ignore_pad_token_for_loss false", "--packing leaves no pads to learn"),
    ("--optim galore_adamw", "--optim galore_adamw can't be used: You need to install `galore_torch`"),
    ("--optim adamw_torch_xla", "--optim adamw_torch_xla can't be used: Trainer failed to import"),
    ("--optim adamw_torch_4bit", "--optim adamw_torch_4bit can't be used: You need to have `torchao"),
    ("--optim_args fast", "--optim_args fast can't be used"),
    ("--optim sgd --loraplus_lr_ratio 16", "--loraplus_lr_ratio trains by AdamW: leave out --optim sgd"),
    ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr .* One of min_lr"),
    ("--lr_scheduler_type warmup_stable_decay", "--lr_scheduler_type warmup_stable_decay .*num_decay_steps"),
    ("--lr_scheduler_type polynomial --learning_rate 1e-8", "must be smaller than initial lr"),
    ("--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau requires an eval strategy"),
    ('--lr_scheduler_kwargs {"a":1}', "--lr_scheduler_kwargs .* unexpected keyword argument 'a'"),
    ('--lr_scheduler_kwargs {"a"', "--lr_scheduler_kwargs: .* is broken JSON"),
    ("--lr_scheduler_kwargs []", r"--lr_scheduler_kwargs: no file \[\]"),
    ('--activation_checkpointing_kwargs {"a":1}', "--activation_checkpointing_kwargs .* unexpected keyword"),
    ("--accelerator_config nowhere.json", "--accelerator_config: no file nowhere.json"),
    ('--accelerator_config {"a":1}', "--accelerator_config: there is no setting a"),
    ('--accelerator_config {"dispatch_batches":true}', "--accelerator_config: dispatch_batches is not supported"),
    ("--torch_compile_backend turbo", "--torch_compile_backend turbo can't be used"),
    ("--use_liger_kernel", "--use_liger_kernel: .* -m pip install liger-kernel"),
    ("--dataloader_persistent_workers", "--dataloader_persistent_workers True can't be used: .* needs num_workers > 0"),
    ("--dataloader_multiprocessing_context spawn", "--dataloader_multiprocessing_context spawn can't be used"),
    ("--dataloader_prefetch_factor 2", "--dataloader_prefetch_factor can only be set when"),
    ("--dataloader_drop_last --per_device_train_batch_size 50", "4 rows fill no batch of 50"),
    ("--push_to_hub", "--push_to_hub can't be used"),
    ("--report_to wandb", "--report_to wandb: wandb is not installed here: .* -m pip install wandb"),
    ("--report_to tensorboard swanlab comet_ml", r"swanlab, comet_ml are not .* 'swanlab\[dashboard\]<0.8' comet-ml"),
    ("--report_to mlflow,tensorboard", "mlflow is not installed"),
    ("--report_to wandbb", "wandbb is no tracker; there are .*, tensorboard, .*, wandb"),
    ("--report_to none wandb", "--report_to none,wandb: none is no tracker; it stands alone"),
    (
        "--do_eval --validation_file train.json --eval_strategy steps --eval_steps 1 --metric_for_best_model loss "
        "--greater_is_better true",
        "--greater_is_better True would keep the worst loss",
    ),
    ("--save_strategy best", "--save_strategy best needs BEST_METRIC"),
    ("--load_best_model_at_end --eval_strategy no", "requires the save and eval strategy to match"),
    ("--load_best_model_at_end --save_strategy no", "the best checkpoint by loss needs evaluations during training"),
    (
        "--do_eval --eval_strategy steps --eval_steps 1 --metric_for_best_model f1",
        r"f1 \(BEST_METRIC\): there are loss",
    ),
    ("--max_source_length 1000000000", "a pass of .* tokens is more than any machine holds: lower BATCH_SIZE"),
    ("--per_device_train_batch_size 1000000", "a pass of .* tokens is more than any machine holds"),
    ("--tokenizer_name demo3", "--tokenizer_name demo3: it is a ChatGLM3Tokenizer.* another model: leave it out"),
    ("--config_name demo3", "--config_name demo3 is the config of another model than demo"),
    ("--tokenizer_name nowhere", "no model folder nowhere"),
    ("--resume_from_checkpoint true", "out holds no whole checkpoint: choose another --output_dir"),
    ("--output_dir train.json/out", "can't write to the output folder train.json/out: Not a directory"),
)
DATA = [
    *cases(
        ("--train_file nowhere.json", "no data file nowhere.json"),
        ("--do_predict --test_file nowhere.json", "no data file nowhere.json"),
        ("--test_file nowhere.json", "no data file nowhere.json"),
        ("--prompt_column question", "no column 'question'; there are 'content', 'summary'"),
        ("--train_file {bad}/broken_line.json", "broken_line.json, line 2: broken JSON"),
        ("--train_file {bad}/broken_array.json", "broken_array.json, line 3: broken JSON"),
        ("--train_file {bad}/number.json", "line 2: column 'summary' holds int 7, expected a string"),
        ("--train_file {bad}/nothing_to_learn.json", "no row with a question and an answer: 3 rows lack one"),
        ("--train_file {bad}/empty.json", "empty.json: no row .* there are no rows at all"),
        ("--train_file {bad}/no_objects.json", "row 1: expected an object"),
        ("--train_file {bad}/broken.csv", "line 3: this row has more or fewer fields"),
        ("--train_file {bad}/open_quote.csv", "broken CSV"),
        ("--train_file {bad}/history.json --history_column history", r"line 1: column 'history' must hold \[\["),
    ),
    *(
        Case(f"--train_file rows{ending}", says, files={f"rows{ending}": content})
        for ending, content, says in (
            (".json", "0", "line 1: expected an object .*, found int"),
            (".json", "[" * 100_000, "nested too deeply"),
            (".json", '{"content": ' + "1" * 5000 + "}", "Exceeds the limit"),
            (".json", '{"content": "a", "content": "b", "summary": "c"}', "duplicate key 'content'"),
            (".json", b'{"content": "a\xff", "summary": "b"}', "byte 0xff at offset 14 is not UTF-8"),
            (".json", '{"content": "\\ud83d", "summary": "b"}', "half a character"),
            (".json", '{"content": NaN, "summary": "b"}', "column 'content' holds float nan, expected a string"),
            (".json", '{"content": "a\0", "summary": "b"}', "Invalid control character"),
            (".json", '{"content": "' + "a" * 10**7, "Unterminated string"),
            (".csv", "content,content\na,b\n", "more than one column is named 'content'"),
            (".parquet", "content,summary\n", "is no Parquet file"),
            (".parquet", b"PAR1" + bytes(50), "broken Parquet after row 0"),
            (".xlsx", b"PK\x03\x04cut", "is an Excel workbook: save it as CSV UTF-8"),
            (".json", "<!DOCTYPE html><html>", "is a web page that was saved as data"),
            (".json", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
            (".md", "# Data", "the ending .md is not read"),
            (".json", '{"a": "b", "c": "d"}', "unknown shape of row: its keys are 'a', 'c'"),
            (".json", '{"chosen": "a", "rejected": "b"}', r"preference data \('chosen' and 'rejected'\)"),
        )
    ),
    *cases(
        *(
            (f"--model_name_or_path demo3 --train_file {{bad}}/{name}.json", f"{name}.json, line 2: {says}")
            for name, says in (
                ("unknown_role", "message 2: unknown role 'robot'; there are system, user"),
                ("two_systems", "message 2: a system message comes first and only once"),
                ("late_system", "message 2: a system message comes first and only once"),
                ("empty_conversation", "column 'messages' must hold a list of messages, and not an empty one"),
                ("assistant_first", "message 1: a conversation begins with the user, not with assistant"),
                ("loss_text", "message 2: loss must be true or false, not 'false'"),
                ("broken_tools", "column 'tools' is not JSON"),
                ("no_list", "column 'messages' must hold a list of messages"),
                ("only_system", "column 'messages' holds a system message and nothing else"),
                ("text_message", "message 2: "),
                ("content_list", r"message 1: content holds list \['你好'\], expected a string"),
                ("broken_arguments", "message 2: the parameters of f is not JSON"),
                ("function_text", r'message 2: tool_calls must hold \[\{"function": \{"name"'),
                ("half_character", "message 2: .*half a character"),
            )
        ),
        ("--train_file {bad}/two_questions.json", "line 2: turn 2 has the role user.*ChatGLM-6B and ChatGLM2-6B"),
    ),
]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DEMO = json.loads((ROOT / "common" / "demo" / "chatglm" / "config.json").read_text())
MODELS = [
    *cases(
        ("--model_name_or_path ./nowhere/model", "no model folder ./nowhere/model"),
        ("--model_name_or_path train.json", "train.json is a file: MODEL .* is the folder that holds a model"),
        ("--model_name_or_path .", "no model folder: it has no config.json"),
        ("--model_name_or_path model --output_dir model", "is the base model, which would be overwritten"),
    ),
    Case("--quantization_bit 4", "--quantization_bit: integers have no gradients to train", "full"),
    Case("", "--do_train needs --pre_seq_len", "ptuning"),
    *(
        Case("--model_name_or_path model", says, files={f"model/{name}": content})
        for name, content, says in (
            ("config.json", "", "config.json is no JSON object"),
            ("config.json", "[]", "config.json is no JSON object"),
            ("config.json", POINTER, "config.json is a Git LFS pointer, not the settings of the model: run git lfs"),
            ("config.json", DEMO | {"model_type": "llama"}, "type 'llama': supported are ChatGLM-6B, ChatGLM2-6B"),
            ("config.json", DEMO | {"vocab_size": 150528}, "old vocabulary of 150,528"),
            ("config.json", DEMO | {"num_layers": "6"}, "num_layers is '6', not"),
            ("config.json", DEMO | {"vision_config": {}}, "a model that sees pictures"),
            ("config.json", DEMO | {"quantization_bit": 3}, "quantization_bit is 3; only 4 and 8 exist"),
            ("tokenizer_config.json", "[]", "tokenizer_config.json is no JSON object"),
            ("generation_config.json", "{", "generation_config.json is no JSON object"),
            ("ice_text.model", None, "ice_text.model is missing"),
            ("ice_text.model", b"\x80\x02}q\x00.", "ice_text.model is no vocabulary of ChatGLM-6B"),
            ("pytorch_model.bin", None, "has no weights"),
            ("pytorch_model.bin", POINTER, "pytorch_model.bin is a Git LFS pointer, not the weights"),
            ("pytorch_model.bin", b"PK\x03\x04" + bytes(100), "pytorch_model.bin is truncated"),
            ("pytorch_model.bin.index.json", '{"weight_map": ["a"]}', "index.json is broken"),
            ("pytorch_model.bin.index.json", '{"weight_map": {"a": "b.bin"}}', "b.bin is missing, though the index"),
        )
    ),
]
YAML = {
    "data_config": {"train_file": "train.json", "prompt_column": "content", "response_column": "summary"},
    "max_input_length": 16,
    "training_args": {"output_dir": "out", "max_steps": 1, "learning_rate": 5e-5, "use_cpu": True},
    "peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8},
}


def changed(section: str, **values: object) -> str:
    """The configuration file, as JSON, which YAML reads too, with other values in a section."""
    return json.dumps(YAML | {section: YAML[section] | values})


CONFIGS = [
    Case("", says, "finetune_hf", ". demo lora.yaml", {"lora.yaml": content})
    for content, says in (
        (
            changed("training_args", learnin_rate=1),
            "unknown key training_args.learnin_rate: did you mean learning_rate",
        ),
        (changed("peft_config", lora_alfa=1), "unknown key peft_config.lora_alfa: did you mean lora_alpha?"),
        (changed("training_args", lacks_gpu=True), "unknown key training_args.lacks_gpu"),  # a field that is no flag
        (changed("data_config", held_out=True), "unknown key data_config.held_out"),
        (changed("data_config", train_fil="x"), "unknown key data_config.train_fil: did you mean train_file?"),
        (json.dumps(YAML | {"max_inputs": 1}), "unknown key max_inputs: did you mean max_input_length?"),
        (
            changed("training_args", generation_config={"max_tokens": 5}),
            "unknown key training_args.generation_config.max_tokens",
        ),
        (changed("peft_config", task_type="SEQ_CLS"), "peft_config.task_type is 'SEQ_CLS'"),
        (changed("peft_config", peft_type="IA3"), "peft_config.peft_type is 'IA3'; there are LORA and PREFIX_TUNING"),
        (changed("training_args", deepspeed="nowhere.json"), "training_args.deepspeed: no file nowhere.json"),
        ("training_args: [", "lora.yaml: broken YAML"),
        ("[1, 2]", "lora.yaml: expected sections like training_args:, found list"),
        ("training_args: 5", "lora.yaml: training_args must hold keys with values"),
        (b"a: \xff", "lora.yaml: broken YAML"),
        ("a: &a [*a]", "unknown key a"),
        ("[" * 5000, "lora.yaml: broken YAML"),
        (changed("data_config", train_file=5), "data_config.train_file is 5: give the name of a file, or a list"),
        (
            changed("data_config", prompt_column=["a"]),
            r"data_config.prompt_column is \['a'\]: give the name of a column",
        ),
        (changed("training_args", max_steps=1.5), r"MAX_STEPS \(--max_steps\) must be a whole number, not 1.5"),
        (changed("training_args", max_steps=True), r"MAX_STEPS \(--max_steps\) must be a whole number, not True"),
        (changed("training_args", learning_rate=[1]), r"LR \(--learning_rate\) must be a number, not \[1\]"),
        (changed("training_args", weight_decay=-1), "--weight_decay must be at least 0, not -1"),
        (
            changed("training_args", save_strategy=False),
            "--save_strategy must be one of no, steps, epoch, best, not False",
        ),
        (changed("training_args", log_level="loud"), "--log_level must be one of detail, .*, not 'loud'"),
        (changed("training_args", report_to=5), "--report_to must be a list of texts, not 5"),
        (changed("training_args", activation_checkpointing=1.5), "--activation_checkpointing 1.5: give true, false"),
        (changed("training_args", use_cpu="perhaps"), "use_cpu"),
        (changed("peft_config", r=0), r"LORA_RANK \(--lora_rank\) must be at least 1, not 0"),
        (changed("peft_config", target_modules=["nowhere"]), "--lora_target: the model has no linear layer nowhere"),
        (changed("peft_config", target_modules=[1]), "--lora_target: the model has no linear layer 1"),
        (json.dumps(YAML | {"max_input_length": []}), r"MAX_SOURCE_LENGTH \(--max_source_length\) must be a whole"),
    )
]
CONFIGS += cases(
    (". demo nowhere.yaml", "can't read the configuration file nowhere.yaml"),
    (". demo lora.yaml 7", "no checkpoint 7 in out: there is none"),
    program="finetune_hf",
    base="",
    files={"lora.yaml": json.dumps(YAML)},
)
THREE = {"EXPECTED_PROCESSES": "3"}
ENGINES = [
    Case(f"--deepspeed ds.json {flags}", rf"ds.json.*{says}", "full", TRAIN, {"ds.json": content}, THREE)
    for content, flags, says in (
        ("{broken", "", "is broken JSON"),
        ("[]", "", "must hold an object, found list"),
        ({"zero_optimization": {"stage": "three"}}, "", "zero_optimization.stage is 'three': give 0, 1, 2 or 3"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "", "zero_optimization.reduce_bucket_size is 'big': "),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": [1]}}, "", r"_live_parameters is \[1\]: "),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "", "offload_optimizer.device is 'gpu': "),
        ({"zero_optimization": {"offload_optimizer": 0}}, "", "offload_optimizer is 0, not an object with settings"),
        ({"zero_optimization": {"cpu_offload": "often"}}, "", "zero_optimization.cpu_offload is 'often': "),
        ({"zero_optimization": {"bucket_size": 3}}, "", "zero_optimization.bucket_size is 3: there is no such"),
        ({"zero_optimization": 3}, "", "zero_optimization is 3, not an object with settings"),
        ({"zero_optimization": {"offload_optimizer": "auto"}}, "", "offload_optimizer is 'auto', not an"),
        ({"train_batch_size": "many"}, "", "train_batch_size is 'many': give a number, or \"auto\""),
        ({"fp16": {"enabled": False, "loss_scale": "big"}}, "", "fp16.loss_scale is 'big': "),
        ({"optimizer": {"type": "AdamW", "params": 0}}, "", "optimizer.params is 0, not an object"),
        ({"amp": {"enabled": True}}, "", "Apex AMP integration has been removed"),
        ({"fp16": {"enabled": True}}, "", "fp16.enabled=True, but --fp16 or --fp16_full_eval=False"),
        ({"gradient_clipping": 0.5}, "", "gradient_clipping=0.5, but --max_grad_norm=1.0"),
        ({"train_micro_batch_size_per_gpu": 4}, "--per_device_train_batch_size 2", "_gpu=4, but --per_device_train_"),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 300}}},
            "",
            "scheduler.params.total_num_steps=300, but --max_steps=1",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
            "--learning_rate 1e-4",
            "optimizer.params.lr=1e-05, but --learning_rate=0.0001",
        ),
        (
            {"train_batch_size": 16},
            "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
            "=16, but --per_device_train_batch_size x gradient_accumulation_steps x 3 processes=24",
        ),
    )
] + cases(
    ("--deepspeed nowhere.json", "--deepspeed: no file nowhere.json"),
    ("--deepspeed {} --per_device_train_batch_size auto", "under DeepSpeed give a number"),
    ("--deepspeed {} --fsdp true", "--deepspeed and --fsdp shard the same things: give one of them"),
    ("--fsdp nonsense", "Unknown `fsdp` option: nonsense"),
    ('--fsdp true --fsdp_config {"fsdp_state_dict_type":"SHARDED_STATE_DICT"}', "must be FULL_STATE_DICT"),
    ('--fsdp true --fsdp_config {"version":1}', "FSDP2 is version 2"),
    ('--fsdp true --fsdp_config {"version":"new"}', "--fsdp_config: version"),
    ('--fsdp_config {"a"', "--fsdp_config: .* is broken JSON"),
    ("--fsdp true", "--fsdp needs GPUs"),
    program="full",
)


# Each is trained for a step; a name of a file below "adapter/", "prefix/" or "model/" changes a copy of the first two,
# or of the demo.
TRAININGS = {"lora": "", "ptuning": "--pre_seq_len 4", "full": ""}
CHECKPOINTS = [
    Case(f"{flags} --resume_from_checkpoint {{trained}}/{checkpoint}/checkpoint-1", says, program)
    for program, flags, checkpoint, says in (
        ("lora", "", "ptuning", "LoRA"),
        ("lora", "", "full", "LoRA"),
        ("lora", "--lora_rank 4", "lora", "lora_rank was 8, now 4"),
        ("lora", "--lora_alpha 16", "lora", "lora_alpha was 32, now 16"),
        ("lora", "--use_dora", "lora", "use_dora was False, now True"),
        ("lora", "--lora_target dense", "lora", "lora_target was .*, now 'dense'"),
        ("lora", "--model_name_or_path demo3", "lora", "model"),
        ("ptuning", "--pre_seq_len 4", "lora", "P-Tuning v2"),
        ("ptuning", "--pre_seq_len 4", "full", "P-Tuning v2"),
        ("ptuning", "--pre_seq_len 8", "ptuning", "pre_seq_len was 4, now 8"),
        ("ptuning", "--pre_seq_len 4 --prefix_projection", "ptuning", "prefix_projection was False, now True"),
        ("ptuning", "--pre_seq_len 4 --model_name_or_path demo3", "ptuning", "model"),
        ("full", "", "lora", "full-parameter training"),
        ("full", "", "ptuning", "full-parameter training"),
        ("full", "--model_name_or_path demo3", "full", "model was .*, now "),
    )
]
CHECKPOINTS += cases(
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere is not whole: manifest.json is missing"),
    ("--resume_from_checkpoint {trained}", "is not whole: manifest.json is missing. Name another, or none"),
    ("--overwrite_output_dir --resume_from_checkpoint nowhere", "nowhere is not whole"),
)
CHECKPOINTS += [
    Case("--resume_from_checkpoint adapter/checkpoint-1", says, files={f"adapter/checkpoint-1/{name}": content})
    for name, content, says in (
        ("manifest.json", None, "is not whole: manifest.json is missing"),
        ("manifest.json", "{", "is not whole: manifest.json is broken"),
        ("manifest.json", {"files": {}}, "settings|is not whole"),
        ("optimizer.pt", None, "is not whole: optimizer.pt is missing"),
        ("adapter_model.safetensors", b"cut", "is not whole: adapter_model.safetensors has 3 bytes instead of"),
    )
]
ADAPTERS = [
    *cases(
        ("--lora_checkpoint {trained}/lora --lora_rank 16", "was trained with --lora_rank 8, not 16: leave it out"),
        ("--lora_checkpoint {trained}/lora --lora_dropout 0.5", "was trained with --lora_dropout 0.1, not 0.5"),
        ("--lora_checkpoint {trained}/lora --use_rslora", "was trained with --use_rslora False, not True"),
        ("--lora_checkpoint {trained}/lora --model_name_or_path demo3", "belongs to another model"),
        ("--lora_checkpoint {trained}/ptuning", "holds no LoRA adapter: adapter_config.json is missing or broken"),
        ("--lora_checkpoint nowhere", "nowhere holds no LoRA adapter"),
        ("--lora_target q_proj", "--lora_target: the model has no linear layer q_proj"),
    ),
    *(
        Case("--lora_checkpoint adapter", says, files={f"adapter/{name}": content})
        for name, content, says in (
            ("adapter_config.json", "{", "holds no LoRA adapter: adapter_config.json is missing or broken"),
            ("adapter_config.json", {"peft_type": "IA3"}, "holds an adapter of the kind IA3, not LORA"),
            ("adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 32}, "lacks target_modules"),
            ("adapter_model.safetensors", None, "holds no adapter weights"),
            ("adapter_model.safetensors", POINTER, "adapter_model.safetensors is a Git LFS pointer"),
            ("adapter_model.safetensors", bytes(100), "adapter_model.safetensors is truncated"),
        )
    ),
    *cases(
        ("--ptuning_checkpoint {trained}/ptuning --pre_seq_len 9", "with --pre_seq_len 4, not 9"),
        ("--ptuning_checkpoint {trained}/ptuning --prefix_projection", "--prefix_projection False, not True"),
        ("--ptuning_checkpoint {trained}/ptuning --model_name_or_path demo3", "does not belong to this model"),
        ("--ptuning_checkpoint {trained}/lora", "holds no prefix"),
        ("--ptuning_checkpoint nowhere", "nowhere holds no prefix"),
        ("--pre_seq_len 8", "--pre_seq_len makes an untrained prefix: give --ptuning_checkpoint to evaluate one"),
        program="ptuning",
        base=PREDICT,
    ),
    Case("--ptuning_checkpoint prefix", "broken table", "ptuning", files={"prefix/pytorch_model.bin": b"\x80\x02}q"}),
    *cases(
        ("--checkpoint nowhere", "no training in nowhere"),
        ("--checkpoint .", "no training in ."),
        base="",
    ),
]
ENVIRONMENT = [
    Case(flags, says, environ=environ)
    for environ, flags, says in (
        ({"EXPECTED_PROCESSES": "2"}, "", "2 processes were asked for and 1 are running"),
        ({"CHATGLM_CACHE": "/proc/nowhere"}, "", "can't write to the cache /proc/nowhere .* set CHATGLM_CACHE"),
        ({"CHATGLM_CACHE": "", "XDG_CACHE_HOME": "/proc/nowhere"}, "", "can't write to the cache /proc/nowhere/"),
        ({"CHATGLM_CACHE": "", "HOME": "/proc/nowhere"}, "", "can't write to the cache /proc/nowhere/.cache/"),
        ({"HUB": "github"}, "--model_name_or_path chatglm3-6b", "HUB=github: choose huggingface or modelscope"),
        ({"DEVICE_MEMORY": "much"}, "--plan", "DEVICE_MEMORY=much"),
    )
]
OF_OTHERS = [Case("--lora_rank 8", "unknown flag --lora_rank", program) for program in ("ptuning", "full")]
ALL = [*NUMBERS, *FLAGS, *OF_OTHERS, *DATA, *MODELS, *CONFIGS, *ENGINES, *CHECKPOINTS, *ADAPTERS, *ENVIRONMENT]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A training of each method, with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.json").write_text(ROWS)
    for program, flags in TRAININGS.items():
        base = TRAIN.replace("train.json", str(folder / "train.json"))
        start(program, f"{base} {flags} --output_dir {folder / program} --save_steps 1 --max_source_length 8")
    return folder


def start(program: str, flags: str, **environ: str) -> int:
    file = ROOT / "common" / f"{program}.py" if program == "finetune_hf" else ROOT / program / "main.py"
    return run_program([str(file), *flags.split()], **environ)


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.program} {case.flags} {case.says}"[:60])
def test_bad_input_is_one_sentence_before_anything_is_loaded(case, tmp_path, trained, monkeypatch, capfd):
    def load(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    origins = {
        "adapter": trained / "lora",
        "prefix": trained / "ptuning",
        "model": ROOT / "common" / "demo" / "chatglm",
    }
    for name, origin in origins.items():
        if any(file.startswith(f"{name}/") for file in case.files) or f" {name}" in case.flags:
            shutil.copytree(origin, name)
    for name, content in {"train.json": ROWS, "out/result.txt": "mine", **case.files}.items():
        file = Path(name)
        file.parent.mkdir(exist_ok=True)
        if content is None:
            file.unlink()
        else:
            text = json.dumps(content) if isinstance(content, dict) else content
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = snapshot(tmp_path)
    flags = f"{case.base} {'' if case.program == 'finetune_hf' else '--output_dir out'} {case.flags}"
    flags = flags.replace("{trained}", str(trained)).replace("{bad}", str(BAD))
    code = start(case.program, flags, **case.environ)
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2, said
    assert len(errors) == 1 and "Traceback" not in said, said
    assert re.search(case.says, errors[0]), errors[0]
    assert snapshot(tmp_path) == before


def test_there_are_many_cases():
    assert len(ALL) >= 120
