"""Digests of model files: what they are of, when they are computed anew, and what a wrong one says."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from serving.models.checksums import digest_of, verify
from serving.models.sources import ModelError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_files_digest_is_sha256sums(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    assert digest_of(file, tmp_path / "cache") == sha256(b"weights") == digest_of(file)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_a_folders_digest_is_that_of_sha256sums_lines(tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    (folder / "sub").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("b.json", "a.safetensors", "sub/c.txt", "Z.md", ".hidden", ".cache/x"):
        (folder / name).write_text(name)
    command = "find . -type f -not -path '*/.*' -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    listed = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert digest_of(folder, tmp_path / "cache") == listed.stdout.split()[0]


def test_a_model_in_parts_is_all_of_them(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_text(part.name)
    before = digest_of(parts[0], tmp_path)
    lines = "".join(f"{sha256(p.name.encode())}  {p.name}\n" for p in parts)
    assert before == sha256(lines.encode())
    parts[1].write_text("damaged")
    assert digest_of(parts[0], tmp_path) != before


def test_a_file_is_read_again_when_anything_about_it_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "model.gguf", tmp_path / "cache"
    file.write_bytes(b"first")
    digest_of(file, cache)
    [memo] = cache.iterdir()
    memo.write_text("0" * 64)
    assert digest_of(file, cache) == "0" * 64  # it was not read again
    memo.write_text("0" * 10)
    assert digest_of(file, cache) == sha256(b"first")  # a crash left it half written
    stat = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_of(file, cache) == sha256(b"other")


def test_a_wrong_checksum_names_both_and_the_mend(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    verify(file, None, tmp_path, "sha256")
    verify(file, sha256(b"weights"), tmp_path, "sha256")
    with pytest.raises(ModelError) as refused:
        verify(file, sha256(b"others"), tmp_path, "sha256")
    for word in (str(file), sha256(b"weights"), sha256(b"others"), "correct sha256"):
        assert word in str(refused.value)
    with pytest.raises(ModelError, match="No such file"):
        verify(tmp_path / "none", "0" * 64, tmp_path, "sha256")
