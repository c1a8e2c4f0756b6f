"""Looks for known weaknesses: of the code with bandit, of the pinned dependencies with pip-audit.

Both live in an environment of their own, so that what they need pins nothing of ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_ENVIRONMENT = _ROOT / "build" / "audit"
_TOOLS = ("bandit==1.9.4", "pip-audit==2.10.1")
_AUDIT_SECONDS = 300
# B608: ruff's S608 finds the same; where it may be is said in pyproject.toml, with the reason.
# B310, B104: as S310 and S104, which are answered where they are.
# B615: what is read with from_pretrained lies in folders of this machine.
_KNOWN = "B608,B310,B104,B615"


def main() -> int:
    """Audit; gives the exit status."""
    try:
        _install()
    except subprocess.CalledProcessError:
        print("AUDIT SKIPPED: its tools cannot be installed here.", file=sys.stderr)
        return 0
    command = [str(_ENVIRONMENT / "bin" / "bandit"), "-q", "-ll", "-s", _KNOWN]
    code = subprocess.run([*command, "-r", "serving", "loadtest", "tools"], cwd=_ROOT, check=False)
    return code.returncode or _audit_dependencies()


def _install() -> None:
    if not (_ENVIRONMENT / "bin" / "pip").exists():
        venv.create(_ENVIRONMENT, with_pip=True)
    pip = [str(_ENVIRONMENT / "bin" / "pip"), "install", "--quiet", *_TOOLS]
    subprocess.run(pip, check=True)


def _audit_dependencies() -> int:
    command = [str(_ENVIRONMENT / "bin" / "pip-audit"), "--no-deps", "--disable-pip"]
    try:
        done = subprocess.run(
            [*command, "--format", "json", "-r", "constraints.txt"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=_AUDIT_SECONDS,
            check=False,
        )
        found = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return _skipped("no answer")
    except (ValueError, KeyError):
        return _skipped(done.stderr.strip().rpartition("\n")[2])
    unknown = [each for each in found if "skip_reason" in each]
    weak = [each for each in found if each.get("vulns")]
    for each in weak:
        ids = ", ".join(weakness["id"] for weakness in each["vulns"])
        print(f"{each['name']} {each['version']}: {ids}", file=sys.stderr)
    if unknown:
        # pip-audit says "no known vulnerabilities" of what it could not look up, too.
        _skipped(f"{len(unknown)} of {len(found)} could not be looked up")
    else:
        print(f"{len(found)} dependencies looked up, {len(weak)} with known weaknesses")
    return 1 if weak else 0


def _skipped(reason: str) -> int:
    print(f"DEPENDENCIES NOT AUDITED: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
