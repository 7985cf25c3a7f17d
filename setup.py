"""Builds the native CPU library, without importing torch and without linking against it.

torch is no build requirement: pip would put another torch, of several GB, into the isolated build environment. Only
its headers are needed, and they are found in the environment that runs pip. The library is linked against an empty stub
with the name of libtorch_cpu.so; its symbols are resolved when it is loaded, because torch is in the process by then.
It uses neither CPython symbols nor an unstable torch interface: one wheel, py3-none-<platform>, serves every Python and
every torch >= 2.11.

Without a compiler or without the headers the wheel is pure Python, and plain PyTorch serves the CPU. Environment
variables: XENTILE_REQUIRE_NATIVE=1 makes that an error; XENTILE_TORCH_INCLUDE names the folder of the headers; CXX and
CXXFLAGS as usual.
"""

import os
import pathlib
import platform
import runpy
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = pathlib.Path("csrc/cpu")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
TORCH = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11: the oldest torch that the library must load in
OPERATORS = ["library", "cross_entropy", "gradient_memory", "sketch", "quantile"]
OPERATORS += ["teacher_topk", "topk_support", "topk_distillation", "dense"]
KERNELS = {
    "rows_default": ["-ffp-contract=fast"],
    "rows_avx2": ["-ffp-contract=fast", "-march=x86-64-v3"],
    "rows_avx512": ["-ffp-contract=fast", "-march=x86-64-v4", "-mprefer-vector-width=512"],
    "rows_float64": [],
}
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def torch_include() -> str:
    """The folder of torch's headers. In pip's isolated build sysconfig still names the environment that runs pip."""
    candidates = [pathlib.Path(root, "torch", "include") for root in _site_packages()]
    if chosen := os.environ.get("XENTILE_TORCH_INCLUDE"):
        candidates = [pathlib.Path(chosen)]
    for include in candidates:
        if (include / "torch/csrc/stable/library.h").exists():
            return str(include)
    raise FileNotFoundError("no headers of torch >= 2.11 (install torch first)")


def _site_packages() -> Iterator[str]:
    yield from filter(None, sys.path)
    yield from {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if environment := os.environ.get("VIRTUAL_ENV"):
        yield from map(str, pathlib.Path(environment).glob("lib/python3*/site-packages"))


class BuildNative(build_ext):
    """Compiles csrc/cpu into xentile/_C_cpu.so, or leaves the package pure Python."""

    built = False
    into_source = False

    def run(self) -> None:
        """Remember where the library will go, which setuptools hides from `build_extension`."""
        self.into_source = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build, or remove the library of an earlier build: a pure Python package must not ship an old one."""
        output = pathlib.Path(self.get_ext_fullpath(ext.name))
        output.unlink(missing_ok=True)
        try:
            self.build_native(pathlib.Path(self.build_temp), output)
            self.built = True
        except (OSError, subprocess.CalledProcessError) as error:
            if self.into_source:
                pathlib.Path("src", self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            if os.environ.get("XENTILE_REQUIRE_NATIVE") == "1":
                raise
            print(f"warning: no native CPU library, plain PyTorch will serve the CPU: {error}", file=sys.stderr)

    def build_native(self, scratch: pathlib.Path, output: pathlib.Path) -> None:
        """Compile every unit, whatever changed: it takes half a minute, and nothing has to know who includes what."""
        for folder in (scratch, output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        prefix = f"-ffile-prefix-map={pathlib.Path.cwd()}/="  # no path of the building machine in messages
        include = torch_include()
        units = {name: [*TORCH, "-isystem", include] for name in OPERATORS}
        units["library"].append(f'-DXENTILE_SIGNATURE="{runpy.run_path("src/xentile/_schemas.py")["SIGNATURE"]}"')
        units["quantile"].append("-ffp-contract=off")  # equal to NumPy, which rounds every product, also with FMA
        units |= {name: isa if IS_X86 else isa[:1] for name, isa in KERNELS.items()}
        objects = []
        for name, own in units.items():
            objects.append(str(scratch / f"{name}.o"))
            source = str(SOURCES / f"{name}.cpp")
            self.run_command_line(*compiler, *COMMON, prefix, *own, *extra, "-c", source, "-o", objects[-1])
        stub = str(scratch / "libtorch_cpu.so")
        soname = "-Wl,-soname,libtorch_cpu.so"
        self.run_command_line(*compiler, "-shared", soname, "-x", "c++", os.devnull, "-o", stub)
        link = [f"-L{scratch}", "-Wl,--no-as-needed", "-ltorch_cpu", *(f for f in extra if f.startswith("-fsanitize"))]
        self.run_command_line(*compiler, "-shared", *objects, "-o", str(output), *link)

    @staticmethod
    def run_command_line(*command: str) -> None:
        """Run and show a command."""
        print(shlex.join(command))
        subprocess.run(command, check=True)

    def get_ext_filename(self, fullname: str) -> str:
        """Without the suffix of a Python module: it is loaded with torch.ops.load_library."""
        return fullname.replace(".", "/") + ".so"

    def get_outputs(self) -> list[str]:
        """Only what was built."""
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        """For an editable install."""
        if self.built:
            super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """A wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>, or py3-none-any if nothing was compiled."""
        built = self.get_finalized_command("build_ext").built
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    ext_modules=[Extension("xentile._C_cpu", [], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
