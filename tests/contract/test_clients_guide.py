"""The snippets of docs/clients.md run as they stand, but for the server's address and the models' names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.engines import CHAT, EMBEDDING, ContractServer
from tests.contract.environments import run_node, run_python

GUIDE = Path(__file__).parents[2] / "docs" / "clients.md"
# Where a section's client is installed; None: with the tests' own packages.
REQUIREMENTS = {
    "openai for Python": None,
    "anthropic for Python": None,
    "LangChain": "langchain.txt",
    "LlamaIndex": "llama_index.txt",
}
# What they print goes out as one JSON text.
PYTHON = "import contextlib, io, json, sys\nwith contextlib.redirect_stdout(io.StringIO()) as told:\n    exec({})\njson.dump(told.getvalue(), sys.stdout)\n"
JAVASCRIPT = "let told = '';\nconsole.log = (text) => { told += text; };\n%s\nprocess.stdout.write(JSON.stringify(told));\n"


def section_of(title: str) -> str:
    """The text below a heading."""
    return GUIDE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def snippet(section: str, language: str, server: ContractServer) -> str:
    """A section's code, for a server."""
    [code] = re.findall(rf"```{language}\n(.*?)```", section_of(section), re.DOTALL)
    assert "http://127.0.0.1:8000" in code
    for shown, meant in (
        ("http://127.0.0.1:8000", server.base_url),
        ("smollm2-135m", CHAT),
        ("my-embedder", EMBEDDING),
    ):
        code = code.replace(shown, meant)
    return str(code)


@pytest.mark.timeout(900)
@pytest.mark.needs("embeddings")
@pytest.mark.parametrize("section", REQUIREMENTS)
def test_python_snippets(contract: ContractServer, tmp_path: Path, section: str) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(PYTHON.format(repr(snippet(section, "python", contract))))
    requirements = REQUIREMENTS[section]
    told: Any
    if requirements is None:
        command = [sys.executable, str(script)]
        told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    else:
        told = run_python(str(script), requirements, contract.base_url)
    assert told.strip()
    if "anthropic" not in section:
        *said, width = told.splitlines()
        assert "".join(said).strip()
        assert width == "384"


@pytest.mark.timeout(900)
def test_the_javascript_snippet(contract: ContractServer, tmp_path: Path) -> None:
    script = tmp_path / "snippet.mjs"
    script.write_text(JAVASCRIPT % snippet("openai for JavaScript", "js", contract))
    assert run_node(str(script), contract.base_url).strip()


def test_every_section_with_code_is_run() -> None:
    sections = re.findall(r"^## (.*)$", GUIDE.read_text(), re.MULTILINE)
    assert {*REQUIREMENTS, "openai for JavaScript"} == {
        section for section in sections if "```" in section_of(section)
    }
