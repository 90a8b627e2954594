"""Builds the optional extension ``pad_kernels._C`` from ``csrc/``; metadata is in pyproject.toml.

Neither torch nor a compiler is required. If the extension cannot be built, the install still
succeeds as pure Python and ``pad_kernels/_native_build.txt`` in it says why, for
``pad_kernels.available_backends()``; the file is absent after a successful build.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
ROW_PASS = CSRC / "cpu" / "row_pass.cpp"
REASON_FILE = "_native_build.txt"

# No -ffast-math: infinities and NaN are ordinary input. These three only say that nobody reads
# errno or floating-point traps, and that a * b + c may round once; they are what a vectorised
# exponential needs.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]

# The row pass is compiled once for each of these; the machine chooses when the module is loaded.
X86_LEVELS = {
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}


class BuildNative(build_ext):
    """Compiles the row pass for each instruction set; a failure leaves its reason behind."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext``, or write why that was not possible."""
        reason = Path(self.get_ext_fullpath(ext.name)).with_name(REASON_FILE)
        reason.unlink(missing_ok=True)
        try:
            self._build(ext)
        except Exception as error:
            # An earlier build's module beside the reason would be installed with it.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            reason.parent.mkdir(parents=True, exist_ok=True)
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            text = f"the C++ extension was not built: {type(error).__name__}: {first_line}"
            reason.write_text(text + "\n", encoding="utf-8")
            print(f"pad_kernels: {text}; installing without it", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """An editable install reads the source tree: the reason goes there, as the module would."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")).with_name(REASON_FILE)
            package = self.get_finalized_command("build_py").get_package_dir("pad_kernels")
            note = Path(package) / REASON_FILE
            note.unlink(missing_ok=True)
            if built.exists():
                note.write_text(built.read_text(encoding="utf-8"), encoding="utf-8")

    def _build(self, ext: Extension) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        flags = [flag for flag in [*FLAGS, "-fopenmp-simd"] if self._accepts([flag])]
        openmp = ["-fopenmp"] if self._accepts(["-fopenmp"], link=True) else []
        ext.extra_compile_args += flags + openmp
        ext.extra_link_args += openmp
        ext.define_macros.append(("PAD_CXX_FLAGS", '"' + " ".join(flags) + '"'))
        if platform.machine().lower() in ("x86_64", "amd64"):
            ext.define_macros.append(("PAD_X86", "1"))
            for level, extra in X86_LEVELS.items():
                ext.extra_objects += self.compiler.compile(
                    [str(ROW_PASS)],
                    output_dir=str(Path(self.build_temp) / level),
                    macros=[("PAD_ISA", level)],
                    extra_postargs=ext.extra_compile_args + extra,
                    depends=ext.depends,
                )
        super().build_extension(ext)

    def _accepts(self, flags: list[str], link: bool = False) -> bool:
        """Whether the compiler takes ``flags``."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("int main() { return 0; }\n", encoding="utf-8")
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=["-Werror", *flags]
                )
                if link:
                    self.compiler.link_executable(
                        objects, "probe", output_dir=folder, extra_postargs=flags
                    )
            except Exception:
                return False
        return True


def extension() -> Extension:
    """The extension module, without what only the compiler can tell."""
    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    return Extension(
        "pad_kernels._C",
        sources=[path.as_posix() for path in sources],
        depends=[path.as_posix() for path in sorted(CSRC.rglob("*.h"))],
        language="c++",
        optional=True,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildNative})
