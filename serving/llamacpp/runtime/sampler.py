"""Sampler chains, in C."""

from __future__ import annotations

import llama_cpp

from serving.llamacpp.runtime.context import Context
from serving.llamacpp.runtime.model import Model
from serving.llamacpp.sampling import SamplingParams


class Sampler:
    """One sequence's chain of samplers, in C. It remembers the tokens it chose (for penalties)."""

    def __init__(self, model: Model, params: SamplingParams, context_length: int) -> None:
        self._is_greedy = params.is_greedy
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        if params.logit_bias:
            biases = (llama_cpp.llama_logit_bias * len(params.logit_bias))(
                *(llama_cpp.llama_logit_bias(token, bias) for token, bias in params.logit_bias)
            )
            self._add(
                llama_cpp.llama_sampler_init_logit_bias(
                    model.vocab_size, len(params.logit_bias), biases
                )
            )
        if params.frequency_penalty or params.presence_penalty:
            self._add(
                llama_cpp.llama_sampler_init_penalties(
                    model.vocab_size,
                    context_length,
                    1.0,
                    params.frequency_penalty,
                    params.presence_penalty,
                )
            )
        if params.temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        # Temperature first, as in Transformers and vLLM: top_p then cuts the distribution sampled from.
        if params.temperature != 1:
            self._add(llama_cpp.llama_sampler_init_temp(params.temperature))
        if params.top_k:
            self._add(llama_cpp.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(params.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_dist(params.seed))

    def _add(self, sampler: llama_cpp.llama_sampler_p) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Context, row: int) -> int:
        """Choose and remember the token that follows a row of the context's last batch."""
        if self._is_greedy:
            return int(context.logits(row).argmax())
        return int(llama_cpp.llama_sampler_sample(self._chain, context.handle, row))

    def close(self) -> None:
        """Free the chain. It must not be used afterwards."""
        llama_cpp.llama_sampler_free(self._chain)
