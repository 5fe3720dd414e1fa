"""`python -m xlpk.layout` writes kernels/generated/layout.h of this checkout; tests refuse one that is stale."""

from __future__ import annotations

from pathlib import Path

from xlpk.layout.header import render

HEADER = Path(__file__).resolve().parents[2] / "kernels" / "generated" / "layout.h"


def main() -> None:
    HEADER.write_text(render())


if __name__ == "__main__":
    main()
