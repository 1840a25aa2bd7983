"""Load a base: an embedded one, a folder in diffusers' layout, a single-file checkpoint, or a hub id.

What a base brings is data: weights come from safetensors, and code that it names or ships is never run. The family is
found later, from the pipeline's class and config; no name of a file, folder or repository decides anything.
"""

import contextlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from dora_diffusion.families import FAMILIES
from dora_diffusion.formats import pickles
from dora_diffusion.formats.safetensors_reader import read_header
from dora_diffusion.pipelines.base_weights import EMBEDDED as EMBEDDED
from dora_diffusion.pipelines.base_weights import POCKET as POCKET
from dora_diffusion.pipelines.base_weights import POCKET_DIT as POCKET_DIT
from dora_diffusion.pipelines.component_files import load_component
from dora_diffusion.pipelines.hub import from_hub, may_be_hub_id
from dora_diffusion.pipelines.load_errors import LOAD_ERRORS
from dora_diffusion.pipelines.quantise import check_library, quantise_pipeline
from dora_diffusion.pipelines.variants import variant_of, variants_for
from dora_diffusion.utils.hardware import device_of
from dora_diffusion.utils.quiet import errors_only, quietly
from dora_diffusion.utils.text import first_line, shown_path

Offload = Literal["model", "sequential"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)


def load_pipeline(  # noqa: PLR0913 -- each is one fact of a base, by the names that diffusers gives its components
    source: str | Path = "pocket",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    config: str | Path | None = None,
    offload: Offload | None = None,
    transformer: str | Path | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    quantise: str | Mapping[str, str] | None = None,
) -> Any:
    """A diffusers pipeline, ready to draw.

    Args:
        source: the name of an embedded base ("pocket", "pocket-dit"), a folder in diffusers' layout, a single
            `.safetensors` file in its original layout, or a hub id such as `owner/name` or `owner/name@revision`. Of
            weights in several variants (fp16, bf16, fp32) the one that fits `dtype` is taken.
        dtype: of the weights in memory.
        device: "cpu", "cuda", "xpu", "mps", or "auto": the first of cuda, xpu, mps and cpu that is here.
        config: for a single file only: a diffusers folder or hub id of the same architecture, whose configs and
            tokenizers are used, and whose weights where the file has none (a file of the denoiser alone). None asks
            the hub for the base that the file's tensors look like.
        offload: None keeps everything on `device`. "model" keeps weights in main memory and brings one component at a
            time over; "sequential" one layer at a time, far slower; adapters cannot be fused then.
        transformer: a file with the transformer's weights, in place of the base's own: `.safetensors` in diffusers'
            names or the makers', fp8 with scales too, or `.gguf` (pip install gguf), which stays quantised.
        unet: the same for a UNet.
        vae: the same for a VAE.
        quantise: "nf4" (pip install bitsandbytes), "int8" or "fp8" (pip install torchao) for the denoiser's linear
            layers, or {"transformer": "nf4", "text_encoder_2": "int8"}. Adapters draw and train beside them; they
            cannot be fused.

    Raises:
        ValueError: one line that says what was looked for, what is there and how to mend it.

    Examples:
        ```python
        import torch

        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket", dtype=torch.bfloat16)
        picture = pipe("a noto style rocket on the beach", num_inference_steps=4).images[0]
        ```
    """
    device = device_of(device)
    _check_device(device, offload)
    files = {"transformer": transformer, "unet": unet, "vae": vae}
    given = {name: Path(file) for name, file in files.items() if file is not None}
    check_library(quantise)
    with quietly():
        pipe = _load(source, dtype, config, given)
        if quantise is not None:
            quantise_pipeline(pipe, quantise)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _check_device(device: str, offload: str | None) -> None:
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {first_line(error)}") from None
    if offload is not None and offload not in OFFLOADS:
        raise ValueError(f"offload {offload!r} is unknown: expected None or one of {', '.join(OFFLOADS)}")
    if offload is not None and kind == "cpu":
        raise ValueError(
            f"offload {offload!r} spares an accelerator's memory, and device is 'cpu': name one, or leave it"
        )


def _load(source: str | Path, dtype: torch.dtype, config: str | Path | None, files: Mapping[str, Path]) -> Any:
    name = str(source)
    path = EMBEDDED.get(name, Path(source))
    if path.is_file() or (path.suffix in (".safetensors", *pickles.SUFFIXES) and not path.is_dir()):
        if files:
            raise ValueError(f"model {name!r}: {min(files)} beside a single file; give a folder as the base")
        return _from_file(path, dtype, config)
    if config is not None:
        raise ValueError(f"model {name!r} takes no config: only a single .safetensors file needs one, got {config}")
    if path.is_dir():
        return _from_folder(path, dtype, files)
    if name in EMBEDDED:
        raise ValueError(f"model {name!r}: {path} is not there; this installation came without that base")
    if not may_be_hub_id(name):
        raise ValueError(
            f"model {name!r}: no such folder; expected {', '.join(map(repr, EMBEDDED))}, a diffusers folder, "
            "a .safetensors file or a hub id"
        )
    return _from_folder(from_hub(name, variants_for(dtype)), dtype, files)


