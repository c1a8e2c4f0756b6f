"""What is found in a machine: NVIDIA's cards through a library of NVML's shape, AMD's, processor, PCI bus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.hardware.bandwidth import read_gb_per_second
from serving.hardware.cpu import cpu, physical_cores
from serving.hardware.memory import host_available_mib
from serving.hardware.pci import PciCard, pci_cards
from tests.nvml import nvml_environment

ASK_NVML = """
import dataclasses, json
from serving.hardware.nvidia import NoNvidiaDriver, nvidia_driver
try:
    print(json.dumps(dataclasses.asdict(nvidia_driver())))
except NoNvidiaDriver as error:
    print(json.dumps([str(error), error.is_missing, error.needs_reboot, error.is_forbidden]))
"""

# The kernel's words for an AMD EPYC of 2024, and for a Raspberry Pi 5.
X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD Ryzen 9 9950X 16-Core Processor
flags\t\t: fpu sse2 avx f16c fma avx2 avx512f avx512bw avx512vl avx512_vnni avx_vnni

processor\t: 1
model name\t: another
"""
ARM = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes asimdhp cpuid asimdrdm lrcpc dcpop asimddp

"""


def asked(environment: dict[str, str], script: str = ASK_NVML) -> object:
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(result.stdout)


def test_nvidias_cards_are_described_through_the_real_binding(nvml_library: Path) -> None:
    driver = asked(nvml_environment(nvml_library))
    assert driver == {
        "version": "570.133.07",
        "cuda_version": "12.8",
        "cards": [
            {
                "gpu": {
                    "index": 0,
                    "uuid": "GPU-3f2a9c41-77de-4f0b-8a35-c1e2d4b69f70",
                    "name": "NVIDIA GeForce RTX 3090",
                    "total_mib": 24576,
                    "free_mib": 24576 - 2311,
                },
                "compute_capability": "8.6",
                "pcie": {"generation": 1, "width": 16, "max_generation": 4, "max_width": 16},
                "power_limit_watts": 280.0,
                "default_power_limit_watts": 350.0,
                "has_energy_counter": True,
                "is_persistent": True,
                "processes": [{"pid": 4242, "mib": 1844}, {"pid": 4243, "mib": None}],
            },
            {
                "gpu": {
                    "index": 1,
                    "uuid": "GPU-6b1c2f0e-1f83-52a4-9d2e-7c5f0a3b8e14",
                    "name": "NVIDIA GeForce GTX 1070",
                    "total_mib": 8192,
                    "free_mib": 8192 - 100,
                },
                "compute_capability": "6.1",
                "pcie": {"generation": 3, "width": 4, "max_generation": 3, "max_width": 16},
                "power_limit_watts": 151.0,
                "default_power_limit_watts": None,
                "has_energy_counter": False,
                "is_persistent": False,
                "processes": None,
            },
        ],
    }


@pytest.mark.parametrize(
    ("fault", "says", "flags"),
    [
        ("not loaded", "Driver Not Loaded", [False, False, False]),
        ("mismatch", "version mismatch", [False, True, False]),
        ("forbidden", "Insufficient Permissions", [False, False, True]),
    ],
)
def test_a_driver_that_does_not_answer_says_why(
    nvml_library: Path, fault: str, says: str, flags: list[bool]
) -> None:
    found = asked(nvml_environment(nvml_library, fault))
    assert isinstance(found, list)
    assert says in found[0]
    assert found[1:] == flags


def test_without_a_driver_there_is_no_library(tmp_path: Path) -> None:
    """As on this machine, which has no card."""
    found = asked(nvml_environment(tmp_path))
    assert isinstance(found, list)
    assert found[1:] == [True, False, False]


def test_amds_cards_are_described_through_amdsmi(tmp_path: Path) -> None:
    """As amdsmi 7.0.2 answers, for a card of its documentation."""
    (tmp_path / "amdsmi.py").write_text(
        """
class AmdSmiException(Exception):
    pass
