"""Data sets, transforms and sampling for retrieval by unseen classes.

Importing this package needs torch and numpy only; Pillow, matplotlib, fontTools and scipy are imported where
used.
"""

from gcng.data.augmentation import GlyphAugmentation
from gcng.data.font_sets import render_hangul16, render_kanji16, save_glyphs
from gcng.data.glyphs import GlyphDataset, load_glyphs
from gcng.data.images import ClassFolder, ImageDataset
from gcng.data.letters import matplotlib_letters
from gcng.data.loader import ResumableLoader, seeded_randomness
from gcng.data.manifest import Manifest
from gcng.data.omniglot import omniglot
from gcng.data.photo_sets import CUB200, Cars196, InShop, StanfordOnlineProducts
from gcng.data.rendering import FontFace, GlyphGrid, merge_look_alikes, render_glyphs
from gcng.data.sampler import ClassBalancedBatchSampler
from gcng.data.splits import (
    ClassSubset,
    check_disjoint_classes,
    dataset_labels,
    select_classes,
    split_classes,
)
from gcng.data.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
    evaluation_transform,
    training_transform,
)

__all__ = [
    "CUB200",
    "Cars196",
    "CenterCrop",
    "ClassBalancedBatchSampler",
    "ClassFolder",
    "ClassSubset",
    "Compose",
    "FontFace",
    "GlyphAugmentation",
    "GlyphDataset",
    "GlyphGrid",
    "ImageDataset",
    "InShop",
    "Manifest",
    "Normalize",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "Resize",
    "ResumableLoader",
    "StanfordOnlineProducts",
    "ToTensor",
    "check_disjoint_classes",
    "dataset_labels",
    "evaluation_transform",
    "load_glyphs",
    "matplotlib_letters",
    "merge_look_alikes",
    "omniglot",
    "render_glyphs",
    "render_hangul16",
    "render_kanji16",
    "save_glyphs",
    "seeded_randomness",
    "select_classes",
    "split_classes",
    "training_transform",
]
