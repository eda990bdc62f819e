"""Energy that this machine's processors have used, where the kernel counts it (RAPL, powercap)."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts joules of all packages of this machine from now on, whoever uses them.

    A counter that has come round once is put right; the kernel's comes round in minutes to hours.
    """

    def __init__(self) -> None:
        self._begun = _readings()

    def joules(self) -> float | None:
        """Return the joules since the start; None where the kernel does not count or show them."""
        now = _readings()
        both = [
            (now[name][0] - used, most) for name, (used, most) in self._begun.items() if name in now
        ]
        return sum(d if d >= 0 else d + most for d, most in both) * 1e-6 if both else None


def _readings() -> dict[str, tuple[int, int]]:
    """Return by package its microjoules, and those at which its counter begins anew."""
    readings = {}
    for folder in sorted(POWERCAP.glob("*:*")):
        try:
            name = (folder / "name").read_text().strip()
            used = int((folder / "energy_uj").read_text())
            most = int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):  # (only root may read it; a part without a counter)
            continue
        if name.startswith("package"):
            readings[folder.name] = used, most
    return readings
