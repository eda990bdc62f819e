"""Builds the C code of hamdist while it is installed (pyproject.toml names this hook).

Without a C compiler the installation goes on: the steps of torch do the same work, slower at
batch 1, and `engine.step: native` says that it needs a compiler.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

FOLDER = "hamdist/dynamics/native"
ROWS = Extension(
    "hamdist.dynamics.native._rows",
    [f"{FOLDER}/rows.c"],
    depends=[f"{FOLDER}/rows.h"],
    # No product is fused with the sum behind it: which ones a compiler fuses depends on the
    # processor that it compiles a clone for, and the clones of rows.c are to agree to the bit.
    extra_compile_args=["-O3", "-ffp-contract=off"],
    py_limited_api=True,
)


class NativeBuildHook(BuildHookInterface[Any]):  # type: ignore[misc]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
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
        build_data["infer_tag"] = True
