"""Pictures and masks as a browser sends them: opened only when they are no larger than what is drawn here."""

from pathlib import Path

from PIL import Image

from dora_diffusion.generation.generate import Canvas
from dora_diffusion.utils.images import read_image
from dora_diffusion.utils.text import shown_value
from ui.backend.checks import MAX_SIDE

MAX_INPUT_SIDE = 4 * MAX_SIDE


def check_canvas(image: object, mask: object = None) -> Canvas | None:
    """A picture to start from, and where it is drawn anew; None without a picture. Masks are white there.

    Raises:
        ValueError: not a picture, or a mask without a picture to draw in.
    """
    picture, area = check_picture("picture", image), check_picture("mask", mask)
    if picture is None and area is not None:
        raise ValueError("mask: there is no picture to draw in; give one, or take the mask off")
    if picture is None:
        return None
    return Canvas(picture.convert("RGB"), None if area is None else area.convert("L"))


def check_picture(name: str, value: object) -> Image.Image | None:
    """A picture out of a widget: PIL, or a path that Gradio gave to an upload. None stays None.

    Raises:
        ValueError: not a picture, or one with more pixels than are drawn here at most.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str | Path):
        try:
            with Image.open(value, formats=["PNG", "JPEG", "WEBP"]) as opened:
                size = opened.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name}: not a picture that can be read ({type(error).__name__})") from None
        _check_pixels(name, size)
        try:
            return read_image(value)  # turned and laid on white as everywhere
        except ValueError as error:
            reason = str(error).rpartition(f"{Path(value).name}: ")[2]
            raise ValueError(f"{name}: not a picture that can be read ({reason})") from None
    if not isinstance(value, Image.Image):
        raise ValueError(f"{name}: got {shown_value(value)}, expected a picture")
    _check_pixels(name, value.size)
    return value


def _check_pixels(name: str, size: tuple[int, int]) -> None:
    if not all(0 < side <= MAX_INPUT_SIDE for side in size):
        raise ValueError(f"{name}: got {size[0]} x {size[1]} pixels, expected at most {MAX_INPUT_SIDE} a side")
