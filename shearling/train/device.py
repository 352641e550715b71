"""What a device can do at most, and what of its memory was taken.

Peaks are of dense bfloat16 products summed in float32, from the vendor's data sheets (NVIDIA's of each product, its
Ampere, Ada and Blackwell white papers for the GeForce cards, halved where only a figure with sparsity is given).
V100 and T4 have no bfloat16: theirs are of float16.
"""

import re
import resource
import sys

import torch

# By the words that a device's name has, the more telling ones first. In FLOP/s.
PEAKS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989.5e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.5e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX A6000", 154.8e12),
    ("RTX 6000 Ada", 364.2e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71.2e12),
    ("V100 PCIE", 112e12),
    ("V100", 125e12),
    ("T4", 65e12),
)
OTHERS = {"mig", "laptop", "ti", "d", "max"}  # words of names that are near to one above, of something slower or faster


def peak_flops_of(name: str) -> float | None:
    """FLOP/s that a CUDA device of this name can do at most; None where that isn't known."""
    words = set(re.split(r"[\s-]+", name.lower()))
    if words & OTHERS:
        return None
    return next((flops for known, flops in PEAKS if set(known.lower().split()) <= words), None)


def peak_flops(device: torch.device) -> float | None:
    """The same of a device here. None for what isn't a CUDA device."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_bytes(device: torch.device) -> int:
    """The most memory that was taken there so far: on a GPU of tensors, on a CPU by the whole process.

    On MPS, which doesn't keep the most, what is taken now.
    """
    if device.type == "cpu":
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024  # where Linux counts in KiB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return torch.accelerator.max_memory_allocated(device)
