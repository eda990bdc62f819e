"""Prints each lower bound of hamdist and of the extra `dev` as a pin, a line each.

They are pip's constraints for `scripts/test --lowest`. torch is left to scripts/env.
Other extras have bounds of their own, some of the same packages.
"""

import re
import sys
from pathlib import Path

project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
_, rest = project.split("\ndependencies = [", 1)
needed, rest = rest.split("\n]", 1)
_, rest = rest.split("\ndev = [", 1)
dev, _ = rest.split("\n", 1)
bounds = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\w.]+)"', needed + dev)
sys.stdout.writelines(f"{name}=={bound}\n" for name, bound in bounds if name != "torch")
