"""The configuration file as typed models: the documentation, the validation, the schema and the defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    field_validator,
    model_validator,
)

from serving.config.cost import CostConfig, UsdPerMillion
from serving.config.section import Section

# No name in a file may hold it.
_REPLICA = "#"

ModelName = Annotated[
    str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")
]
Quantization = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0",
    "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_NL", "IQ4_XS",
]  # fmt: skip

KvType = Literal["F16", "BF16", "Q8_0", "Q4_0"]

_BASE_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_CELLS_OF_LLAMA_SERVER = 256
# Arguments of llama-server that decide where it listens and to whom, and the key of the config that says so.
_ARGUMENTS_OF_OURS = {
    **dict.fromkeys(("-m", "--model", "-hf", "--hf-repo", "-mu", "--model-url"), "set source"),
    **dict.fromkeys(("-c", "--ctx-size"), "set context_length and max_sequences"),
    **dict.fromkeys(("-np", "--parallel"), "set max_sequences"),
    **dict.fromkeys(("--lora", "--lora-scaled"), "set adapters"),
    **dict.fromkeys(("-a", "--alias"), "set name and aliases"),
    **dict.fromkeys(("-mm", "--mmproj"), "set projector"),
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers"), "set gpu_layers"),
    **dict.fromkeys(("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"), "set kv_type"),
    **dict.fromkeys(("--host", "--port"), "engines listen on loopback; set port, if any"),
    **dict.fromkeys(("--api-key", "--api-key-file"), "it is made anew for each start"),
}
# The same of vLLM.
_VLLM_ARGUMENTS_OF_OURS = {
    **dict.fromkeys(("--model", "--revision", "--tokenizer-revision"), "set source"),
    **dict.fromkeys(("--max-model-len",), "set context_length"),
    **dict.fromkeys(("--max-num-seqs",), "set max_sequences"),
    **dict.fromkeys(("--served-model-name",), "set name and aliases"),
    **dict.fromkeys(
        ("--lora-modules", "--enable-lora", "--max-loras", "--max-lora-rank"), "set adapters"
    ),
    **dict.fromkeys(("--tensor-parallel-size", "-tp"), "set tensor_parallel"),
    **dict.fromkeys(("--pipeline-parallel-size", "-pp"), "set pipeline_parallel"),
    **dict.fromkeys(("--distributed-executor-backend",), "set over_nodes"),
    **dict.fromkeys(("--gpu-memory-utilization",), "set memory_fraction"),
    **dict.fromkeys(("--enable-sleep-mode",), "set sleep"),
    **dict.fromkeys(("--host", "--port", "--uds"), "engines listen on loopback; set port, if any"),
    **dict.fromkeys(("--api-key",), "it is made anew for each start"),
    **dict.fromkeys(("--generation-config",), "set filters.defaults"),
}
# As browsers write it.
_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")


def _is_sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError(
            f"{value!r} is no SHA-256, which has 64 hexadecimal digits; `rigserve models checksum` prints it"
        )
    return value.lower()


Sha256 = Annotated[str, AfterValidator(_is_sha256)]


def _without_ours(words: tuple[str, ...], ours: Mapping[str, str]) -> tuple[str, ...]:
    for word in words:
        flag = word.partition("=")[0]
        # vLLM takes underlines, too.
        known = ours.get(flag) or ours.get(flag.replace("_", "-"))
        if known is not None:
            raise ValueError(f"{flag} is for rigserve to give; {known}")
    return words


class Auto(int):
    """A placeholder for a number that the file leaves open (``auto``), until it has been found for this machine."""


def _or_auto(placeholder: int, least: int) -> tuple[WrapValidator, WithJsonSchema]:
    """What makes a field of numbers take ``auto``, too."""

    def read(value: Any, number: ValidatorFunctionWrapHandler) -> int:
        # What was read before is an Auto already.
        if isinstance(value, Auto):
            return value
        return Auto(placeholder) if value == "auto" else int(number(value))

    number_schema = {"type": "integer", "minimum": least}
    return WrapValidator(read), WithJsonSchema({"anyOf": [number_schema, {"const": "auto"}]})


class ServerConfig(Section):
    """Where the gateway listens, and what it puts up with."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 picks a free one.")
    allow_remote: bool = Field(
        False,
        description="Listen on other addresses than loopback although there are no API keys (`rigserve keys create`): anyone who reaches the port may use the models.",
    )
    require_keys: bool = Field(
        False,
        description="Ask for an API key even while there is none. Once the first has been made, all requests need one anyway.",
    )
    metrics_access: Literal["loopback", "open", "key"] = Field(
        "loopback",
        description="Who may read /metrics without an API key where one is needed: this machine, everybody, or nobody.",
    )
    max_body_bytes: int = Field(
        10 * 1024 * 1024, ge=1024, description="Larger request bodies get 413."
    )
    body_timeout_seconds: float = Field(
        60.0, gt=0, description="A request's body must be there within this time; otherwise 408."
    )
    header_timeout_seconds: float = Field(
        10.0, gt=0, description="So must its head, and the first of a connection; otherwise 408."
    )
    idle_timeout_seconds: float = Field(
        5.0, gt=0, description="A connection without a request is closed after this time."
    )
    write_timeout_seconds: float = Field(
        60.0,
        gt=0,
        description="A client that takes nothing of its answer for this long is cut off.",
    )
    max_header_bytes: int = Field(
        32 * 1024, ge=1024, description="Larger request heads, path included, get 431."
    )
    max_headers: int = Field(100, ge=8, description="Requests with more headers get 431.")
    max_connections: int = Field(
        4096, ge=1, description="Open connections in all; who opens one more gets 503."
    )
    max_connections_per_address: int = Field(
        256,
        ge=1,
        description="Open connections, and so streams, of one client address (of IPv6 a /64 network); who opens one more gets 429. This machine's own are not counted.",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        strict=False,
        description='Sites whose pages may use this server from a browser, as https://HOST[:PORT]; "*" is all. Unset: none.',
    )
    tls_certificate: str | None = Field(
        None,
        description="A PEM file with the certificate and those between it and the root: serve HTTPS. Read again when it changes.",
    )
    tls_key: str | None = Field(None, description="A PEM file with the certificate's private key.")
    lenient: bool = Field(
        False,
        description="Drop request fields that are unknown or not supported, and list them in the header x-rigserve-ignored, instead of refusing the request.",
    )
    drain_timeout_seconds: float = Field(
        30.0, ge=0, description="How long streams in flight may go on after SIGTERM."
    )
    watch_config: bool = Field(
        True,
        description="Reload this file when it changes, as SIGHUP does; its content counts, not its date.",
    )

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin, such as https://chat.example.org; no path, no slash at the end"
                )
        return value

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> ServerConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; set both")
        return self


