"""Builds the C code of hamdist while it is installed (pyproject.toml names this hook).

The library keeps to Python's stable ABI as of 3.10 (`Py_LIMITED_API` in rows.c), and the wheel says
so by its tag, `cp310-abi3-PLATFORM`: one wheel serves all later versions.

Without a C compiler, and in a Python without a global lock (which has no stable ABI), the
installation goes on: the steps of torch do the same work, slower at batch 1, and `engine.step:
native` says that it needs a compiler. HAMDIST_WITHOUT_NATIVE=1 leaves the C code out on purpose.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

FOLDER = "hamdist/dynamics/native"
ROWS = Extension(
    "hamdist.dynamics.native._rows",
    [f"{FOLDER}/rows.c"],
    depends=[f"{FOLDER}/{name}.h" for name in ("rows", "products", "convolution", "rotation")],
    # No product is fused with the sum behind it: which ones a compiler fuses depends on the
    # processor that it compiles a clone for, and the clones of rows.c are to agree to the bit.
    extra_compile_args=["-O3", "-ffp-contract=off", "-g0"],
    py_limited_api=True,
)


class NativeBuildHook(BuildHookInterface[Any]):  # type: ignore[misc]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        if os.environ.get("HAMDIST_WITHOUT_NATIVE"):
            return
        command = build_ext(Distribution({"name": "hamdist", "ext_modules": [ROWS]}))
        command.inplace = True
        try:
            with TemporaryDirectory() as objects:
                command.build_temp = objects
                command.ensure_finalized()
                command.run()
        except (CCompilerError, ExecError, PlatformError) as error:
            self.app.display_warning(f"hamdist without its C code: {error}")
            return
        build_data["artifacts"] += [f"{FOLDER}/_rows*.so", f"{FOLDER}/_rows*.pyd"]
        build_data["pure_python"] = False
        stable = any(".abi3." in file.name for file in Path(self.root, FOLDER).glob("_rows*"))
        if stable:
            build_data["tag"] = f"cp310-abi3-{_platform()}"
        else:  # Windows, whose libraries do not say so in their names
            build_data["infer_tag"] = True


def _platform() -> str:
    """Return this machine's platform as a wheel's tag has it, without a promise of a libc's age
    (`manylinux`), which only a look at the finished library could make."""
    promises = ("manylinux", "musllinux")
    return next(tag.platform for tag in sys_tags() if not tag.platform.startswith(promises))
