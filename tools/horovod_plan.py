"""Decide how Horovod is built: for the CPU, or with NCCL for GPUs. Prints the build's settings as lines for a shell.

HOROVOD_GPU_OPERATIONS=NCCL asks for NCCL, and is an error of one line where a part of it is missing. CPU, or nothing,
asks for the CPU: Horovod then needs no CUDA, whichever torch is installed and whatever is found of a CUDA toolkit.
"""

import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WAY_OUT = "HOROVOD_GPU_OPERATIONS=NCCL make install"


class BuildError(Exception):
    """What was asked for cannot be built here."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the build can use.

    `torch_cuda`: the CUDA version of the installed torch, None for a torch of the CPU. `toolkits`: folders to look for
    a CUDA toolkit in, the best first. `nccl_includes`, `nccl_libs`: likewise for nccl.h and libnccl.
    """

    torch_cuda: str | None
    toolkits: Sequence[Path]
    nccl_includes: Sequence[Path]
    nccl_libs: Sequence[Path]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A build: its settings as environment variables, and one line that says to the person what was chosen and why."""

    operations: str
    note: str
    settings: Mapping[str, str]


def plan(asked: str, machine: Machine) -> Plan:
    """Choose the build for what was asked for: "", "CPU" or "NCCL". Raises BuildError."""
    if asked in ("", "CPU"):
        return Plan(operations="CPU", note=_cpu_note(machine), settings={})
    if asked != "NCCL":
        raise BuildError(f"HOROVOD_GPU_OPERATIONS={asked}: it should be NCCL, or CPU for collectives by Gloo")
    toolkit, lack = find_toolkit(machine)
    if toolkit is None:
        raise BuildError(f"HOROVOD_GPU_OPERATIONS=NCCL: {lack}")
    header = _first(machine.nccl_includes, "nccl.h")
    library = _first(machine.nccl_libs, "libnccl.so*")
    if header is None or library is None:
        raise BuildError(
            f"HOROVOD_GPU_OPERATIONS=NCCL: {'nccl.h' if header is None else 'libnccl.so'} was not found; "
            "install NCCL with its headers, and name its folder: HOROVOD_NCCL_HOME=/path/to/nccl"
        )
    settings = {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_CUDA_HOME": str(toolkit),
        "CUDA_HOME": str(toolkit),
        "HOROVOD_NCCL_INCLUDE": str(header.parent),
        "NCCL_LIBRARY": str(library),
    }
    return Plan(operations="NCCL", note=f"Horovod: built with NCCL ({library}) and {toolkit}", settings=settings)


def find_toolkit(machine: Machine) -> tuple[Path | None, str]:
    """Find a complete CUDA toolkit of torch's own major version; else None, and what is missing, in words."""
    if machine.torch_cuda is None:
        return None, "the installed torch is a build for the CPU; install a CUDA build of it first"
    if not machine.toolkits:
        return None, "no CUDA toolkit was found; install it, and name its folder: CUDA_HOME=/path/to/cuda"
    lacks = []
    for folder in machine.toolkits:
        lack = toolkit_lack(folder, machine.torch_cuda)
        if lack is None:
            return folder, ""
        lacks.append(f"{folder} {lack}")
    return None, f"no complete CUDA toolkit was found ({'; '.join(lacks)})"


def toolkit_lack(folder: Path, torch_cuda: str) -> str | None:
    """Say what `folder` lacks of a CUDA toolkit for a torch of CUDA `torch_cuda`; None where it is complete."""
    header = folder / "include" / "cuda_runtime_api.h"
    if not (folder / "bin" / "nvcc").is_file():
        return "has no bin/nvcc"
    if not header.is_file():
        return "has no include/cuda_runtime_api.h"
    libraries = [folder / "lib64", folder / "lib", *folder.glob("targets/*/lib")]
    if not any((each / "libcudart.so").exists() for each in libraries):
        return "has no libcudart.so"
    version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    major = int(version[1]) // 1000 if version else None
    if str(major) != torch_cuda.partition(".")[0]:
        return f"is CUDA {major}, torch is built for CUDA {torch_cuda}"
    return None


def _cpu_note(machine: Machine) -> str:
    if machine.torch_cuda is None:
        return "Horovod: built for the CPU, as the installed torch is; collectives by Gloo"
    toolkit, lack = find_toolkit(machine)
    why = lack if toolkit is None else "NCCL was not asked for"
    return f"Horovod: built for the CPU, collectives by Gloo: {why}. With GPUs: {WAY_OUT}"


def _first(folders: Sequence[Path], pattern: str) -> Path | None:
    return next((found for each in folders for found in sorted(each.glob(pattern))), None)


def look(environ: Mapping[str, str]) -> Machine:
    """Look at this machine: torch, the folders of CUDA and NCCL that are named by the environment or usual."""
    import torch

    named = environ.get("HOROVOD_CUDA_HOME") or environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    compiler = shutil.which("nvcc", path=environ.get("PATH"))
    usual = [Path(compiler).parent.parent] if compiler else []
    usual += [each for each in (Path("/usr/local/cuda"),) if each.exists()]
    toolkits = [Path(named)] if named else usual
    # torch's own NCCL, a wheel beside it, comes before the system's: two of them in one process are one too many.
    homes = [Path(sysconfig.get_path("purelib"), "nvidia", "nccl"), *toolkits, Path("/usr")]
    if home := environ.get("HOROVOD_NCCL_HOME"):
        homes = [Path(home)]
    include, library = environ.get("HOROVOD_NCCL_INCLUDE"), environ.get("HOROVOD_NCCL_LIB")
    libs = ("lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu")
    return Machine(
        torch_cuda=torch.version.cuda,
        toolkits=toolkits,
        nccl_includes=[Path(include)] if include else [each / "include" for each in homes],
        nccl_libs=[Path(library)] if library else [each / lib for each in homes for lib in libs],
    )


def main() -> None:
    """Print the settings of the build, one NAME=VALUE a line, quoted for a shell; the note goes to standard error."""
    try:
        chosen = plan(os.environ.get("HOROVOD_GPU_OPERATIONS", ""), look(os.environ))
    except BuildError as failure:
        sys.exit(str(failure))
    print(chosen.note, file=sys.stderr)
    print(f"operations={chosen.operations}")
    for name, value in chosen.settings.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
