"""What `generate` is to draw: its options over what a recipe tells, checked before a base is loaded."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from dora_diffusion.cli.arguments import free_name, name_of_file, split_adapter
from dora_diffusion.functional.strengths import Weight
from dora_diffusion.generation.base_use import PARTS, BaseUse, PartUse, hash_of_source, hashed_parts
from dora_diffusion.generation.curves import Curve, parse_curve
from dora_diffusion.generation.generate import GenerationSettings, each_seed
from dora_diffusion.generation.img2img import DEFAULT_STRENGTH, Canvas
from dora_diffusion.generation.infotext import Parameters, settings_of
from dora_diffusion.generation.inputs import kept_name
from dora_diffusion.generation.png_metadata import AdapterUse, Origin, PictureRecord, picture_sha256
from dora_diffusion.generation.prompt_files import PromptLine, read_prompts
from dora_diffusion.generation.recipes import (
    check_picture_same,
    check_same,
    checked_file,
    find_named,
    read_mask,
    read_picture,
    told_by,
)
from dora_diffusion.utils.checks import check_whole
from dora_diffusion.utils.hardware import AUTO, DTYPES, device_of, is_here
from dora_diffusion.utils.text import shown_path

MOST_PICTURES = 10_000
_SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "width", "height", "sampler")


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter to load.

    Attributes:
        name: what it is loaded under.
        path: of its file.
        weight: its strength, or one for each part.
        sha256: what its file must have; None for one that was named on the command line.
        schedule: (progress, factor) points; None is constant.
        mask: where it draws; None is everywhere.
        mask_file: where that lies.
    """

    name: str
    path: Path
    weight: Weight
    sha256: str | None = None
    schedule: Curve | None = None
    mask: Image.Image | None = None
    mask_file: str | None = None


@dataclass(frozen=True)
class WordPlan:
    """A new word to load, and what its file must have; None for one that was named on the command line."""

    path: Path
    sha256: str | None = None


@dataclass(frozen=True)
class DrawingPlan:
    """All that decides the pictures.

    Attributes:
        lines: one for each picture.
        model: what the base is called.
        base: what is loaded, and by what device and dtype it draws; its files' hashes are known.
        adapters, blend: who takes part, and how they mix.
        words: new words.
        canvas: a picture to start from; None without one.
        origin: what the pictures are to say of canvas and base.
    """

    lines: tuple[PromptLine, ...]
    model: str
    base: BaseUse
    adapters: tuple[AdapterPlan, ...]
    blend: str
    words: tuple[WordPlan, ...]
    canvas: Canvas | None
    origin: Origin


def plan_of(arguments: argparse.Namespace) -> DrawingPlan:
    """Options and recipe as one plan.

    Raises:
        ValueError: one line: an option, or a line of a file of prompts, that is not understood; a file that is missing
            or not the one that the recipe tells.
    """
    told = _told(arguments.recipe, arguments.model)
    canvas, origin = _canvas(arguments, told)
    base = _base(arguments, told)
    return DrawingPlan(
        lines=_lines(arguments, told.settings, canvas),
        model=arguments.model or told.model,
        base=base,
        adapters=_adapters(arguments, told),
        blend=arguments.blend or told.blend,
        words=_words(arguments, told),
        canvas=canvas,
        origin=replace(origin, base=base),
    )


def _told(recipe: Path | None, model: str | None) -> PictureRecord:
    """What the recipe tells, or what holds without one; what cannot be done of it is printed, line by line."""
    if recipe is None:
        return PictureRecord(GenerationSettings(""), "pocket", (), "additive", Origin(), "")
    if not recipe.is_file():
        raise ValueError(f"--recipe {shown_path(recipe)}: no such file")
    told = told_by(recipe)
    if isinstance(told, PictureRecord):
        return told
    settings, notes = settings_of(told)
    for note in notes:
        print(f"{recipe.name}: {note}", file=sys.stderr)
    return PictureRecord(settings, _model_of(told, recipe, model), _tagged(told), "additive", Origin(), "")


def _model_of(told: Parameters, recipe: Path, model: str | None) -> str:
    name = told.facts.get("Model", "")
    if name and model is None:
        raise ValueError(f"{recipe.name}: was drawn with {name[:60]!r} and does not say where it lies; give --model")
    return name or "pocket"


def _tagged(told: Parameters) -> tuple[AdapterUse, ...]:
    """The tags of a text; the short hashes beside them are of tensors, and are not compared."""
    return tuple(AdapterUse(tag.name, None, tag.weight) for tag in told.tags)