class AdapterConfig(Section):
    """A LoRA adapter: small weights that change a model, served beside it under a name of its own."""

    name: ModelName = Field(description="The name clients ask for.")
    path: str = Field(
        description="A folder, as PEFT saves it, or a GGUF file, as llama.cpp's convert_lora_to_gguf.py makes it."
    )
    scale: float = Field(1.0, description="How strongly it counts; 1 is as trained, 0 not at all.")
    sha256: Sha256 | None = Field(
        None, description="What the file or folder must have; otherwise it is not served."
    )


class FiltersConfig(Section):
    """What is changed about requests to a model before its engine gets them.

    Parameters are named as in OpenAI's API. One that an endpoint does not have is left out there.
    """

    defaults: dict[str, Any] = Field(
        {}, description="Parameters, and their values for requests that leave them out."
    )
    forced: dict[str, Any] = Field(
        {}, description="Parameters, and their values whatever the request says."
    )
    stripped: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Parameters that are taken out of requests, before these are checked.",
    )
    system_prompt: str | None = Field(
        None,
        min_length=1,
        description="Text to put before every conversation's own system message.",
    )
    max_tokens_default: int | None = Field(
        None, ge=1, description="Most tokens of a completion whose request does not say."
    )
    max_tokens_ceiling: int | None = Field(
        None, ge=1, description="Most tokens of any completion, whatever the request says."
    )

    @model_validator(mode="after")
    def _settings_go_together(self) -> FiltersConfig:
        for name in sorted(self.forced.keys() & self.defaults.keys()):
            raise ValueError(f"{name} is among both the defaults and the forced; keep one of them")
        default, ceiling = self.max_tokens_default, self.max_tokens_ceiling
        if default is not None and ceiling is not None and default > ceiling:
            raise ValueError(
                f"max_tokens_default ({default}) is above max_tokens_ceiling ({ceiling})"
            )
        return self


def served_name_of(name: str) -> str:
    """What clients call the model that has this name, or a replica of which has it."""
    return name.partition(_REPLICA)[0]


