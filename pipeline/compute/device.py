"""Device and mixed precision of a run."""

import torch

from pipeline.errors import UserError

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> str:
    """Resolve `device: auto` to cuda if available, else cpu.

    Raises:
        UserError: cuda is configured but not available.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: found cuda, but torch sees no CUDA device; allowed here: auto, cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def precision(amp: str, device: str) -> str:
    """Resolve `training.amp: auto`: bf16 if the device has instructions for it, else no."""
    if amp != "auto":
        return amp
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else _cpu_has_bf16()
    return "bf16" if native else "no"


def autocast(amp: str, device: str) -> torch.autocast:
    """Autocast context of a forward pass, as configured by `training.amp`."""
    kind = precision(amp, device)
    return torch.autocast(device, dtype=AMP.get(kind), enabled=kind != "no")


def amp_warning(amp: str, device: str) -> str | None:
    """Return a warning if the CPU has to emulate `training.amp`."""
    x86 = torch.cpu.get_capabilities().get("architecture") == "x86_64"
    if amp == "bf16" and device == "cpu" and x86 and not _cpu_has_bf16():
        return "training.amp is bf16, which this CPU has no instructions for: training.amp=no is faster here"
    return None


def _cpu_has_bf16() -> bool:
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
