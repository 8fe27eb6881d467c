"""GLM-4 as transformers has it, but for its loss: the head computes the logits of labelled positions only."""

import transformers

from common.models.base import ForNextToken


class GlmForCausalLM(ForNextToken, transformers.GlmForCausalLM):
    pass


class Glm4ForCausalLM(ForNextToken, transformers.Glm4ForCausalLM):
    pass
