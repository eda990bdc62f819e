"""Prints each lower bound of pyproject.toml as a pin, a line each: pip's constraints for
`scripts/test --lowest`. Not torch's: scripts/env chooses its version."""

import re
import sys
from pathlib import Path

project = Path(__file__).parent.parent / "pyproject.toml"
bounds = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\w.]+)"', project.read_text())
sys.stdout.writelines(f"{name}=={bound}\n" for name, bound in bounds if name != "torch")
