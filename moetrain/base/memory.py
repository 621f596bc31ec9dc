"""How this process uses the C library's heap."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_NEVER = -1


def keep_freed_memory() -> bool:
    """Asks the C library to keep what is freed, instead of handing it back to the system and taking it again zeroed, page by page.

    A training step on CPUs frees and takes hundreds of megabytes. Blocks of a gigabyte and more still go back. False, and nothing
    happens, where the C library has no such wish (musl, macOS).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    kept = next((size for size in (1 << 30, 32 << 20) if mallopt(_MMAP_THRESHOLD, size)), 0)  # older ones know 32 MiB at most
    return bool(kept and mallopt(_TRIM_THRESHOLD, _NEVER))
