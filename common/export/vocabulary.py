"""The vocabularies of ChatGLM2-6B to GLM-4 as tokenizer.json, and their chat formats as templates."""

import json
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from common.tokenizers.base import added_tokens
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer
from common.tokenizers.chatglm4 import ChatGLM4Tokenizer, as_fast
from common.tokenizers.tools import FUNCTION, OWN_TOOLS, TOOLS

# Where other programs look for special tokens in text, they would find the original sop and eop in "philosophy" and
# "people": those are written as in GLM-4, with the same numbers.
RENAMED = {"sop": "<sop>", "eop": "<eop>"}

# The original encodes metadata line and content apart, each with a space before it. These tokenizers put the space
# after a special token only, so that the template writes that of the content. A model writes its answer with the
# empty metadata line, "\n …", which programs give back as a part of the text: an answer that comes back loses it.
MESSAGES = r"""[gMASK]<sop>
{%- if tools -%}{{- '<|system|>\n ' + (tools | tojson) -}}{%- endif -%}
{%- for message in messages -%}
    {%- set content = message['content'] or '' -%}
    {%- if message['role'] == 'assistant' and content[:2] == '\n ' -%}
        {%- set content = content[2:] -%}
    {%- elif message['tools'] and content -%}
        {%- set content = content + '\n' + (message['tools'] | tojson(indent=4)) -%}
    {%- elif message['tools'] -%}
        {%- set content = message['tools'] | tojson -%}
    {%- endif -%}
    {%- if content or message['metadata'] or not message['tool_calls'] -%}
        {{- '<|' + ('observation' if message['role'] == 'tool' else message['role']) + '|>' -}}
        {{- (message['metadata'] or '') + '\n' + (' ' + content if content else '') -}}
    {%- endif -%}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set function = call['function'] or call -%}
        {{- '<|assistant|>' + function['name'] + '\n ```python\ntool_call(' -}}
        {%- for name, value in function['arguments'].items() -%}
            {{- name + '=' + '%r' | format(value) + ('' if loop.last else ', ') -}}
        {%- endfor -%}
        {{- ')\n```' -}}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
ROUNDS = r"""[gMASK]<sop>
{%- set rounds = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- set rounds.count = rounds.count + 1 -%}
        {{- ('' if loop.first else '\n\n') + '[Round ' ~ rounds.count ~ ']\n\n问：' + message['content'] -}}
    {%- else -%}
        {{- '\n\n答：' + message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n\n答：' -}}{%- endif -%}"""
# GLM-4 reads its tools in a system message of their own.
GLM4 = (
    "{%- set own = " + json.dumps(OWN_TOOLS, ensure_ascii=False) + " -%}"
    "{%- macro described(tools) -%}{{- '<|system|>\\n" + TOOLS.replace("\n", "\\n") + "' -}}"
    r"""
    {%- for tool in tools -%}
        {%- set function = tool['function'] or tool -%}
        {{- '\n\n## ' + (function['name'] or tool['type']) + '\n\n' -}}
        {{- own[tool['type']] or (function | tojson(indent=4)) + '\n"""
    + FUNCTION
    + r"""' -}}
    {%- endfor -%}
{%- endmacro -%}
[gMASK]<sop>
{%- if tools -%}{{- described(tools) -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message['tools'] -%}{{- described(message['tools']) -}}{%- endif -%}
    {%- if message['content'] or message['role'] == 'assistant' and not message['tool_calls'] -%}
        {{- '<|' + ('observation' if message['role'] == 'tool' else message['role']) + '|>' -}}
        {{- (message['metadata'] or '') + '\n' + (message['content'] or '') -}}
    {%- endif -%}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set function = call['function'] or call -%}
        {{- '<|assistant|>' + function['name'] + '\n' -}}
        {{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson -}}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
)
TEMPLATES = {"chatglm2": ROUNDS, "chatglm3": MESSAGES, "chatglm4": GLM4}


def special_tokens(tokenizer: ChatGLM2Tokenizer) -> dict[str, int]:
    """The special tokens as other programs know them, and their numbers."""
    return {RENAMED.get(token, token): number for token, number in tokenizer.special_token_ids.items()}


def as_bpe(tokenizer: ChatGLM2Tokenizer) -> Tokenizer:
    """The vocabulary with merges: two pieces merge as early as the piece that they make has a high score."""
    pieces: SentencePieceProcessor = tokenizer.pieces
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    texts = {
        piece: index
        for piece, index in vocabulary.items()
        if not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index))
    }
    merges: list[tuple[str, str]] = []
    for piece, _ in sorted(texts.items(), key=lambda item: -pieces.get_score(item[1])):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in texts and pair[1] in texts]
        merges += sorted(pairs, key=lambda pair: (texts[pair[0]], texts[pair[1]]))
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens(tokenizer)])
    return bpe


def save_vocabulary(tokenizer: ChatGLM2Tokenizer, folder: Path, length: int) -> None:
    """Writes the files of a tokenizer that transformers loads without our code; ``length``: the longest text."""
    fast = as_fast(tokenizer) if isinstance(tokenizer, ChatGLM4Tokenizer) else as_bpe(tokenizer)
    fast.save(str(folder / "tokenizer.json"))
    shutil.copyfile(tokenizer.vocab_file, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.named_tokens,
        **{"padding_side": "left", "clean_up_tokenization_spaces": False, "model_max_length": length},
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": added_tokens(special_tokens(tokenizer)),
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATES[tokenizer.model_family], encoding="utf-8")
