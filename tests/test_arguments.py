"""The command line: official flags, old spellings, and bad values that are named in one sentence."""

import pytest

from common.arguments import parse_arguments
from common.errors import UserError

OFFICIAL_TRAIN = """--do_train --train_file train.json --validation_file dev.json --prompt_column content
--response_column summary --overwrite_cache --model_name_or_path chatglm-6b --output_dir output --overwrite_output_dir
--max_source_length 64 --max_target_length 64 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
--gradient_accumulation_steps 16 --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000
--learning_rate 2e-2 --pre_seq_len 128 --quantization_bit 4"""


def test_the_official_flags_mean_what_they_meant():
    model_args, data_args, args = parse_arguments(OFFICIAL_TRAIN.split())
    assert (model_args.pre_seq_len, model_args.quantization_bit, model_args.prefix_projection) == (128, 4, False)
    assert (data_args.max_source_length, data_args.max_target_length, data_args.val_max_target_length) == (64, 64, 64)
    assert (data_args.overwrite_cache, data_args.ignore_pad_token_for_loss) == (True, True)
    assert (args.overwrite_output_dir, args.max_steps, args.learning_rate) == (True, 3000, 0.02)
    assert (args.gradient_accumulation_steps, args.predict_with_generate) == (16, True)
    assert args.report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        (["--evaluation_strategy", "epoch"], "eval_strategy", "epoch"),
        (["--evaluation_strategy=epoch"], "eval_strategy", "epoch"),
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--no_cuda"], "use_cpu", True),
        (["--group_by_length"], "train_sampling_strategy", "group_by_length"),
        (["--group_by_length", "false"], "train_sampling_strategy", "random"),
        (["--logging_dir", "logs"], "output_dir", "out"),
        (["--use_fast_tokenizer"], "output_dir", "out"),
    ],
)
def test_old_spellings_work_with_one_line_of_advice(old, name, value, capsys):
    args = parse_arguments([*old, "--output_dir", "out"])[2]
    assert vars(args)[name] == value
    advice = capsys.readouterr().err.splitlines()
    assert len(advice) == (0 if old[-1] == "false" else 1)
    assert all(old[0].split("=")[0] in line for line in advice)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--lerning_rate 1", "unknown flag --lerning_rate: did you mean --learning_rate"),
        ("--learning_rate fast", "learning_rate.*invalid float value: 'fast'"),
        ("--max_source_length 1", "at least 3 tokens"),
        ("--load_best_model_at_end --eval_strategy no", "requires the save and eval strategy to match"),
    ],
)
def test_bad_flags_are_named_in_one_sentence(argv, says):
    with pytest.raises(UserError, match=says) as error:
        parse_arguments(argv.split())
    assert "\n" not in str(error.value)
