"""`bn-c image`: a picture as the tensor that a network takes."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
from numpy.lib import format as npy

import bn_c
from bn_c.commands import CommandError, extra, files, output, positive

EXAMPLE = "bn-c image photo.jpg -o tensor.npy --preset imagenet --size 224"
PRESETS = ("imagenet", "unit", "symmetric")


def decoded(path: str) -> Any:
    """A Pillow image of 8-bit RGB, the way up that its camera noted."""
    image_module, operations = extra("PIL.Image", "cli"), extra("PIL.ImageOps", "cli")
    with files.telling(path), image_module.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise CommandError(f"{path}: expected 8 bits a channel, got mode {image.mode}")
        return operations.exif_transpose(image).convert("RGB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bn-c image`."""
    parser.description = "Decodes a picture and writes it as float32 (3, H, W), in RGB, normalised."
    parser.add_argument("picture", metavar="PICTURE", help="a file that Pillow reads")
    tensor = partial(output, suffix=".npy")
    parser.add_argument("-o", "--output", type=tensor, required=True, metavar="FILE.npy", help="the tensor")
    parser.add_argument("--preset", choices=PRESETS, required=True, help="the mean and std of ImageNet; 0..1; -1..1")
    parser.add_argument("--size", type=positive, help="resize the shorter side to this and cut out the central square")


def main(options: argparse.Namespace) -> None:
    """Writes the tensor."""
    image = decoded(options.picture)
    if options.size:
        fit, bilinear = extra("PIL.ImageOps", "cli").fit, extra("PIL.Image", "cli").Resampling.BILINEAR
        image = fit(image, (options.size, options.size), method=bilinear)
    tensor = getattr(bn_c.ImageNormalizer, options.preset)()(np.asarray(image))
    with files.replacing(options.output) as stream:
        npy.write_array(stream, tensor, allow_pickle=False)
