"""How far two pictures are apart."""

from PIL import Image, ImageChops


def largest_difference(first: Image.Image, second: Image.Image) -> int:
    """The largest difference of two pictures in any channel of any pixel, 0 to 255.

    Raises:
        ValueError: they are not of one size.
    """
    if first.size != second.size:
        sizes = " and ".join(f"{picture.width} x {picture.height}" for picture in (first, second))
        raise ValueError(f"pictures of {sizes} pixels cannot be compared; draw both in one size")
    bands = ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getextrema()
    return max(int(high) for _, high in bands)  # type: ignore[misc]
