"""Build the compiled kernels of csrc/ with the package, if torch and a C++ compiler are installed.

Environment variables:
    STARFLOW_NATIVE=0     Skip the CPU kernels.
    STARFLOW_NATIVE=1     Fail if the CPU kernels cannot be built. If unset, the package is then installed without them,
                          and starflow_kernels.backends() shows the reason.
    STARFLOW_CUDA=1       Build the CUDA kernels too; needs nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda.
    STARFLOW_SANITIZE=address,undefined
                          Build the CPU kernels with these sanitizers.
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
# Sources with kernels are compiled once per instruction set. At run time, the widest set of the processor is used.
KERNELS = [
    f"csrc/cpu/{name}.cpp"
    for name in (
        *("affine_flow", "affine_flow_inverse", "block", "cached_attention", "causal_attention", "elementary"),
        *("fingerprint", "flow_head", "jacobi", "layer", "linear", "masked_inverse", "table", "transposed"),
    )
]
COMMON = [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "model", "team")]
COMMON += [
    f"csrc/bindings/{name}.cpp"
    for name in (
        *("affine_flow", "affine_flow_inverse", "attention", "block", "fingerprint", "flow_head", "layer", "linear"),
        *("machine", "masked_inverse", "stack", "transposed", "values"),
    )
]
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c"]
INSTRUCTION_SETS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]}
# The compiler must not fuse a * b + c, since whether it does depends on the surrounding code. Fused operations are
# explicit.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]

CUDA_KERNELS = ("onchip", "persistent")
# compute_100 is PTX for later GPUs, which is compiled when the kernels are loaded.
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100", "compute_100"]
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
WITHOUT_TORCH = (
    "torch was missing from the build environment; run `pip install torch setuptools`, then in the folder of the "
    "source `pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall .`"
)


def note(module: str) -> str:
    """Return the name of the file that takes the place of a missing compiled module and says why it is missing."""
    return f"{module.rpartition('.')[2]}.txt"


def find_nvcc() -> str:
    """Return the path of nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if not found:
        raise RuntimeError(f"nvcc was neither on the PATH nor in {home}/bin when the package was installed")
    return found


def torch_paths() -> tuple[list[str], list[str]]:
    """Return the folders of torch's headers and libraries."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RuntimeError(WITHOUT_TORCH) from error
    return cpp_extension.include_paths(), cpp_extension.library_paths()


class BuildNative(build_ext):
    """Compile KERNELS for every instruction set, COMMON once, and link them against libtorch's stable ABI."""

    def build_extension(self, ext):
        cuda = ext.name == CUDA
        wanted = os.environ.get("STARFLOW_CUDA", "0") if cuda else os.environ.get("STARFLOW_NATIVE", "")
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in (target, target.with_name(note(ext.name))):
            old.unlink(missing_ok=True)
        if wanted == "0":
            return
        try:
            (self.build_cuda if cuda else self.build_native)(target)
        except Exception as error:
            if wanted == "1":
                raise
            print(f"{ext.name} was not built: {error}", file=sys.stderr)
            target.with_name(note(ext.name)).write_text(f"{error}\n", encoding="utf-8")

    def copy_extensions_to_source(self):
        """Copy what build_extension wrote, library or note, to the source tree of an editable install."""
        for ext in self.extensions:
            filename = self.get_ext_filename(ext.name)
            built, source = Path(self.build_lib, filename), ROOT / filename
            for name in (source.name, note(ext.name)):
                source.with_name(name).unlink(missing_ok=True)
                if built.with_name(name).exists():
                    self.copy_file(str(built.with_name(name)), str(source.with_name(name)))

    def get_outputs(self):
        """List the files that build_extension wrote, libraries and notes."""
        outputs = [Path(output) for output in super().get_outputs()]
        outputs += [output.with_name(note(ext.name)) for output, ext in zip(outputs, self.extensions)]
        return [str(output) for output in outputs if output.exists()]

    def get_output_mapping(self):
        """Return no mapping: copy_extensions_to_source copies the files."""
        return {}

    def build_native(self, target: Path) -> None:
        """Compile the CPU kernels and link them."""
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
        """Compile csrc/cuda for every architecture and link CUDA's static runtime, so that it loads without a GPU."""
        (includes, libraries), nvcc = torch_paths(), find_nvcc()
        os.chdir(ROOT)
        objects = self.compiler.compile(
            [f"csrc/bindings/{name}.cpp" for name in CUDA_KERNELS],
            output_dir=os.path.join(self.build_temp, "cuda"),
            macros=MACROS,
            include_dirs=includes,
            extra_postargs=FLAGS,
        )
        code = [f"-gencode=arch=compute_{a.rpartition('_')[2]},code={a}" for a in ARCHITECTURES]
        options = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-t{os.cpu_count()}"]
        for name in CUDA_KERNELS:
            kernel = os.path.join(self.build_temp, "cuda", f"{name}.cu.o")
            subprocess.run([nvcc, *options, *code, "-c", f"csrc/cuda/{name}.cu", "-o", kernel], check=True)
            objects.append(kernel)
        folders = [f"-L{folder}" for folder in libraries]
        link = [nvcc, "-shared", "-cudart=static", *objects, *folders, "-ltorch_cpu", "-lc10"]
        subprocess.run([*link, "-o", str(target)], check=True)


setup(
    ext_modules=[Extension(module, sources=[], py_limited_api=True) for module in (NATIVE, CUDA)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
