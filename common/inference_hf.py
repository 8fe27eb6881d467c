"""Answer one question with a trained adapter, a trained prefix, or a full checkpoint.

python common/inference_hf.py CHECKPOINT --prompt "你好"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.chat.chat import chat_parser, generation_settings, load_chat, stream_chat
from common.errors import exit_on_user_error


def main() -> None:
    parser = chat_parser(__doc__.splitlines()[0], "checkpoint")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.set_defaults(top_p=0.8, temperature=0.8)
    args = parser.parse_args()
    if not Path(args.checkpoint).is_dir():  # a demo or a hub id
        args.model_name_or_path, args.checkpoint = args.checkpoint, None
    model, tokenizer, _ = load_chat(args)
    generation = generation_settings(args.max_new_tokens, args.temperature, args.top_p)
    *_, answer = "", *stream_chat(model, tokenizer, args.prompt, system=args.system_prompt, **generation)
    print(answer)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
