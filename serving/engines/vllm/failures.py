"""What the log of a vLLM that did not start means, and the mend."""

from __future__ import annotations

import re
from collections.abc import Sequence

from serving.config import VllmModel

_Mend = str
# In the order in which they are asked: causes before what follows from them. Groups and the model's keys are put in.
_FAILURES: tuple[tuple[re.Pattern[str], _Mend], ...] = tuple(
    (re.compile(pattern), mend)
    for pattern, mend in (
        (
            r"error: unrecognized arguments: (.*)",
            "it does not know the argument {0}; correct extra_args, or upgrade it: rigserve engines install vllm",
        ),
        (
            r"error: argument --max-model-len: .*auto",
            "this version cannot choose a length; set context_length, or upgrade it: rigserve engines install vllm",
        ),
        (
            r"error: argument (\S+): (.*)",
            "it does not take what follows the argument {0} ({1}); correct the key of the config, or extra_args",
        ),
        (
            r"No module named '?(vllm|torch)\b",
            "its environment is damaged; make it anew: rigserve engines install vllm",
        ),
        (
            r"address already in use|Address already in use",
            "another program has its port; set another, or leave port out for a free one",
        ),
        (
            r"max seq len \((\d+)\).*estimated maximum model length is (\d+)",
            "there is no room for the KV cache of context_length {0}; {1} would fit: set context_length: {1}, or auto, or "
            "raise memory_fraction (now {fraction})",
        ),
        (
            r"No available memory for the cache blocks|larger than the available KV cache memory"
            r"|Cannot auto-fit max_model_len",
            "its weights leave no room for a KV cache; raise memory_fraction (now {fraction}), or choose a smaller "
            "quantization",
        ),
        (
            r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \([a-z_]+=(\d+)",
            "the model's own context ends at {1}; set context_length to that, or to auto (now {0})",
        ),
        (
            r"(?i)Free memory on device .* is less than desired GPU memory utilization",
            "others hold too much of the card's memory; lower memory_fraction (now {fraction}), or unload them",
        ),
        (
            r"(?i)out of memory|std::bad_alloc|can't allocate memory|cannot allocate memory|Explicit(?:ly)? set .*exceed"
            r"|kv_cache_memory_bytes.*larger|not enough memory",
            "there is not enough memory; lower context_length (now {model.context_length}), max_sequences (now "
            "{model.max_sequences}) or max_batch_tokens, set kv_cache_dtype: fp8, or choose a smaller quantization",
        ),
        (
            r"Bfloat16 is only supported on GPUs with compute capability",
            "the card is too old for bfloat16; set dtype: float16",
        ),
        (
            r"(?i)minimum capability|compute capability .* is not supported|requires? (?:at least )?compute capability",
            "the card is too old for this quantization; choose another (quantization), such as awq or gptq",
        ),
        (
            r"(?i)no kernel image is available|Failed to find a kernel|no valid .*kernel|Cannot find .* kernel",
            "it has no kernel for this quantization on this hardware; choose another quantization, or another model",
        ),
        (
            r"([\w-]+) quantization is (?:currently )?not supported",
            "it cannot serve {0} on this hardware; choose another quantization, or a model whose files are not quantized",
        ),
        (
            r"Quantization method specified in the model config \((\S+)\) does not match .* \((\S+)\)",
            "the model's files are quantized as {0}, and quantization says {1}; leave quantization out",
        ),
        (
            r"(?:Unknown|Invalid|Unsupported) quantization(?: method)?:? '?([\w-]+)",
            "it does not know the quantization {0}; correct quantization, or choose another model",
        ),
        (
            r"(?i)bitsandbytes.*(?:install|No module)|No module named '?bitsandbytes",
            "bitsandbytes is not in its environment; install it there: PYTHON -m pip install bitsandbytes",
        ),
        (
            r"(?i)No module named '?(?:gguf|vllm_gguf_plugin)|vllm-gguf-plugin",
            "its environment cannot read GGUF files; leave quantization out, and the file is made into a folder once",
        ),
        (
            r"(?:kv_cache_dtype|KV cache dtype|kv cache dtype)\W.*not supported|[Ff]p8 KV cache.*not supported",
            "it has no KV cache of this kind on this hardware; set kv_cache_dtype: auto (now {model.kv_cache_dtype})",
        ),
        (
            r"model type `([^`]*)` but Transformers does not recognize",
            "it does not know models of the type {0!r}; upgrade it: rigserve engines install vllm",
        ),
        (
            r"Model architectures \[?'?([\w', ]+?)'?\]? (?:are not supported|failed)",
            "it does not know models of the kind {0}; upgrade it: rigserve engines install vllm",
        ),
        (
            r"Total number of attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)",
            "the model's {0} heads cannot be shared by {1} cards; set tensor_parallel to a number that divides {0}",
        ),
        (
            r"invalid (?:tool call parser|reasoning parser): (\S+)|Tool parser '?([^' ]+)'? (?:is )?not found|(?:tool|reasoning) parser:? '?(\S+?)'? (?:not found|is not)",
            "it does not know the parser {0}{1}{2}; correct tool_parser or reasoning_parser",
        ),
        (
            r"(?i)lora.* rank (\d+) is greater than max_lora_rank",
            "an adapter's rank is {0}; raise adapter_rank",
        ),
        (
            r"(?i)(?:while loading|expected target modules|unsupported LoRA|lora adapter|LoRAModule).*(?:error|fail|not|expected)",
            "an adapter is none of this model's, or is damaged; correct adapters",
        ),
        (
            r"SafetensorError|Error while deserializing header|incomplete metadata|header too large",
            "the model's files are damaged; fetch them again (source)",
        ),
        (
            r"Invalid repository ID or local directory|Cannot find any model weights|does not appear to have a file named",
            "there is no model in that folder; correct source",
        ),
    )
)


def explain(model: VllmModel, lines: Sequence[str]) -> str:
    """What the last lines of a vLLM that did not start mean, and the mend; empty if that is not known."""
    fraction = model.memory_fraction or "not set"
    for pattern, mend in _FAILURES:
        for line in lines:
            if found := pattern.search(line):
                groups = [group or "" for group in found.groups()]
                return mend.format(*groups, model=model, fraction=fraction)
    return ""
