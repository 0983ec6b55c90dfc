"""Which device and dtype run fastest on this machine.

Source: torch.cuda and torch.backends; timed here where they do not say.
Taught in: notebook 01, section 2.
"""

import os

import torch


def device() -> torch.device:
    """CUDA if a kernel runs there, else MPS, else the CPU; $PEFT_MEASURED_DEVICE overrides.

    Raises:
        ValueError: the variable names no device, or one that does not work here.

    Taught in: notebook 01, section 2.
    """
    wanted = os.environ.get("PEFT_MEASURED_DEVICE")
    if wanted:
        return _wanted_device(wanted)
    found = (torch.device(kind) for kind in ("cuda", "mps") if _works(torch.device(kind)))
    return next(found, torch.device("cpu"))


def dtype() -> torch.dtype:
    """The dtype in which a frozen base runs fastest here: bfloat16 with hardware for it, or fp32.

    Half the bytes and about twice the speed on a processor with bf16 instructions; without them
    bfloat16 is emulated and slower than fp32.

    Taught in: notebook 01, section 2.
    """
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # oneDNN also says yes where it only emulates bf16, so the instruction itself is asked for
    native = device().type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def describe_device() -> str:
    """What `device()` chose, in one line.

    Raises:
        ValueError: as `device`.
    """
    chosen = device()
    if chosen.type == "cuda":
        card = torch.cuda.get_device_properties(chosen)
        return f"CUDA: {card.name}, {card.total_memory / 2**30:.1f} GiB"
    if chosen.type == "mps":
        return "MPS: the Apple GPU, which shares the machine's memory"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU: {torch.get_num_threads()} threads, {capability} instructions"


def _wanted_device(wanted: str) -> torch.device:
    try:
        chosen = torch.device(wanted.strip().lower())
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cuda", "mps", "cpu"):
        raise ValueError(
            f"PEFT_MEASURED_DEVICE is {wanted!r}, which is no device; use cpu, cuda, cuda:1 or mps."
        )
    if not _works(chosen):
        raise ValueError(
            f"PEFT_MEASURED_DEVICE asks for {wanted!r}, which does not work here; "
            "use cpu, or unset the variable."
        )
    return chosen


def _works(candidate: torch.device) -> bool:
    """Whether a kernel runs there: an old card counts as available and then fails."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not available.get(candidate.type, lambda: True)():
        return False
    try:
        return (torch.ones(2, device=candidate) + 1).sum().item() == 4
    except (RuntimeError, AssertionError):
        return False
