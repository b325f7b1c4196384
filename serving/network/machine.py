"""The name of this machine, as far as compiled networks depend on it: processor, torch, and the C library."""

import hashlib
import platform
from pathlib import Path

import torch


def compiled_name() -> str:
    """Name the file of a network compiled for this machine, e.g. network-x86_64-avx512-1f0c9d2ab34e.pt2.

    The digits depend on all that the code may use: each feature of the processor, the versions of torch and libc.
    """
    features = f"{_processor_features()} {torch.__version__} {' '.join(platform.libc_ver())}"
    digits = hashlib.sha256(features.encode()).hexdigest()[:12]
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return f"network-{platform.machine()}-{capability}-{digits}.pt2"


def _processor_features() -> str:
    """Return the features that the kernel names of the first core, sorted; cores of one machine have the same."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join(sorted(value.split()))
    return platform.processor()
