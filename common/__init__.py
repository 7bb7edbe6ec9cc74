"""The leaf every package may import: errors, whole-file writing, the torchvision workaround.

Imports none of them.
"""
