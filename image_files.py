"""Image files, as people have them. A first reading can skip this file.

Which files are images, and the upright RGB picture of 8 bits in each. `crop_file` does with Pillow what
augment.py does with a batch.

    python -c "from image_files import read_image; read_image('photo.jpg').save('photo.png')"
"""

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

import augment
from augment import keyed_generator, pad_and_crop, random_boxes
from launch import UserError

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long note does not spoil a PNG
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that size is refused
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # the picture is fine

HIDDEN = re.compile(r"[/\\](\.|__MACOSX)")  # .DS_Store, .ipynb_checkpoints, ._cat.jpg and the like
ENDINGS = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")
ENDINGS += (".avif",) if ".avif" in Image.registered_extensions() else ()  # older Pillows read none


def find_images(folder: Path) -> tuple[list[str], list[str]]:
    """All images below a folder, sorted, and the other files there; their endings tell them apart.

    Links to files count, links to folders below it do not: an image would come twice, or of two classes.
    """
    paths = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
    files = sorted(path for path in paths if not HIDDEN.search(path, len(str(folder))))
    images = [path for path in files if path.lower().endswith(ENDINGS)]
    return images, sorted(set(files) - set(images))


def read_image(path: str | Path, enough: int | None = None) -> Image.Image:
    """The picture in a file, upright and RGB with 8 bits; transparent parts lie on white, as on a page.

    Gray of more than 8 bits is scaled by its range: the least of 8, 12 and 16 bits that holds its maximum. A
    JPEG of 2, 4 or 8 times `enough` pixels a side is decoded at a half, a quarter or an eighth of its size,
    in less time. Raises UserError for a file that cannot be read.
    """
    try:
        with Image.open(path) as image:
            if enough is not None:
                image.draft("RGB", (enough, enough))
            image.load()
            with suppress(Exception):  # a damaged EXIF block can make Pillow raise anything
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":  # gray of more than 8 bits, whose values above 255 convert would clip
                values = np.asarray(image)
                if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise ValueError("its values have no known range; save it with 8 or 16 bits")
                bits = next(bits for bits in (8, 12, 16) if values.max() < 2**bits)
                image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
            if image.getbands()[-1] in ("A", "a") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Image.DecompressionBombError as error:
        remedy = "reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS in image_files.py"
        raise UserError(f"{path} has more pixels than Pillow holds for safe; {remedy}") from error
    except Exception as error:  # a damaged file can make the reader raise anything
        raise UserError(f"{path} is not a readable image: {' '.join(str(error).split())}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_file(image: Image.Image, size: int, key: tuple | None) -> Tensor:
    """`random_crop` (with a key) or `center_crop` (without), done by Pillow: uint8 (3, size, size)."""
    if key is not None:
        generator = keyed_generator(*key)
        if image.size == (size, size) and size <= augment.SMALL_IMAGE:
            return pad_and_crop(to_tensor(image)[None], generator)[0]
        top, left, height, width = random_boxes(1, image.height, image.width, generator)[0].tolist()
        image = image.crop((left, top, left + width, top + height))
        return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))
    if image.size == (size, size):
        return to_tensor(image)
    image = image.resize(augment.resize_size(*image.size, size=size), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))