def configs_of(source: str | Path) -> Path | None:
    """The folder with a base's configs, without its weights where the hub has to be asked; None for a single file.

    Raises:
        ValueError: one line that says what was looked for and what is there.
    """
    path = EMBEDDED.get(str(source), Path(source))
    if path.is_dir():
        return path
    is_file = path.is_file() or path.suffix in (".safetensors", *pickles.SUFFIXES)
    is_hub_id = str(source) not in EMBEDDED and not is_file and may_be_hub_id(str(source))
    return from_hub(str(source), ()) if is_hub_id else None


def _from_folder(folder: Path, dtype: torch.dtype, files: Mapping[str, Path]) -> Any:
    from diffusers import DiffusionPipeline

    index = read_index(folder)
    given = {name: _from_own_file(folder, name, file, index, dtype) for name, file in files.items()}
    try:
        return DiffusionPipeline.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            variant=variant_of(folder, dtype),
            **dict.fromkeys(_left_out(folder)),
            **given,
        )
    except LOAD_ERRORS as error:
        raise ValueError(f"model {str(folder)!r} could not be loaded from the folder: {first_line(error)}") from None


def _from_own_file(
    folder: Path, name: str, file: Path, index: Mapping[str, tuple[str, str]], dtype: torch.dtype
) -> nn.Module:
    import diffusers

    if name not in index:
        known = ", ".join(part for part in index if part in ("transformer", "unet", "vae"))
        raise ValueError(f"model {str(folder)!r} has no {name}, got {name}={file}; it has {known}")
    return load_component(getattr(diffusers, index[name][1]), file, folder / name, dtype)


def _left_out(folder: Path) -> list[str]:
    """Components that a folder says it has not, such as Stable Diffusion 3's T5; diffusers wants to be told again."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    empty = [part for part, entry in index.items() if entry == [None, None]]
    return [part for part in empty if part.startswith(("text_encoder", "tokenizer"))]


def read_index(folder: Path) -> Mapping[str, tuple[str, str]]:
    """Component -> (library, class) of a folder's model_index.json, and its pipeline's class under `_class_name`.

    Raises:
        ValueError: there is none, or it names code that is not diffusers' or transformers' own.
    """
    import diffusers

    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no model_index.json there; expected a folder in diffusers' layout")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({first_line(error)})") from None
    name = index.get("_class_name") if isinstance(index, dict) else None
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{path}: _class_name is {name!r}, expected a pipeline of diffusers {diffusers.__version__}; "
            "code that a model brings is never run"
        )
    components = {"_class_name": ("diffusers", str(name))}
    for part, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry):
            library, class_name = entry
            _refuse_own_code(path, part, library, class_name)
            components[part] = (library, class_name)
    return components


def _refuse_own_code(path: Path, part: str, library: str, class_name: str) -> None:
    """A class that is named outright is its library's own; an Auto class looks into the folder for which to take."""
    from diffusers import pipelines

    if library not in ("diffusers", "transformers") and not hasattr(pipelines, library):
        own = f"{library}.{class_name}"
    elif class_name.startswith("Auto") and any(_names_code(folder) for folder in (path.parent, path.parent / part)):
        own = "auto_map"
    else:
        return
    raise ValueError(f"{path}: {part} is code of its own ({own}); code that a model brings is never run")


def _names_code(folder: Path) -> bool:
    for file in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # unreadable: names nothing
            if "auto_map" in json.loads(file.read_text(encoding="utf-8")):
                return True
    return False


def _from_file(path: Path, dtype: torch.dtype, config: str | Path | None) -> Any:
    """A pipeline from one file: what the file holds comes from it, everything else from `config`."""
    import diffusers
    from diffusers.loaders import FromSingleFileMixin
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    header = _checked_header(path)
    origin = str(EMBEDDED.get(str(config), config)) if config is not None else _origin(path, header)
    folder = _config_folder(path, origin, is_given=config is not None)
    index = dict(read_index(folder))
    pipeline = getattr(diffusers, index.pop("_class_name")[1])
    if not issubclass(pipeline, FromSingleFileMixin):
        raise ValueError(f"{path}: diffusers loads no {pipeline.__name__} from a single file; give a diffusers folder")
    try:
        others = _components_beside(header, index, origin, dtype)
        with errors_only("diffusers.models.modeling_utils"):  # it warns of an empty list of modules kept in fp32
            pipe = pipeline.from_single_file(
                str(path), config=str(folder), dtype=dtype, local_files_only=True, **others
            )
    except (*LOAD_ERRORS, SingleFileComponentError) as error:
        raise ValueError(f"{path} is no {pipeline.__name__} like {origin}: {_misfit(error)}") from None
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    _check_filled(path, models, origin)
    for model in models.values():
        model.eval()  # diffusers forgets it for a T5 of a single file, whose dropout would act
    return pipe


