"""Prints which Python packages the environment of this Python has, as a CycloneDX document (SBOM): `python sbom.py`.

Uses the standard library only: an image's other environments, such as vLLM's, run it, too. The same packages give the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions


def document(packages: Iterable[Distribution]) -> Mapping[str, object]:
    """CycloneDX 1.5, as https://cyclonedx.org/docs/1.5/json has it."""
    components = {str(each["bom-ref"]): each for each in map(_component, packages)}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "components": [components[key] for key in sorted(components)],
    }


def _component(package: Distribution) -> dict[str, object]:
    # As the index has it (PEP 503), which is what a purl names.
    name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
    purl = f"pkg:pypi/{name}@{package.version.replace('+', '%2B')}"
    told: dict[str, object] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": package.version,
        "purl": purl,
    }
    # An expression of SPDX's, where the package says so; older fields are free text.
    if "License-Expression" in package.metadata:
        told["licenses"] = [{"expression": package.metadata["License-Expression"]}]
    return told


if __name__ == "__main__":
    json.dump(document(distributions()), sys.stdout, indent=1)
