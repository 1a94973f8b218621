"""Takes docs/app.png, the page of the demo with its first scene: `python docs/draw_app.py --model runs/demo/cloc`.

Needs the extras `app` and `dev`, and a Chromium, as `make test-app`.
"""

import argparse
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

from pixclip_hf.app.demo import load_demo

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent / "tests" / "app"))

from browser import opened, served  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/cloc", help="folder or Hub id")
    arguments = parser.parse_args()
    with served(load_demo(arguments.model)) as address, opened(address, width=1280, height=860) as (page, _):
        page.click("#compare")
        page.wait_for_selector("#scores .region")
        page.wait_for_timeout(2000)  # until nothing moves
        taken = Image.open(BytesIO(page.screenshot())).convert("RGB")
    # Flat colors: a palette loses nothing that shows, and a fifth of the bytes is left.
    taken.quantize(256, dither=Image.Dither.NONE).save(DOCS / "app.png", optimize=True)
    print(f"written: {DOCS / 'app.png'}")


if __name__ == "__main__":
    main()
