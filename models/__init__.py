"""Two towers, one space: image encoders, text encoders, CLIPModel."""

import common.torchvision_compat  # noqa: F401  (before timm and torchvision)
