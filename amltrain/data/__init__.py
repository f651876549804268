# each import registers an augmentation
from amltrain.data import mosaic  # noqa: F401