def _lines(arguments: argparse.Namespace, told: GenerationSettings, canvas: Canvas | None) -> tuple[PromptLine, ...]:
    """A line for each picture: those of a file, or the one prompt, each with so many seeds."""
    given = {name: value for name in _SETTINGS if (value := getattr(arguments, name)) is not None}
    settings = replace(told, **given, strength=_strength(arguments.denoise, told, canvas))
    count = check_whole("--count", arguments.count, low=1, high=MOST_PICTURES)
    lines = [PromptLine("", settings)] if arguments.prompts is None else read_prompts(arguments.prompts, settings)
    if len(lines) * count > MOST_PICTURES:
        raise ValueError(f"--count {count} of {len(lines)} prompts: expected at most {MOST_PICTURES} pictures")
    return tuple(PromptLine(line.place, one) for line in lines for one in each_seed(line.settings, count))


def _strength(denoise: float | None, told: GenerationSettings, canvas: Canvas | None) -> float | None:
    if denoise is not None and canvas is None:
        raise ValueError("--denoise: there is no picture to draw anew; give one with --image")
    if denoise is not None and not 0 < denoise <= 1:
        raise ValueError(f"--denoise: got {denoise:g}, expected a number above 0 and up to 1")
    strength = told.strength if denoise is None else denoise
    return DEFAULT_STRENGTH if strength is None and canvas is not None else strength


def _base(arguments: argparse.Namespace, told: PictureRecord) -> BaseUse:
    """The base with its files; another --model replaces the recipe's whole, its own files included."""
    recorded = told.origin.base or BaseUse(told.model, device=AUTO)
    if arguments.model is not None:
        recorded = BaseUse(arguments.model, recorded.dtype, recorded.device)
    given = hashed_parts({part: getattr(arguments, part) for part in PARTS})
    kept = [_found_part(use, arguments.recipe) for use in recorded.parts if use.part not in {one.part for one in given}]
    sha256 = hash_of_source(recorded.source)
    check_same(Path(recorded.source), recorded.sha256, sha256, flag="--model")
    dtype = arguments.dtype or recorded.dtype
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: the recipe's is {dtype[:40]!r}, expected one of {', '.join(DTYPES)}; name one")
    return BaseUse(
        recorded.source,
        dtype,
        _device(arguments.device, recorded.device),
        arguments.model_config or recorded.config,
        sha256,
        (*kept, *given),
    )


def _found_part(use: PartUse, recipe: Path) -> PartUse:
    path = find_named(use.file, recipe)
    return PartUse(use.part, str(path), checked_file(path, use.sha256, flag=f"--{use.part}"))


def _device(given: str | None, recorded: str) -> str:
    """The one that is given, else the recipe's where it is here, else the best."""
    if given is not None:
        return device_of(given)
    found = device_of(recorded)
    if is_here(found):
        return found
    best = device_of(AUTO)
    print(f"recipe: drawn on {found}, which is not here: {best} draws the same up to rounding", file=sys.stderr)
    return best


def _canvas(arguments: argparse.Namespace, told: PictureRecord) -> tuple[Canvas | None, Origin]:
    """The picture to start from, and what the pictures are to say of it."""
    origin = told.origin
    image, image_file = _picture(arguments.image, origin.canvas, origin.canvas_file, arguments.recipe)
    mask, mask_file = _mask("--mask", arguments.mask, origin.canvas_mask, origin.canvas_mask_file, arguments.recipe)
    if image is None:
        if mask is not None:
            raise ValueError("--mask: there is no picture to draw in; give one with --image")
        return None, Origin()
    mask_sha256 = None if mask is None else picture_sha256(mask)
    named = Origin(picture_sha256(image), mask_sha256, canvas_file=image_file, canvas_mask_file=mask_file)
    return Canvas(image, mask), named


def _picture(
    given: Path | None, sha256: str | None, file: str | None, recipe: Path
) -> tuple[Image.Image | None, str | None]:
    path = given if given is not None or sha256 is None else _recorded(sha256, file, recipe, "--image")
    if path is None:
        return None, None
    image = read_picture(path, flag="--image")
    if given is None:
        check_picture_same(path, image, sha256, flag="--image")
    return image, str(path)


def _mask(
    flag: str, given: Path | None, sha256: str | None, file: str | None, recipe: Path
) -> tuple[Image.Image | None, str | None]:
    path = given if given is not None or sha256 is None else _recorded(sha256, file, recipe, flag)
    if path is None:
        return None, None
    mask = read_mask(path, flag=flag)
    if given is None:
        check_picture_same(path, mask, sha256, flag=flag)
    return mask, str(path)


