"""Builds the optional extensions from ``csrc/``; metadata is in pyproject.toml.

``pad_kernels._C`` is for CPUs and needs a C++ compiler, ``pad_kernels._cuda`` is for NVIDIA GPUs
and needs nvcc too, but neither a GPU nor a driver. torch is not required, nor is any compiler: if
an extension cannot be built, the install still succeeds without it and a text file in the package
says why, for ``pad_kernels.available_backends()``; the file is absent after a successful build.

``PAD_KERNELS_CUDA_ARCHS`` names the GPUs to compile for, such as ``80 90a 100``; ``none`` leaves
``_cuda`` out.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
ROW_PASS = CSRC / "cpu" / "row_pass.cpp"
#: The file that says why an extension is missing.
REASON_FILES = {"pad_kernels._C": "_native_build.txt", "pad_kernels._cuda": "_cuda_build.txt"}

#: The GPUs to compile for: Ampere and its successors by sm_80, then Hopper and Blackwell. PTX for
#: the first lets a driver compile for what comes later.
CUDA_ARCHS = ("80", "90a", "100")

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

# No -use_fast_math, for the same reason.
NVCC_FLAGS = ["-std=c++17", "-O3"]

# The row pass is compiled once for each of these; the machine chooses when the module is loaded.
X86_LEVELS = {
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}


class BuildNative(build_ext):
    """Compiles the extensions; a failure leaves its reason behind."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext``, or write why that was not possible."""
        reason = Path(self.get_ext_fullpath(ext.name)).with_name(REASON_FILES[ext.name])
        reason.unlink(missing_ok=True)
        try:
            self._build_cuda(ext) if ext.name.endswith("_cuda") else self._build(ext)
        except Exception as error:
            # An earlier build's module beside the reason would be installed with it.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            reason.parent.mkdir(parents=True, exist_ok=True)
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            text = f"{ext.name} was not built: {type(error).__name__}: {first_line}"
            reason.write_text(text + "\n", encoding="utf-8")
            print(f"pad_kernels: {text}; installing without it", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """An editable install reads the source tree: reasons go there, as the modules would."""
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("pad_kernels"))
        for ext in self.extensions:
            reason = Path(self.build_lib, "pad_kernels", REASON_FILES[ext.name])
            note = package / reason.name
            note.unlink(missing_ok=True)
            if reason.exists():
                note.write_text(reason.read_text(encoding="utf-8"), encoding="utf-8")

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

    def _build_cuda(self, ext: Extension) -> None:
        """Device code by nvcc, bindings by the C++ compiler, joined with a static runtime."""
        import pybind11

        archs = cuda_archs(nvcc := find_nvcc())
        objects = Path(self.build_temp) / "cuda"
        objects.mkdir(parents=True, exist_ok=True)
        command = [nvcc, *NVCC_FLAGS, *(f for arch in archs for f in gencode(arch, archs))]
        flags = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # nvcc waits for its own children
            made = [objects / f"{source.stem}.o" for source in sources]
            todo = zip(sources, made, strict=True)
            list(pool.map(lambda x: run([*command, *flags, "-c", x[0], "-o", x[1]]), todo))
        bindings = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            macros=[("PAD_CUDA_ARCHS", '"' + " ".join(archs) + '"')],
            include_dirs=[pybind11.get_include(), *self.compiler.include_dirs],
            extra_postargs=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
            depends=ext.depends,
        )
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        run([nvcc, "-shared", "-cudart", "static", *made, *bindings, "-o", module])

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


#: Where CUDA installs itself, off the path of most shells.
CUDA_BIN = "/usr/local/cuda/bin"


def find_nvcc() -> str:
    """The CUDA compiler: of CUDA_HOME, or on the path, or where CUDA installs itself."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [str(Path(home, "bin"))] if home else [None, CUDA_BIN]
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if found is None:
        raise FileNotFoundError(f"no nvcc in {home}" if home else "no nvcc on the path")
    return found


def cuda_archs(nvcc: str) -> list[str]:
    """The GPUs to compile for: those asked for, else those of the usual ones that nvcc knows."""
    wish = os.environ.get("PAD_KERNELS_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if wish == ["none"]:
        raise ValueError("PAD_KERNELS_CUDA_ARCHS is none")
    if wish:
        return wish
    known = run([nvcc, "--list-gpu-arch"]).split()
    return [arch for arch in CUDA_ARCHS if f"compute_{arch.rstrip('af')}" in known]


def gencode(arch: str, archs: list[str]) -> list[str]:
    """What nvcc is told about one GPU."""
    portable = next((a for a in archs if a.isdigit()), "")
    code = f"[sm_{arch},compute_{arch}]" if arch == portable else f"sm_{arch}"
    return ["-gencode", f"arch=compute_{arch},code={code}"]


def run(command: list[str | Path]) -> str:
    """The output of a command; where it fails, an error with the last line of its complaint."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        complaint = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        errors = [line for line in complaint if "error" in line or "fatal" in line]
        raise RuntimeError(f"{Path(command[0]).name}: {(errors or complaint)[0]}")
    return done.stdout


def cuda_extension() -> Extension:
    """The GPU's extension module; its device code is compiled apart."""
    return Extension(
        "pad_kernels._cuda",
        sources=[path.as_posix() for path in sorted((CSRC / "cuda").glob("*.cpp"))],
        depends=[path.as_posix() for path in sorted(CSRC.rglob("*.h"))],
        language="c++",
        optional=True,
    )


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


setup(ext_modules=[extension(), cuda_extension()], cmdclass={"build_ext": BuildNative})
