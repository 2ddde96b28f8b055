"""Pack what a run on another machine needs, so that it compiles nothing: kernels, programs and a trained flow.

    python -m benchmarks.gpu.pack DIR --capability 90
    python -m benchmarks.gpu smoke --pack DIR       # on a machine with such a GPU

DIR gets Triton's cache of both programs, the CUDA kernels if they are built, the programs without torch if nvcc is
there, and a checkpoint. Triton takes a kernel from the cache only if its own version and the Python for which it was
built are the same; `--wheel` names another wheel of Triton, unpacked, for which the cache is made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 64 * 2**20
# Triton reads no other file of a compiled kernel.
NEEDED = (".json", ".cubin", ".so")


def relocate(cache: Path) -> None:
    """Make a cache of Triton usable where it lies now, since it names its files by absolute paths."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.absolute().with_name(name)) for name in paths if group.with_name(name).exists()}
        if here != paths:
            group.write_text(json.dumps({"child_paths": here}))


def thin(cache: Path) -> None:
    """Delete the files of a cache that no run reads."""
    for path in cache.glob("*/*"):
        if path.suffix not in NEEDED:
            path.unlink()
    relocate(cache)


def total(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Run the command line."""
    from .ahead import compile_all
    from .facts import MANIFEST, output
    from .outside import PROGRAMS, build
    from .runner import Skip

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that is made, or completed")
    parser.add_argument("--capability", type=int, default=90, help="of the chip")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "starflow/checkpoints/digits", help="a trained flow")
    parser.add_argument("--wheel", type=Path, help="folder with the package triton of an unpacked wheel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    cache, notes = args.folder.absolute() / "triton", []
    found = compile_all("bench", str(args.checkpoint), cache, args.capability, args.jobs, args.wheel)
    notes.append(f"Triton: {found}")
    thin(cache)
    library = ROOT / "starflow_kernels" / "_cuda.abi3.so"
    if library.exists():
        shutil.copy(library, args.folder)
    else:
        notes.append("the CUDA kernels are not built: STARFLOW_CUDA=1 python setup.py build_ext --inplace")
    try:
        for name in PROGRAMS:
            build(name, args.folder, f"sm_{args.capability}a" if args.capability >= 90 else f"sm_{args.capability}")
    except Skip as reason:
        notes.append(f"{', '.join(PROGRAMS)}: {reason}")
    shutil.copytree(args.checkpoint, args.folder / "checkpoint" / args.checkpoint.name, dirs_exist_ok=True)
    manifest = {"commit": output("git", "rev-parse", "--short", "HEAD"), "capability": args.capability, "notes": notes}
    (args.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    size = total(args.folder)
    print(*notes, f"{args.folder}: {size / 2**20:.1f} MiB", sep="\n")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
