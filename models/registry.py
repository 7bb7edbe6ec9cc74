"""Names of encoders -> functions that build them. A new encoder is one file and one import in models/clip.py.

An image builder takes (weights, img_size) and returns an `ImageTower`; see models/image_encoders.py.
A text builder takes (weights,) and returns a `TextTower`; see models/text_encoders.py.
`weights` is "pretrained", "none", a path, or "auto": none for starnet_dual_pyramid_rcf and bert-tiny-bytes,
else pretrained. Where no weights are published, "pretrained" raises UserError.
"""

from collections.abc import Callable
from typing import Any

Builder = Callable[..., Any]

IMAGE_ENCODERS: dict[str, Builder] = {}
STRIDES: dict[str, int] = {}  # of image encoders: images need a multiple of so many pixels
TEXT_ENCODERS: dict[str, Builder] = {}


def register(registry: dict[str, Builder], name: str, stride: int = 1) -> Callable[[Builder], Builder]:
    """Decorator that enters a builder under `name`, and an image encoder's stride. Raises ValueError when the
    name is taken.
    """

    def enter(builder: Builder) -> Builder:
        if name in registry:
            raise ValueError(f"encoder {name!r} is registered twice")
        registry[name] = builder
        if registry is IMAGE_ENCODERS:
            STRIDES[name] = stride
        return builder

    return enter