def _misfit(error: BaseException) -> str:
    """What diffusers found wrong, without its advice, which is for those who call it."""
    if isinstance(error, NotImplementedError):  # a weight still on the meta device is to be moved
        return "it lacks weights that this architecture has"
    return first_line(error).split(" If you want")[0]


def _checked_header(path: Path) -> Mapping[str, Any]:
    """The header of a checkpoint; a ValueError for anything that is none."""
    if not path.is_file():
        raise ValueError(f"model {str(path)!r}: no such file")
    if path.suffix in pickles.SUFFIXES:
        raise ValueError(pickles.refusal(shown_path(path)))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file, a diffusers folder or a hub id")
    header = {key: entry for key, entry in read_header(path).items() if key != "__metadata__"}
    if any("lora" in key or "lycoris" in key for key in header):
        raise ValueError(f"{path} is an adapter, no base model: load its base, then this with load_adapter (--adapter)")
    return header


def _origin(path: Path, header: Mapping[str, Any]) -> str:
    """The hub id of the base that a file's tensors look like to diffusers."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    shapes = {key: torch.empty(entry["shape"], device="meta") for key, entry in header.items()}
    try:
        kind = infer_diffusers_model_type(shapes)
    except (LookupError, RuntimeError, ValueError, NameError):
        kind = "unknown"
    # "v1" is also what it answers when nothing fits
    is_known = kind != "v1" or any(key.startswith("model.diffusion_model.input_blocks.") for key in header)
    if kind not in DIFFUSERS_DEFAULT_PIPELINE_PATHS or not is_known:
        raise ValueError(
            f"{path}: no checkpoint layout known to diffusers; name its base: config=FOLDER (--model-config)"
        )
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def _config_folder(path: Path, origin: str, *, is_given: bool) -> Path:
    if Path(origin).is_dir():
        return Path(origin)
    if not may_be_hub_id(origin):
        raise ValueError(f"config {origin!r}: no such folder; expected a diffusers folder or a hub id")
    try:
        return from_hub(origin, ())
    except ValueError as error:
        if is_given:
            raise
        raise ValueError(
            f"{path} needs configs that are not in it: {error}; or name a folder: config=FOLDER (--model-config)"
        ) from None


def _components_beside(
    keys: Mapping[str, Any], index: Mapping[str, tuple[str, str]], origin: str, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The models that a pipeline needs and the file has not: many files hold the denoiser alone."""
    from diffusers import pipelines

    # the denoiser is what a file is for, and diffusers itself leaves the safety checker out
    apart = {family.denoiser.name for family in FAMILIES} | {"safety_checker"}
    found = {}
    for name, (library, class_name) in index.items():
        module = getattr(pipelines, library, None) or importlib.import_module(library)
        kind = getattr(module, class_name)
        is_wanted = isinstance(kind, type) and issubclass(kind, nn.Module) and name not in apart
        if is_wanted and not _holds(keys, name, kind):
            found[name] = _pretrained(kind, origin, name, dtype)
    return found


def _holds(keys: Mapping[str, Any], name: str, kind: type) -> bool:
    """Whether a file has the weights of a component, by diffusers' own signs."""
    from diffusers.loaders import single_file_utils as signs

    if name == "vae":
        return any(key.startswith(tuple(signs.LDM_VAE_KEYS)) for key in keys)
    if kind.__name__.startswith("T5"):
        return bool(signs.is_t5_in_single_file(keys))
    return bool(signs.is_clip_model_in_single_file(kind, keys))


def _pretrained(kind: Any, origin: str, name: str, dtype: torch.dtype) -> nn.Module:
    try:
        model: nn.Module = kind.from_pretrained(origin, subfolder=name, dtype=dtype, use_safetensors=True)
        return model
    except OSError as error:
        raise ValueError(f"the file holds no {name}, nor does its config: {first_line(error)}") from None


def _check_filled(path: Path, models: Mapping[str, nn.Module], origin: str) -> None:
    """Refuse models with weights that came from nowhere."""
    for name, model in models.items():
        missing = [key for key, weight in model.named_parameters() if weight.is_meta]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} weights of {name} (such as {missing[0]}); has {origin} its architecture?"
            )
