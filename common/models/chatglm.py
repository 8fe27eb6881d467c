"""ChatGLM-6B on transformers 5, with the module and parameter names of the original checkpoints.

GLM: General Language Model Pretraining with Autoregressive Blank Infilling, https://arxiv.org/abs/2103.10360

Shapes: b batch, s new positions, t positions seen so far (prefix + cached + new), h heads, d head size, v vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from common.models.loss import next_token_loss

# The original code never passes the number of layers to its blocks. So every checkpoint, of any depth, was trained with
# the residual scale of 28 layers.
RESIDUAL_SCALE = math.sqrt(2 * 28)


class ChatGLMConfig(PreTrainedConfig):
    """The fields of the original config.json, under their original names."""

    model_type = "chatglm"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "num_key_value_heads": "num_attention_heads",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    bos_token_id: int = 130004
    eos_token_id: int | None = 130005
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def prefix_projection_size(self) -> int:
        """Width of the embedding that a prefix with projection begins with."""
        return self.hidden_size

    def to_diff_dict(self) -> dict:
        """The content of config.json. It has ``torch_dtype``, or the original code would load float32.

        It has no ``auto_map``, so that no program runs code of a checkpoint that we saved.
        """
        fields = super().to_diff_dict()
        fields.pop("auto_map", None)
        return fields | {"_name_or_path": self.name_or_path, "torch_dtype": fields.get("dtype")}


def rotary_angles(position_ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 2D rotary embedding, in float32.

    position_ids: [b, 2, s], position and block position; dim: rotary size, half of the head size.
    Returns two tensors [b, 1, s, 2, dim] that broadcast over heads.

    The original rounds the inverse frequencies to float16 even in a float32 run, and the weights were trained with
    the rounded ones. Exact frequencies would change a cosine by 0.3 at position 2,000.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
    inv_freq = (1.0 / 10000**exponents).half().float()
    angles = position_ids[..., None].float() * inv_freq  # [b, 2, s, dim / 2]
    angles = torch.cat((angles, angles), dim=-1).transpose(1, 2).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first half of each head by the position and the second by the block position. x: [b, h, s, d]."""
    x = x.unflatten(-1, (2, -1))
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).flatten(-2)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention that also returns its weights [b, h, s, t]. attention_mask: boolean, True = visible."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.scaling = config.head_dim**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        visible: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        prefix: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor | None]:
        fused = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)  # each [b, h, s, d]; a head stores its query, key and value together
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if prefix is not None:  # the learned keys and values precede the text and are not rotated
            key = torch.cat((prefix[0], key), dim=2)
            value = torch.cat((prefix[1], value), dim=2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, weights = attend(self, query, key, value, visible, scaling=self.scaling, is_causal=False)
        return self.dense(context.flatten(2)), weights


class MLP(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class GLMBlock(GradientCheckpointingLayer):
    """One layer. The residual connection starts after the norm, not before it."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        visible: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        prefix: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = normed * RESIDUAL_SCALE + self.attention(normed, visible, rotary, prefix, past_key_values)[0]
        normed = self.post_attention_layernorm(hidden_states)
        return normed * RESIDUAL_SCALE + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}
    # inv_freq is recomputed; a prefix in an old full checkpoint is read when the prefix encoder is attached.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"prefix_encoder\."]


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        # P-Tuning v2 sets it. The module maps a batch size to keys and values [layers, 2, b, h, pre_seq_len, d].
        self.prefix_encoder: nn.Module | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def context_lengths(self, input_ids: Tensor) -> Tensor:
        """Index of each row's first <sop>, counting pads, or the row's length if it has none. [b, s] -> [b]."""
        is_sop = input_ids.eq(self.config.bos_token_id)
        return torch.where(is_sop.any(-1), is_sop.int().argmax(-1), input_ids.shape[1])

    def get_position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Position and block position of every token, as the original counts them. [b, s] -> [b, 2, s].

        Before <sop> the position is 0, 1, 2, … after the left pads, and the block position is 0. From <sop> on the
        position is that of the mask token ([gMASK], else [MASK]), and the block position is 1, 2, 3, ….
        """
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        context = self.context_lengths(input_ids)[:, None]
        pads = torch.zeros_like(context)
        if attention_mask is not None and attention_mask.dim() == 2:
            pads = attention_mask.int().argmax(-1, keepdim=True)
        is_gmask, is_mask = input_ids.eq(self.config.gmask_token_id), input_ids.eq(self.config.mask_token_id)
        wanted = torch.where(is_gmask.any(-1, keepdim=True), is_gmask, is_mask)
        mask_position = wanted.int().argmax(-1, keepdim=True)
        generated = columns >= context
        position = (torch.where(generated, mask_position, columns) - pads).clamp(min=0)
        block = torch.where(generated, columns - context + 1, 0)
        return torch.stack((position, block), dim=1)

    def visible_keys(
        self, input_ids: Tensor, attention_mask: Tensor | None, past_length: int, prefix_length: int
    ) -> Tensor | None:
        """The keys that each new position may attend to: [b, 1, s, t], True = visible; None = all keys.

        Attention is bidirectional in the context (before <sop>) and causal after it. No position sees a pad, and all
        see the prefix. attention_mask: [b, past + s], 1 = token; or, as in the original, boolean [b, 1, s, past + s],
        True = hidden.
        """
        batch_size, length = input_ids.shape
        total = past_length + length
        if attention_mask is not None and attention_mask.dim() == 4:
            visible = ~attention_mask.bool()
        elif length == 1 and attention_mask is None:
            return None
        else:
            keys = torch.arange(total, device=input_ids.device)
            visible = keys <= keys[past_length:, None]  # [s, total]
            if past_length == 0:
                visible = visible | (keys < self.context_lengths(input_ids)[:, None])[:, None]  # [b, s, total]
            visible = visible.expand(batch_size, length, total)[:, None]
            if attention_mask is not None:
                visible = visible & attention_mask.bool()[:, None, None]
        return nn.functional.pad(visible, (prefix_length, 0), value=True) if prefix_length else visible

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids: [b, s]; attention_mask: see ``visible_keys``; position_ids: [b, 2, s]."""
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        prefix_length: int = 0 if self.prefix_encoder is None else self.prefix_encoder.pre_seq_len  # type: ignore
        if position_ids is None:
            position_ids = self.get_position_ids(input_ids, attention_mask)
        visible = self.visible_keys(input_ids, attention_mask, max(cached - prefix_length, 0), prefix_length)

        hidden_states = self.word_embeddings(input_ids)
        cos, sin = rotary_angles(position_ids, self.config.head_dim // 2)
        rotary = (cos.to(hidden_states.dtype), sin.to(hidden_states.dtype))
        prefixes = [None] * len(self.layers)
        if self.prefix_encoder is not None and cached == 0:  # later steps read the prefix from the cache
            prefixes = self.prefix_encoder(input_ids.shape[0], hidden_states.dtype)
        for layer, prefix in zip(self.layers, prefixes, strict=True):
            hidden_states = layer(hidden_states, visible, rotary, prefix, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Ties the output layer to the embedding even if a checkpoint stores another one, as the original does."""
        if missing_keys is not None:
            missing_keys.add("lm_head.weight")
        super().tie_weights(missing_keys, recompute_mapping)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        loss_only: bool = False,
        loss_in_parts: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits [b, s, v], and the loss if labels [b, s] are given (-100 = no loss).

        ``next_token_loss`` computes the loss; ``loss_in_parts`` is its ``in_parts``. ``loss_only`` returns no logits,
        and never computes the logits of positions without a label.
        """
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if not loss_only:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        if labels is not None:
            head = self.lm_head
            loss = next_token_loss(head, hidden_states, labels, logits, num_items_in_batch, loss_in_parts)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def original_state_dict(
        self, dtype: torch.dtype = torch.float16, weights: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The weights as the original stores them: norms in float32, with inverse frequencies, without a prefix."""
        own = {name: w for name, w in (weights or self.state_dict()).items() if "prefix_encoder." not in name}
        weights = {name: w.float() if "layernorm" in name else w.to(dtype) for name, w in own.items()}
        dim = self.config.head_dim // 2
        inv_freq = (1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)).half()
        for layer in range(self.config.num_layers):
            weights[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = inv_freq.clone()
        return weights | {"lm_head.weight": weights["transformer.word_embeddings.weight"]}

    # generate() counts positions in one dimension. These three methods keep the two dimensions of GLM: [b, 2, s].

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> Tensor:
        return self.transformer.get_position_ids(inputs_tensor, model_kwargs.get("attention_mask"))

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, **kwargs) -> dict:
        prompt_position = model_kwargs["position_ids"][:, :1, -1:]
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        model_kwargs["position_ids"][:, :1, -1:] = prompt_position  # only the block position advances
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size: int = 1, **model_kwargs) -> tuple[Tensor, dict]:
        position_ids = model_kwargs.pop("position_ids").repeat_interleave(expand_size, dim=0)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, **model_kwargs)
        return input_ids, model_kwargs | {"position_ids": position_ids}
