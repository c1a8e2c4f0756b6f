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
            r"(?i)address already in use",
            "another program has its port; set another, or leave port out for a free one",
        ),
        (
            r"max seq len \((\d+)\).*estimated maximum model length is (\d+)",
            "there is no room for the KV cache of context_length {0}; {1} would fit: set context_length to {1}, or to auto, "
            "or raise memory_fraction (now {fraction})",
        ),
        (
            r"No available memory for the cache blocks|larger than the available KV cache memory"
            r"|Cannot auto-fit max_model_len",
            "its weights leave no room for a KV cache; raise memory_fraction (now {fraction}), or choose a smaller "
            "quantization",
        ),
        (
            r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \([a-z_]+=(\d+)",
            "the model's own context ends at {1}; set context_length (now {0}) to that, or to auto",
        ),
        (
            r"Free memory on device .* is less than desired GPU memory utilization",
            "others hold too much of the card's memory; lower memory_fraction (now {fraction}), or unload them",
        ),
        (
            r"(?i)out of memory|std::bad_alloc|cannot allocate memory|is less than requested memory for kv",
            "there is not enough memory; lower context_length (now {model.context_length}) or max_sequences (now "
            "{model.max_sequences}), set kv_cache_dtype: fp8, or choose a smaller quantization",
        ),
        (
            r"Bfloat16 is only supported on GPUs with compute capability",
            "the card is too old for bfloat16; set dtype: float16",
        ),
        (
            r"quantization method (\S+) is not supported for the current GPU. Minimum capability: (\d+)",
            "the card is too old for {0}, which needs compute capability {1}; choose another quantization, such as awq "
            "or gptq",
        ),
        (
            r"torch\.(\w+) is not supported for quantization method (\S+)\. Supported dtypes: \[torch\.(\w+)",
            "models quantized as {1} cannot be computed in {0}; set dtype: {2}",
        ),
        (
            r"no kernel image is available for execution|Failed to find a kernel that can implement"
            r"|_C::\w+\(\) expected at most 0 argument|Could not run '_C",
            "it has no kernel for this on this hardware; choose another quantization (quantization, kv_cache_dtype), or a "
            "model whose files are not quantized",
        ),
        (
            r"(\S+) quantization is currently not supported in",
            "it cannot serve {0} on this hardware; choose another quantization, or a model whose files are not quantized",
        ),
        (
            r"Quantization method specified in the model config \((\S+)\) does not match .*\((\S+)\)",
            "the model's files are quantized as {0}, and quantization says {1}; leave quantization out",
        ),
        (
            r"Unknown quantization method: ([\w-]+)",
            "this vLLM does not know the quantization {0}; choose another, leave it out, or install a plug-in of vLLM's for "
            "it into its environment",
        ),
        (
            r"\.gguf' is not a valid JSON file|No module named '?(?:gguf|vllm_gguf_plugin)",
            "this vLLM cannot read GGUF files; leave quantization out, and a folder is made of the file once, or install "
            "vllm-gguf-plugin into its environment",
        ),
        (
            r"model type `([^`]*)` but Transformers does not recognize",
            "it does not know models of the type {0!r}; upgrade it: rigserve engines install vllm",
        ),
        (
            r"Model architectures \['([^']+)'\] (?:are not supported|failed to be inspected)",
            "it does not know models of the kind {0}; upgrade it: rigserve engines install vllm",
        ),
        (
            r"Total number of attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)",
            "the model's {0} heads cannot be shared by {1} cards; set tensor_parallel to a number that divides {0}",
        ),
        (
            r"(?:Tool|Reasoning) parser '([^']+)' not found|invalid (?:tool call|reasoning) parser: (\S+)",
            "it does not know the parser {0}; correct tool_parser or reasoning_parser",
        ),
        (
            r"LoRA rank (\d+) is greater than max_lora_rank",
            "an adapter's rank is {0}; raise adapter_rank",
        ),
        (
            r"(?i)call to add_lora method failed|expected target modules in|while loading lora|unsupported LoRA weight",
            "an adapter is none of this model's, or is damaged; correct adapters",
        ),
        (
            r"Sleep mode is not supported on current platform|cumem allocator is not supported",
            "it cannot sleep on this hardware; leave sleep out",
        ),
        (
            r"SafetensorError|Error while deserializing header",
            "the model's files are damaged; fetch them again (source)",
        ),
        (
            r"Invalid repository ID or local directory|Cannot find any model weights",
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
                groups = [group for group in found.groups() if group is not None]
                return mend.format(*groups, model=model, fraction=fraction)
    return ""
