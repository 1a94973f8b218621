"""What one visitor of the demo has drawn, and what a click changes about it. Without Gradio."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .drawing import shown_scale
from .predictions import Region, box_of_corners

# What a click on the image means.
BOX, NEW_POINT, ALSO_ON, BESIDE = "Corner of a box", "Point", "One more point on it", "Point beside it"


@dataclass(frozen=True)
class Session:
    """An image with its regions.

    Args:
        image: RGB.
        regions: in its pixels.
        corner: the first corner of a box whose second one is still to come.
        scene: the index of the drawn scene that comes next.
    """

    image: Image.Image | None = None
    regions: tuple[Region, ...] = ()
    corner: tuple[float, float] | None = None
    scene: int = 0

    def with_image(self, image: Image.Image | None) -> "Session":
        """Another image, without regions."""
        return Session(image, scene=self.scene)

    def with_region(self, region: Region) -> "Session":
        """One more region."""
        return replace(self, regions=(*self.regions, region), corner=None)

    def without_last(self) -> "Session":
        """Without the corner that was clicked last, or else without the last region."""
        if self.corner is not None:
            return replace(self, corner=None)
        return replace(self, regions=self.regions[:-1])

    def opened_image(self) -> Image.Image:
        """The image.

        Raises:
            ValueError: there is none.
        """
        if self.image is None:
            raise ValueError("There is no image: drop one, or draw a scene.")
        return self.image

    def clicked(self, x: float, y: float, meaning: str) -> "Session":
        """What a click does.

        Args:
            x, y: in pixels of the image as it is shown.
            meaning: `BOX`, `NEW_POINT`, `ALSO_ON` or `BESIDE`.

        Raises:
            ValueError: no image, or a further point where the last region is none of points.
        """
        size = self.opened_image().size
        scale = shown_scale(size)
        # A click says a pixel; its middle is inside of the image.
        spot = float(np.clip((x + 0.5) / scale, 0, size[0])), float(np.clip((y + 0.5) / scale, 0, size[1]))
        if meaning == BOX:
            if self.corner is None:
                return replace(self, corner=spot)
            return self.with_region(Region(box=box_of_corners(self.corner, spot, size)))
        if meaning == NEW_POINT:
            return self.with_region(Region(points=(spot,), point_labels=(1,)))
        if not self.regions or self.regions[-1].kind != "point":
            raise ValueError("There is no region of points to add to: click its first point before.")
        last = self.regions[-1]
        added = Region(points=(*last.points, spot), point_labels=(*last.point_labels, int(meaning == ALSO_ON)))
        return replace(self, regions=(*self.regions[:-1], added), corner=None)

    @property
    def summary(self) -> str:
        """What is drawn, in words."""
        if self.image is None:
            return "Drop an image above, or draw a scene."
        if self.corner is not None:
            return "Click the opposite corner of the box."
        if not self.regions:
            return "Draw a region: click two opposite corners of a box."
        count = len(self.regions)
        return f"{count} region{'s' * (count > 1)} of an image of {self.image.width} × {self.image.height} pixels."