class EngineModel(Section):
    """What all models have that an engine of this machine's serves, whichever it is."""

    name: ModelName = Field(description="The name clients ask for.")
    aliases: tuple[ModelName, ...] = Field(
        (), strict=False, description="Other names that reach this model."
    )
    adapters: tuple[AdapterConfig, ...] = Field(
        (),
        strict=False,
        description="LoRA adapters of this model, each a model of its own to clients.",
    )
    filters: FiltersConfig = FiltersConfig()
    lenient: bool | None = Field(
        None, description="As server.lenient, for this model. Unset: as it says there."
    )
    max_sequences: int = Field(
        16, ge=1, le=256, description="Slots: requests that decode together in one batch."
    )
    max_queue: int = Field(
        256,
        ge=0,
        description="Requests of a class that may wait in the gateway for a slot; one more gets 503.",
    )
    queue_timeout_seconds: float = Field(
        300.0,
        gt=0,
        description="How long a request may wait for its start, also for the model to be loaded; then it gets 503. Requests ask for less with the header x-rigserve-deadline-seconds.",
    )
    step_timeout_seconds: float = Field(
        120.0,
        gt=0,
        description="An engine is stuck, and restarted, when a step takes longer, or when it answers nothing for so long.",
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="Loopback port of the engine. Unset: a free one."
    )
    start_timeout_seconds: float = Field(
        120.0,
        gt=0,
        description="How long an engine may take to be ready. Longer is an error at the first start; later it is tried again.",
    )

    load: Literal["preload", "on_demand"] = Field(
        "preload",
        description="When its engine starts: with the server, or when the first request for it comes.",
    )
    pinned: bool = Field(
        False, description="Once loaded it stays: it never makes room for others, and has no TTL."
    )
    ttl_seconds: float | None = Field(
        None,
        gt=0,
        description="Unload it when it had no request for this long. Unset: only when others need its room.",
    )
    group: str | None = Field(
        None,
        min_length=1,
        description="Models of one group are never loaded together: one makes way for the other.",
    )
    swap_priority: int = Field(
        0, description="Where room is short, idle models with less of it make way first."
    )
    devices: tuple[str, ...] = Field(
        (),
        strict=False,
        description="GPUs it may use, as indexes in NVML's order or UUIDs (in quotes), or cpu. Unset: where it fits best.",
    )
    memory_mib: int | None = Field(
        None,
        ge=1,
        description="Memory its engine needs where its weights are. Unset: estimated from the file, then measured.",
    )
    replicas: int = Field(
        1, ge=1, le=64, description="Engines that serve it, each with a place of its own."
    )
    max_replicas: int | None = Field(
        None,
        ge=1,
        le=64,
        description="So many at most while there is much to do, as scaling says. Unset: no more than replicas.",
    )

    @model_validator(mode="after")
    def _replicas_can_be(self) -> EngineModel:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas})"
            )
        if self.most_replicas > 1:
            if self.load != "preload":
                raise ValueError("a model with replicas is loaded with the server; leave load out")
            if self.port is not None:
                raise ValueError("replicas cannot share a port; leave it out")
            if self.group is not None:
                raise ValueError(
                    "replicas are loaded together, models of a group never; keep one of them"
                )
        return self

    @property
    def most_replicas(self) -> int:
        """How many engines it may have at a time."""
        return self.max_replicas or self.replicas

    @property
    def served_name(self) -> str:
        """What clients, the ledger and its engine call it; replicas of a model have it in common."""
        return served_name_of(self.name)

    @property
    def is_replica(self) -> bool:
        """Whether it is one of several that :func:`serving.config.with_replicas` made of a model."""
        return _REPLICA in self.name

    def replica(self, number: int) -> Self:
        """The model as one of its replicas, the first of which is number 1; loaded at the start if it is always there."""
        is_spare = number > self.replicas
        update = {
            "name": f"{self.name}{_REPLICA}{number}",
            "load": "on_demand" if is_spare else "preload",
        }
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _stays_or_goes(self) -> EngineModel:
        if self.pinned and self.ttl_seconds is not None:
            raise ValueError("a pinned model has no ttl_seconds; keep one of them")
        return self

    @field_validator("devices")
    @classmethod
    def _devices_are_of_one_kind(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for device in value:
            if device != "cpu" and not device.isdecimal() and not device.startswith("GPU-"):
                raise ValueError(f"{device!r} is no GPU's index, no UUID (GPU-...), and not cpu")
        if "cpu" in value and len(value) > 1:
            raise ValueError("cpu and GPUs do not go together; gpu_layers splits a model")
        return value

    @property
    def is_for_cpu(self) -> bool:
        """Whether it is to have no GPU, even where there is one."""
        return self.devices == ("cpu",)


class GgufModel(EngineModel):
    """What models have in common that llama.cpp computes, in whichever process."""

    source: str = Field(
        description="package://PACKAGE/FILE.gguf, hf://ORG/REPO/FILE.gguf, or a path to a GGUF file."
    )
    sha256: Sha256 | None = Field(
        None,
        description="What the source's file must have, before quantization; otherwise it is not served.",
    )
    quantization: Quantization | None = Field(
        None,
        description="Serve a copy requantized to this type, made once and cached. Unset: as is.",
    )
    projector: str | None = Field(
        None,
        description="The model's projector file (mmproj), with which it sees images; the forms of 'source'.",
    )
    projector_sha256: Sha256 | None = Field(None, description="What the projector's must have.")
    max_batch_tokens: int = Field(
        512,
        ge=32,
        description="Prompt tokens prefilled per step; more is faster, less is smoother.",
    )
    prefix_cache_mib: int = Field(
        1024,
        ge=0,
        description="Main memory for prompts whose slot was given to others, so that a chat that comes back is not computed again.",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads for compute. Unset: the machine's physical cores."
    )
    kv_type: KvType = Field(
        "F16",
        description="How keys and values are kept: Q8_0 takes half the memory of F16, Q4_0 a quarter, for some loss.",
    )
    flash_attention: bool = Field(
        True,
        description="Compute attention in one kernel, where llama.cpp has it for the device; false: in several, which takes more memory.",
    )
    context_length: Annotated[int, *_or_auto(2048, 64)] = Field(
        4096,
        ge=64,
        description="Prompt and completion tokens one request may use together; auto: as many as the model has, or as there is memory for.",
    )
    max_sequences: Annotated[int, *_or_auto(1, 1)] = Field(
        16,
        ge=1,
        le=256,
        description="Slots: requests that decode together in one batch; auto: 16, or as many as there is memory for.",
    )
    gpu_layers: Annotated[int, *_or_auto(-1, -1)] = Field(
        -1,
        ge=-1,
        description="Layers on the GPU; -1 is all of them, auto as many as fit. Ignored by a CPU build.",
    )

    @model_validator(mode="after")
    def _kernel_for_its_cache(self) -> GgufModel:
        if self.kv_type in ("Q8_0", "Q4_0") and not self.flash_attention:
            raise ValueError(
                f"kv_type {self.kv_type} needs flash_attention: true; llama.cpp has no other kernel for it"
            )
        return self

    @model_validator(mode="after")
    def _checksum_of_something(self) -> GgufModel:
        if self.projector_sha256 is not None and self.projector is None:
            raise ValueError("projector_sha256 is set, and there is no projector; set both")
        return self

    @property
    def is_for_cpu(self) -> bool:
        """Whether it is to have no GPU, even where there is one."""
        return self.gpu_layers == 0 or super().is_for_cpu

    @property
    def kv_cells(self) -> int:
        """Tokens whose keys and values there is room for."""
        return self.context_length * self.max_sequences


class LlamaCppModel(GgufModel):
    """A GGUF model served by rigserve's own llama.cpp engine."""

    engine: Literal["llama_cpp"] = "llama_cpp"
    kv_tokens: int | None = Field(
        None,
        ge=256,
        description="KV cells that all slots share. Unset: context_length for each slot, which is faster but takes more memory.",
    )
    speculation: Literal["none", "prompt_lookup", "draft_model"] = Field(
        "none",
        description="Guess tokens ahead and check them in one step, without changing the output: from what the text repeats (prompt_lookup), or with a smaller model.",
    )
    draft_model: str | None = Field(
        None,
        description="The smaller model for speculation: draft_model, with the same vocabulary; the forms of 'source'.",
    )
    draft_model_sha256: Sha256 | None = Field(None, description="What the draft model's must have.")

    @model_validator(mode="after")
    def _settings_go_together(self) -> LlamaCppModel:
        is_open = isinstance(self.context_length, Auto)
        if self.kv_tokens is not None and self.kv_tokens < self.context_length and not is_open:
            raise ValueError(
                f"kv_tokens ({self.kv_tokens}) must hold one context at least: context_length is {self.context_length}"
            )
        if (self.draft_model is None) == (self.speculation == "draft_model"):
            raise ValueError(
                "speculation: draft_model and a draft_model to use go together; set both"
            )
        if self.draft_model_sha256 is not None and self.draft_model is None:
            raise ValueError("draft_model_sha256 is set, and there is no draft_model; set both")
        return self

    @property
    def kv_cells(self) -> int:
        """Tokens whose keys and values there is room for."""
        return self.kv_tokens or super().kv_cells


class LlamaServerModel(GgufModel):
    """A GGUF model served by llama.cpp's own server, a program that is not part of rigserve."""

    engine: Literal["llama_server"]
    binary: str | None = Field(
        None, description="The program's file. Unset: the llama-server that is found on PATH."
    )
    extra_args: tuple[str, ...] = Field(
        (),
        strict=False,
        description="More of its arguments, one word each: [--flash-attn, 'on']. They come last, and so count where they repeat one that rigserve gives.",
    )

    @field_validator("context_length")
    @classmethod
    def _no_slot_is_larger(cls, value: int) -> int:
        if value % _CELLS_OF_LLAMA_SERVER:
            raise ValueError(
                f"context_length ({value}) must be a multiple of {_CELLS_OF_LLAMA_SERVER}: "
                "llama-server rounds it up"
            )
        return value

    @field_validator("extra_args")
    @classmethod
    def _not_what_rigserve_sees_to(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _without_ours(value, _ARGUMENTS_OF_OURS)


class VllmSpeculation(Section):
    """Guesses tokens ahead and checks them in one step, without changing the output."""

    method: Literal["ngram", "draft_model", "eagle", "eagle3", "medusa", "mtp"] = Field(
        description="ngram: what the text repeats. draft_model: a smaller model. The others: heads that were trained for this very model."
    )
    model: str | None = Field(
        None,
        description="The draft model's or the heads' folder or hf://ORG/REPO; ngram and mtp have none.",
    )
    tokens: int = Field(3, ge=1, le=32, description="How many tokens are guessed at a time.")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> VllmSpeculation:
        if (self.method in ("ngram", "mtp")) != (self.model is None):
            raise ValueError(
                f"method {self.method!r} {'has no' if self.model else 'needs a'} model"
            )
        return self


class VllmModel(EngineModel):
    """A model in Hugging Face's format served by vLLM, from an environment of its own."""

    engine: Literal["vllm"]
    source: str = Field(
        description="A Hugging Face folder, or hf://ORG/REPO[@REVISION]; a GGUF file (package://PACKAGE/FILE.gguf, hf://ORG/REPO/FILE.gguf, or a path) is made into such a folder once."
    )
    sha256: Sha256 | None = Field(
        None,
        description="What the source's folder or file must have; otherwise it is not served.",
    )
    environment: str | None = Field(
        None,
        description="The Python of an environment that has vLLM. Unset: the one that `rigserve engines install vllm` has made.",
    )
    image: str | None = Field(
        None,
        min_length=1,
        description="A container image that has vLLM, such as vllm/vllm-openai:v0.32.0, instead of an environment.",
    )
    container_runtime: Literal["docker", "podman"] = Field(
        "docker", description="The program that runs the image."
    )
    context_length: int | Literal["auto"] = Field(
        4096,
        description="Prompt and completion tokens one request may use together, 64 at least; auto: as many as the model has, or as there is memory for.",
    )
    quantization: (
        Literal["awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors", "gguf"] | None
    ) = Field(
        None,
        description="How its weights are quantized, or (fp8, bitsandbytes) are to be while they are loaded. gguf: serve the GGUF file itself. Unset: as its files say.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="What it computes in."
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"] = Field(
        "auto", description="How its KV cache is kept: fp8 takes half the memory."
    )
    memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of each card's memory (without a card: of main memory) to take, weights and KV cache together. Unset: KV cache for max_sequences of context_length, or, with context_length auto, 0.9 (0.5).",
    )
    max_batch_tokens: int | None = Field(
        None, ge=32, description="Tokens computed per step. Unset: as vLLM likes it."
    )
    tensor_parallel: int = Field(1, ge=1, description="Cards that share each layer.")
    pipeline_parallel: int = Field(1, ge=1, description="Groups of cards that share the layers.")
    over_nodes: bool = Field(
        False,
        description="Its cards are on several nodes of a cluster: vLLM has Ray place its workers. For `rigserve cluster`.",
    )
    prefix_caching: bool = Field(
        True,
        description="Keep prompts' KV cache, so that what begins alike is computed once; of models that can have it.",
    )
    chunked_prefill: bool | None = Field(
        None,
        description="Compute long prompts in pieces, between others' tokens. Unset: as vLLM likes it.",
    )
    speculation: VllmSpeculation | None = None
    sleep: bool = Field(
        False,
        description="Where it makes room for others, its process stays, and its weights wait in main memory, from where they are back in seconds. Only on cards.",
    )
    adapter_slots: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Adapters that one batch may mix; each takes memory. Set, there is room for some that are added while it runs, though there are none yet. Unset: 8 where there are adapters, else none.",
    )
    adapter_rank: int = Field(
        16,
        ge=1,
        description="The highest rank of adapters that are added while it runs; that of `adapters` is known.",
    )
    chat_template: str | None = Field(
        None, description="A file with another chat template (Jinja) than the model's own."
    )
    tool_parser: str | None = Field(
        "auto",
        min_length=1,
        description="How its tool calls are read: vLLM's name for it. auto: by the model's family; null: not at all.",
    )
    reasoning_parser: str | None = Field(
        "auto",
        min_length=1,
        description="How its reasoning is told from its answer; as tool_parser.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads where it has no card. Unset: the machine's physical cores.",
    )
    start_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="How long an engine may take to be ready. Longer is an error at the first start; later it is tried again.",
    )
    extra_args: tuple[str, ...] = Field(
        (),
        strict=False,
        description="More of its arguments, one word each: [--enforce-eager]. They come last, and so count where they repeat one that rigserve gives.",
    )

    @field_validator("context_length")
    @classmethod
    def _is_a_length(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 64:
            raise ValueError(f"expected at least 64, or auto; got {value}")
        return value

    @field_validator("extra_args")
    @classmethod
    def _not_what_rigserve_sees_to(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _without_ours(value, _VLLM_ARGUMENTS_OF_OURS)

    @model_validator(mode="after")
    def _settings_go_together(self) -> VllmModel:
        if self.environment is not None and self.image is not None:
            raise ValueError("vLLM is in an environment or in an image; keep one of them")
        if self.adapters and self.adapter_slots == 0:
            raise ValueError("there are adapters, and adapter_slots is 0; leave that out")
        if self.sleep and self.is_for_cpu:
            raise ValueError("sleep is for cards; devices says cpu")
        if self.sleep and self.image is not None:
            raise ValueError(
                "sleep is for an environment: memory of an image's processes cannot be measured"
            )
        cards = self.tensor_parallel * self.pipeline_parallel
        if self.is_for_cpu and cards > 1:
            raise ValueError(
                "tensor_parallel and pipeline_parallel are for cards; devices says cpu"
            )
        if self.devices and not self.is_for_cpu and len(self.devices) != cards:
            raise ValueError(
                f"devices names {len(self.devices)} cards; tensor_parallel times pipeline_parallel is {cards}"
            )
        return self

    @property
    def cards(self) -> int:
        """How many cards it computes on, where it has any."""
        return self.tensor_parallel * self.pipeline_parallel


ModelConfig = LlamaCppModel | LlamaServerModel | VllmModel
"""A model with an engine of this machine's."""


class RemoteModel(Section):
    """A model that another server has, behind an OpenAI-compatible API: no process of this machine's."""

    name: ModelName = Field(description="The name clients ask for.")
    engine: Literal["remote"]
    base_url: str = Field(
        description="As OpenAI's SDKs take it, mostly with /v1 at its end: https://api.openai.com/v1."
    )
    model: str | None = Field(
        None, min_length=1, description="The model's name there. Unset: the same as here."
    )
    dialect: Literal["openai", "rigserve"] = Field(
        "openai",
        description="Which fields of requests are understood there: OpenAI's, or all that rigserve has. Others are refused.",
    )
    api_key_env: str | None = Field(
        None, min_length=1, description="The environment variable that holds the API key for it."
    )
    api_key_file: str | None = Field(
        None, min_length=1, description="A file that holds the API key, and nothing else."
    )
    price_of: str | None = Field(
        None, description="What it costs: the price of PROVIDER/MODEL in genai-prices."
    )
    usd_per_million: UsdPerMillion | None = Field(
        None, description="Or the price itself. Neither of them: it costs nothing."
    )
    budget_usd: float | None = Field(
        None, gt=0, description="What it may cost in a budget_period; then requests are refused."
    )
    budget_period: Literal["day", "month"] = Field(
        "month", description="A calendar day or month, in UTC."
    )
    connect_timeout_seconds: float = Field(
        5.0, gt=0, description="How long a connection to it may take."
    )
    first_byte_timeout_seconds: float = Field(
        120.0,
        gt=0,
        description="How long it may take until its answer begins; one that is not streamed is there as a whole then.",
    )
    idle_timeout_seconds: float = Field(
        60.0, gt=0, description="How long a stream may pause; then it counts as cut off."
    )
    aliases: tuple[ModelName, ...] = Field(
        (), strict=False, description="Other names that reach this model."
    )
    filters: FiltersConfig = FiltersConfig()
    lenient: bool | None = Field(
        None, description="As server.lenient, for this model. Unset: as it says there."
    )
    context_length: int = Field(
        131_072,
        ge=64,
        description="Most tokens of a prompt and its completion there; what a request may cost follows from it.",
    )
    max_sequences: int = Field(
        64, ge=1, description="Requests it works on at a time; it is sent a quarter more."
    )
    max_queue: int = Field(
        256, ge=0, description="Requests of a class that may wait here for it; one more gets 503."
    )
    queue_timeout_seconds: float = Field(
        300.0, gt=0, description="How long a request may wait here until it is sent; then 503."
    )

    @field_validator("base_url")
    @classmethod
    def _is_a_base_url(cls, value: str) -> str:
        if not _BASE_URL.fullmatch(value):
            raise ValueError(
                f"{value!r} is no base URL, such as https://api.openai.com/v1; no user, query or fragment"
            )
        return value.rstrip("/")

    @model_validator(mode="after")
    def _settings_go_together(self) -> RemoteModel:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("the API key is in api_key_env or api_key_file; keep one of them")
        if self.price_of is not None and self.usd_per_million is not None:
            raise ValueError("the price is price_of or usd_per_million; keep one of them")
        if self.costs_money != (self.budget_usd is not None):
            raise ValueError(
                "a price (price_of or usd_per_million) and budget_usd go together: what costs money has a budget"
            )
        return self

    @property
    def served_name(self) -> str:
        """What clients and the ledger call it."""
        return self.name

    @property
    def costs_money(self) -> bool:
        """Whether its answers have a price."""
        return self.price_of is not None or self.usd_per_million is not None

    @property
    def has_key(self) -> bool:
        """Whether it asks for an API key."""
        return self.api_key_env is not None or self.api_key_file is not None

    @property
    def adapters(self) -> tuple[AdapterConfig, ...]:
        """None: what adapters it has, and their names, are that server's matter."""
        return ()


KINDS_OF_MODELS: Mapping[str, type[LlamaCppModel | LlamaServerModel | VllmModel | RemoteModel]] = {
    "llama_cpp": LlamaCppModel,
    "llama_server": LlamaServerModel,
    "vllm": VllmModel,
    "remote": RemoteModel,
}
"""By the ``engine`` that a model names."""


def kind_of_model(model: Any) -> str:
    """The ``engine`` of a model as it stands in a file, or as it was read; llama_cpp for one that names none."""
    engine = model.get("engine") if isinstance(model, dict) else getattr(model, "engine", None)
    return engine if isinstance(engine, str) and engine in KINDS_OF_MODELS else "llama_cpp"


# Pydantic puts the tag into an error's place in the file; in angle brackets it is told from keys.
AnyModel = Annotated[
    Annotated[LlamaCppModel, Tag("<llama_cpp>")]
    | Annotated[LlamaServerModel, Tag("<llama_server>")]
    | Annotated[VllmModel, Tag("<vllm>")]
    | Annotated[RemoteModel, Tag("<remote>")],
    Discriminator(lambda value: f"<{kind_of_model(value)}>"),
]


class TargetConfig(Section):
    """One of the models that serve a route."""

    model: ModelName = Field(description="A model's name, alias or adapter.")
    weight: float | None = Field(
        None,
        gt=0,
        description="Its share of the requests, beside the others' weights. Unset: balanced.",
    )


class RouteConfig(Section):
    """A name that clients ask for, served by several models."""

    name: ModelName = Field(description="The name clients ask for.")
    targets: tuple[TargetConfig, ...] = Field(
        min_length=1,
        strict=False,
        description="Models that share its requests: by weight, or, without weights, each request goes where the fewest tokens are under way, and conversations stay where their beginning is.",
    )
    fallback: tuple[ModelName, ...] = Field(
        (),
        strict=False,
        description="Models to try in turn when no target takes a request: it is down, its queue is full, or it has failed before an answer began.",
    )
    spill_over: tuple[ModelName, ...] = Field(
        (),
        strict=False,
        description="Commercial models (engine: remote, with a key, a price and a budget) to try after that. Prompts leave this machine.",
    )
    max_wait_seconds: float | None = Field(
        None,
        ge=0,
        description="How long a request may wait for its start at each model while there are others to try. Unset: as the model's queue_timeout_seconds says.",
    )

    @model_validator(mode="after")
    def _all_or_none_have_weights(self) -> RouteConfig:
        if len({target.weight is None for target in self.targets}) > 1:
            raise ValueError("some targets have a weight and some have none; give all of them one")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """All models that it leads to, in the order in which they are written."""
        return (*(target.model for target in self.targets), *self.fallback, *self.spill_over)


class StorageConfig(Section):
    """Folders rigserve writes to. Environment variables and ~ are expanded."""

    cache_dir: str = Field(
        "~/.cache/rigserve", description="Prepared (requantized) models; safe to delete."
    )
    data_dir: str = Field(
        "~/.local/share/rigserve",
        description="The usage ledger, stored responses, files and batches.",
    )


class LoggingConfig(Section):
    """What the server writes to its output, and of requests to files."""

    format: Literal["human", "json"] = Field(
        "human", description="Lines of text, or a JSON object a line."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="What is less than this is left out. Requests, a line each, and engines' output are info.",
    )
    prompts: bool = Field(
        False,
        description="Write every request that goes to a model, prompts included, to logs/prompts.jsonl in data_dir. Only the server's user can read it; it is rotated, and the oldest requests go.",
    )


class TracingConfig(Section):
    """OpenTelemetry traces, sent by OTLP over HTTP. What is unset is as the OTEL_* environment variables say."""

    enabled: bool = Field(
        False,
        description="Send a trace of each request to a model. Needs the extra: pip install 'rigserve[otel]'.",
    )
    endpoint: str | None = Field(
        None,
        description="The collector's base URL, to which /v1/traces is added. Unset: $OTEL_EXPORTER_OTLP_ENDPOINT, or else http://localhost:4318.",
    )
    sample_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of requests to trace, of those whose client has not decided that by its traceparent. Unset: $OTEL_TRACES_SAMPLER, or else all.",
    )
    prompts: bool = Field(
        False, description="Put conversations into the spans, as gen_ai.input.messages."
    )

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_a_url(cls, value: str | None) -> str | None:
        if value is not None and not _BASE_URL.fullmatch(value):
            raise ValueError(
                f"{value!r} is no base URL, such as http://collector.example.org:4318; no user, query or fragment"
            )
        return value


class MemoryConfig(Section):
    """How much memory engines may have together. Who does not fit beside the others waits until some leave."""

    budget_mib: int | None = Field(
        None,
        ge=1,
        description="Main memory for engines. Unset: what other programs leave of the machine's, less the reserve.",
    )
    reserve_mib: int = Field(
        512,
        ge=0,
        description="Main memory to leave free where budget_mib is not set. Half of it (64 MiB at least) is for requests' bodies; larger ones beyond it wait.",
    )
    gpu_reserve_mib: int = Field(512, ge=0, description="Memory to leave free on each GPU.")
    max_wait_seconds: float = Field(
        30.0,
        gt=0,
        description="When a request has waited this long for a model that has no room, those who have it take no more requests until they have made way.",
    )


class ScalingConfig(Section):
    """When a model with ``max_replicas`` gets another replica, and when one goes."""

    waiting_requests: int = Field(
        4,
        ge=1,
        description="One more when so many requests wait for each replica that takes requests,",
    )
    outstanding_tokens: int = Field(
        16_384, ge=1, description="or are so many tokens still to be computed by each."
    )
    up_after_seconds: float = Field(5.0, ge=0, description="That must have lasted so long.")
    down_after_seconds: float = Field(
        300.0,
        ge=0,
        description="One goes when those that remain would have had half of that at most for so long, with nobody waiting.",
    )


class ClusterConfig(Section):
    """For `rigserve cluster`: the Ray cluster that engines run on."""

    address: str = Field(
        "auto",
        min_length=1,
        description="Its head, as HOST:PORT; auto: the one that this machine is in.",
    )
    update: Literal["beside", "in_place"] = Field(
        "beside",
        description="How a changed model's replicas are renewed, one by one: the new one is ready before the old one goes, or, where there is no room for both, after. In place takes two replicas at least.",
    )


class Config(Section):
    """The whole file."""

    server: ServerConfig = ServerConfig()
    models: tuple[AnyModel, ...] = Field(
        min_length=1, strict=False, description="The models to serve."
    )
    routes: tuple[RouteConfig, ...] = Field(
        (), strict=False, description="Names that are served by several models."
    )
    storage: StorageConfig = StorageConfig()
    logging: LoggingConfig = LoggingConfig()
    tracing: TracingConfig = TracingConfig()
    memory: MemoryConfig = MemoryConfig()
    scaling: ScalingConfig = ScalingConfig()
    cluster: ClusterConfig = ClusterConfig()
    cost: CostConfig = CostConfig()

    @property
    def local_models(self) -> tuple[ModelConfig, ...]:
        """The models with engines on this machine."""
        return tuple(model for model in self.models if not isinstance(model, RemoteModel))

    @property
    def remote_models(self) -> tuple[RemoteModel, ...]:
        """The models that other servers have."""
        return tuple(model for model in self.models if isinstance(model, RemoteModel))
