"""Builds the compiled kernels of csrc/ with the package where torch and a C++ compiler are there.

STARFLOW_NATIVE=0 skips those for the CPU, STARFLOW_NATIVE=1 makes a failure an error; unset, a failure leaves pure
Python and a note with the reason, which starflow_kernels.backends() shows. Those for CUDA are built where
STARFLOW_CUDA=1 asks for them, which needs nvcc on the PATH. STARFLOW_SANITIZE=address,undefined builds the former with
sanitizers.
"""

import concurrent.futures
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
NATIVE, CUDA = "starflow_kernels._native", "starflow_kernels._cuda"
# Sources with kernels are compiled once an instruction set; the widest that the machine has is taken at run time.
KERNELS = [
    f"csrc/cpu/{name}.cpp"
    for name in (
        *("affine_flow", "affine_flow_inverse", "block", "cached_attention", "causal_attention", "elementary"),
        *("flow_head", "jacobi", "linear", "table"),
    )
]
COMMON = [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "model", "team")]
COMMON += [
    f"csrc/bindings/{name}.cpp"
    for name in ("affine_flow", "affine_flow_inverse", "attention", "block", "flow_head", "linear", "machine")
]
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c"]
INSTRUCTION_SETS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]}
# Contraction of a * b + c would depend on the code around it: fused operations are written out.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]


# The last is for later GPUs, compiled when the kernels are loaded.
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100", "compute_100"]
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]


def note(module: str) -> str:
    """File beside the package's modules with the reason why one is not there."""
    return f"{module.rpartition('.')[2]}.txt"


def torch_paths() -> tuple[list[str], list[str]]:
    """Folders of torch's headers and libraries."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RuntimeError(
            "torch was not there when the package was installed; "
            "install it first, then pip install --no-build-isolation"
        ) from error
    return cpp_extension.include_paths(), cpp_extension.library_paths()


class BuildNative(build_ext):
    """Compile KERNELS for every instruction set, COMMON once, and link them against libtorch's stable ABI."""

    def build_extension(self, ext):
        cuda = ext.name == CUDA
        switch = "STARFLOW_CUDA" if cuda else "STARFLOW_NATIVE"
        wanted = os.environ.get(switch, "0" if cuda else "")
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in (target, target.with_name(note(ext.name))):
            old.unlink(missing_ok=True)
        try:
            if wanted == "0":
                raise RuntimeError(
                    f"skipped, {switch}=0 when the package was installed"
                    if switch in os.environ
                    else f"not asked for with {switch}=1 when the package was installed"
                )
            (self.build_cuda if cuda else self.build_native)(target)
        except Exception as error:
            if wanted == "1":
                raise
            print(f"{ext.name} is not built: {error}", file=sys.stderr)
            target.with_name(note(ext.name)).write_text(f"{error}\n")

    def copy_extensions_to_source(self):
        """Bring what build_extension left, library or note, to the source tree of an editable install."""
        for ext in self.extensions:
            filename = self.get_ext_filename(ext.name)
            built, source = Path(self.build_lib, filename), ROOT / filename
            for name in (source.name, note(ext.name)):
                source.with_name(name).unlink(missing_ok=True)
                if built.with_name(name).exists():
                    self.copy_file(str(built.with_name(name)), str(source.with_name(name)))

    def get_outputs(self):
        """Files that were really made."""
        outputs = [Path(output) for output in super().get_outputs()]
        outputs += [output.with_name(note(ext.name)) for output, ext in zip(outputs, self.extensions)]
        return [str(output) for output in outputs if output.exists()]

    def get_output_mapping(self):
        return {}

    def build_native(self, target: Path) -> None:
        includes, libraries = torch_paths()
        sanitize = os.environ.get("STARFLOW_SANITIZE")
        extra = [f"-fsanitize={sanitize}", "-O1", "-g", "-fno-omit-frame-pointer"] if sanitize else []

        def compile_one(job):
            source, name, flags, defines = job
            return self.compiler.compile(
                [str(Path(source))],
                output_dir=os.path.join(self.build_temp, name),
                macros=[*MACROS, *defines],
                include_dirs=includes,
                extra_postargs=[*FLAGS, *extra, *flags],
            )

        os.chdir(ROOT)
        jobs = [(source, "common", [], []) for source in COMMON]
        for name, flags in INSTRUCTION_SETS.items():
            defines = [("STARFLOW_ISA", name), ("STARFLOW_ISA_NAME", f'"{name}"')]
            jobs += [(source, name, flags, defines) for source in KERNELS]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [object for compiled in pool.map(compile_one, jobs) for object in compiled]
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=["torch_cpu", "torch", "c10"],
            library_dirs=libraries,
            extra_postargs=extra,
            target_lang="c++",
        )

    def build_cuda(self, target: Path) -> None:
        """Compile csrc/cuda for every architecture and link it with CUDA's static runtime: it loads without a GPU."""
        includes, libraries = torch_paths()
        if not shutil.which("nvcc"):
            raise RuntimeError("nvcc was not on the PATH when the package was installed")
        os.chdir(ROOT)
        objects = self.compiler.compile(
            ["csrc/bindings/onchip.cpp"],
            output_dir=os.path.join(self.build_temp, "cuda"),
            macros=MACROS,
            include_dirs=includes,
            extra_postargs=FLAGS,
        )
        code = [f"-gencode=arch=compute_{a.rpartition('_')[2]},code={a}" for a in ARCHITECTURES]
        kernels = os.path.join(self.build_temp, "cuda", "onchip.cu.o")
        options = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-t{os.cpu_count()}"]
        subprocess.run(["nvcc", *options, *code, "-c", "csrc/cuda/onchip.cu", "-o", kernels], check=True)
        folders = [f"-L{folder}" for folder in libraries]
        link = ["nvcc", "-shared", "-cudart=static", *objects, kernels, *folders, "-ltorch_cpu", "-lc10"]
        subprocess.run([*link, "-o", str(target)], check=True)


setup(
    ext_modules=[Extension(module, sources=[], py_limited_api=True) for module in (NATIVE, CUDA)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
