"""`python tests/browser/screenshots.py OUTPUTS`: the pictures of docs/images, from the first sweep of a store.

Make the sweep first, with warm caches:
python -m xlpk.run -m spec.block=1,2,4,8 sampling.max_new_tokens=64 run.outputs=OUTPUTS
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import pages
from playwright.sync_api import Page

IMAGES = Path(__file__).parents[2] / "docs" / "images"
BLOCKS = (1, 2, 4, 8)


def shoot(page: Page, name: str) -> None:
    page.wait_for_timeout(1500)  # for transitions
    page.mouse.move(0, 0)
    page.screenshot(path=IMAGES / f"{name}.png")


def main(outputs: Path) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with pages.xlpk_ui(outputs) as address, pages.browser() as page:
        page.set_viewport_size({"width": 1100, "height": 620})
        pages.open_runs(page, address)
        page.get_by_role("button", name="Toggle sidebar").click()
        pages.expand_parent(page, "sweep")
        page.get_by_role("link", name=f"spec.block={BLOCKS[0]}", exact=True).wait_for()
        shoot(page, "mlflow_runs")
        pages.open_charts(page, address, "throughput/tokens_per_s")
        shoot(page, "mlflow_charts")
        pages.open_runs(page, address)
        for block in BLOCKS[1:]:
            pages.select(page, f"spec.block={block}")
        pages.compare_selected(page)
        pages.scatter(page, "spec.block", "spec/acceptance_length")
        shoot(page, "mlflow_compare")
        pages.open_runs(page, address)
        pages.open_artifact(page, "spec.block=4", "text.txt")
        shoot(page, "mlflow_artifact")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
