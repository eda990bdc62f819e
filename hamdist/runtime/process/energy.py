"""Energy that this machine's processors have used, where the kernel counts it (RAPL, powercap)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


def joules_from_now() -> Callable[[], float | None]:
    """Return a function that says how many joules all packages have used since, for whomever.

    It returns None where the kernel does not count or show them. A counter that has come round
    once is put right.
    """
    begun = _readings()

    def joules() -> float | None:
        now = _readings()
        used = [(now[name][0] - at) % most for name, (at, most) in begun.items() if name in now]
        return sum(used) * 1e-6 if used else None

    return joules


def _readings() -> dict[str, tuple[int, int]]:
    """Return by package its microjoules, and those at which its counter begins anew."""
    readings = {}
    for folder in POWERCAP.glob("*:*"):
        try:
            if (folder / "name").read_text().startswith("package"):
                files = (folder / name for name in ("energy_uj", "max_energy_range_uj"))
                used, most = (int(file.read_text()) for file in files)
                readings[folder.name] = used, most
        except (OSError, ValueError):  # (only root may read it; a part without a counter)
            continue
    return readings