def amdsmi_init(): pass
def amdsmi_get_processor_handles(): return ["card"]
def amdsmi_get_gpu_asic_info(card):
    return {"market_name": "AMD Radeon RX 7900 XTX", "vendor_id": "0x1002", "num_compute_units": 96,
            "target_graphics_version": "gfx1100"}
def amdsmi_get_gpu_vram_usage(card): return {"vram_total": 24560, "vram_used": 560}
def amdsmi_get_gpu_driver_info(card):
    return {"driver_name": "amdgpu", "driver_version": "6.12.12", "driver_date": "2015/01/01 00:00"}
def amdsmi_get_gpu_device_uuid(card): return "2cff744c-0000-1000-80d9-5b2a9e2d0c11"
def amdsmi_get_energy_count(card): raise AmdSmiException("not supported")
def amdsmi_get_gpu_process_list(card):
    return [{"name": "python", "pid": 7, "mem": 0, "engine_usage": {"gfx": 0, "enc": 0},
             "memory_usage": {"gtt_mem": 0, "cpu_mem": 0, "vram_mem": 3 * 2**20 + 1}, "cu_occupancy": 0}]
"""
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    found = asked(
        environment,
        "import dataclasses, json; from serving.hardware.amd import amd_cards;"
        "print(json.dumps([dataclasses.asdict(card) for card in amd_cards()]))",
    )
    assert found == [
        {
            "index": 0,
            "uuid": "2cff744c-0000-1000-80d9-5b2a9e2d0c11",
            "name": "AMD Radeon RX 7900 XTX",
            "isa": "gfx1100",
            "total_mib": 24560,
            "free_mib": 24000,
            "driver_version": "6.12.12",
            "has_energy_counter": False,
            "processes": [{"pid": 7, "mib": 4}],
        }
    ]


def test_the_processor_is_described_as_the_kernel_does(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(X86)
    found = cpu(cpuinfo)
    assert found.name == "AMD Ryzen 9 9950X 16-Core Processor"
    assert found.cores == physical_cores()
    assert found.instruction_sets == ("AVX2", "FMA", "F16C", "AVX-512", "AVX-VNNI", "AVX512-VNNI")
    cpuinfo.write_text(ARM)
    assert cpu(cpuinfo).instruction_sets == ("NEON", "DOTPROD")
    assert cpu(tmp_path / "nothing").instruction_sets == ()


def test_cards_on_the_bus_are_seen_without_a_driver(tmp_path: Path) -> None:
    for address, kind, vendor in (
        ("0000:01:00.0", "0x030000", "0x10de"),
        ("0000:01:00.1", "0x040300", "0x10de"),  # its sound
        ("0000:03:00.0", "0x038000", "0x1002"),
        ("0000:05:00.0", "0x030000", "0x1a03"),  # a server's own screen
    ):
        device = tmp_path / "devices" / address
        device.mkdir(parents=True)
        (device / "class").write_text(f"{kind}\n")
        (device / "vendor").write_text(f"{vendor}\n")
    driver = tmp_path / "drivers" / "amdgpu"
    driver.mkdir(parents=True)
    (tmp_path / "devices/0000:03:00.0/driver").symlink_to(driver)
    assert pci_cards(tmp_path / "devices") == [
        PciCard("0000:01:00.0", "NVIDIA", None),
        PciCard("0000:03:00.0", "AMD", "amdgpu"),
    ]
    assert pci_cards(tmp_path / "nothing") == []


def test_memory_that_files_take_is_free_in_a_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    assert host_available_mib(tmp_path, tmp_path) == 8192
    (tmp_path / "memory.max").write_text(f"{1024 * 2**20}\n")
    (tmp_path / "memory.current").write_text(f"{800 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {300 * 2**20}\n")
    assert host_available_mib(tmp_path, tmp_path) == 1024 - 500


def test_memory_speed_is_measured() -> None:
    """What any machine that runs this has, and no processor's memory yet exceeds."""
    assert 1 < read_gb_per_second(seconds=0.05) < 2000
