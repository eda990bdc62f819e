"""Prints each lower bound of pyproject.toml as a pin, a line each: pip's constraints for
`scripts/test --lowest`. Not torch's: scripts/env chooses its version."""

import re
import sys
from pathlib import Path

project = Path(__file__).parent.parent / "pyproject.toml"
_, dependencies = project.read_text().split("dependencies = [", 1)  # what builds it comes before
bounds = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\w.]+)"', dependencies)
sys.stdout.writelines(f"{name}=={bound}\n" for name, bound in bounds if name != "torch")