def _recorded(sha256: str, file: str | None, recipe: Path, flag: str) -> Path:
    """Where a picture or mask of a recipe lies: older pictures tell its hash alone."""
    path = find_named(file or kept_name(sha256), recipe)
    if not path.is_file():
        raise ValueError(f"{shown_path(path)}: no such file, and the recipe needs it; name another by {flag}")
    return path


def _adapters(arguments: argparse.Namespace, told: PictureRecord) -> tuple[AdapterPlan, ...]:
    """The recipe's adapters, those of --adapter in the place of the ones so named, and then the others of --adapter."""
    given = [_Given.of(text) for text in arguments.adapter]
    curves = {name: parse_curve(text, name=f"--schedule {name}") for name, text in _pairs("schedule", arguments)}
    masks = {name: Path(text) for name, text in _pairs("mask_for", arguments)}
    plans: dict[str, AdapterPlan] = {}
    for use in told.adapters:
        instead = next((one for one in given if one.replaces(use)), None)
        if instead is not None:
            given.remove(instead)
        plans[use.name] = _of_recipe(use, instead, arguments.recipe, masks.pop(use.name, None))
    for one in given:
        name = free_name(name_of_file(one.path), plans)
        mask, mask_file = _mask(f"--mask-for {name}", masks.pop(name, None), None, None, one.path)
        plans[name] = AdapterPlan(name, one.path, one.strength, mask=mask, mask_file=mask_file)
    _check_names("mask-for", masks, plans)
    _check_names("schedule", [name for name in curves if name not in plans], plans)
    return tuple(replace(plan, schedule=curves.get(name, plan.schedule)) for name, plan in plans.items())


@dataclass(frozen=True)
class _Given:
    """An --adapter: its file, its strength, and whether that was written out."""

    path: Path
    strength: float
    is_told: bool

    @classmethod
    def of(cls, text: str) -> "_Given":
        path, strength = split_adapter(text)
        return cls(path, strength, str(path) != str(Path(text)))

    def replaces(self, use: AdapterUse) -> bool:
        """Whether an adapter of a recipe goes by this file's name: its own, its library's or its file's."""
        stems = {use.name, use.name.rpartition("/")[2], Path(use.file or use.name).stem}
        return self.path.stem in stems


def _of_recipe(use: AdapterUse, instead: _Given | None, recipe: Path, mask_file: Path | None) -> AdapterPlan:
    mask, mask_name = _mask(f"--mask-for {use.name}", mask_file, use.mask, use.mask_file, recipe)
    if instead is not None:
        weight: Weight = instead.strength if instead.is_told else use.weight
        return AdapterPlan(use.name, instead.path, weight, None, use.schedule, mask, mask_name)
    if use.file is None:
        raise ValueError(f"{recipe.name}: names the adapter {use.name[:60]!r} and not its file; give --adapter FILE")
    path = find_named(use.file, recipe)
    if not path.exists():
        raise ValueError(f"{shown_path(path)}: no such file, and the recipe needs it; name another by --adapter")
    return AdapterPlan(use.name, path, use.weight, use.sha256, use.schedule, mask, mask_name)


def _pairs(option: str, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """NAME=VALUE of a repeated option, each name once."""
    flag, pairs = f"--{option.replace('_', '-')}", list[tuple[str, str]]()
    for text in getattr(arguments, option):
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            shape = "NAME=FILE, such as ink=left.png" if option == "mask_for" else "NAME=CURVE, such as ink=0:0,.3:1"
            raise ValueError(f"{flag} {text}: expected {shape}")
        if name in dict(pairs):
            raise ValueError(f"{flag} {text}: {name!r} is given twice; leave one")
        pairs.append((name, value))
    return pairs


def _check_names(option: str, names: Sequence[str] | Mapping[str, object], plans: Mapping[str, AdapterPlan]) -> None:
    """A ValueError for the first name that no adapter has."""
    unknown = next(iter(names), None)
    if unknown is not None:
        raise ValueError(f"--{option} {unknown}: no adapter named {unknown!r}; there are {', '.join(plans) or 'none'}")


def _words(arguments: argparse.Namespace, told: PictureRecord) -> tuple[WordPlan, ...]:
    if arguments.words:
        return tuple(WordPlan(Path(path)) for path in arguments.words)
    plans = []
    for use in told.words:
        if use.file is None:
            raise ValueError(
                f"{arguments.recipe.name}: names the word {use.word!r} and not its file; give --words FILE"
            )
        path = find_named(use.file, arguments.recipe)
        checked_file(path, use.sha256 or None, flag="--words")
        plans.append(WordPlan(path, use.sha256 or None))
    return tuple(plans)
