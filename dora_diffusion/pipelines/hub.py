"""A base from the hub: its files in the local cache, fetched when they are not there yet."""

from collections.abc import Sequence
from pathlib import Path

from dora_diffusion.pipelines.load_errors import LOAD_ERRORS
from dora_diffusion.pipelines.variants import holds_weights
from dora_diffusion.utils.quiet import errors_only
from dora_diffusion.utils.text import first_line


def may_be_hub_id(name: str) -> bool:
    """Whether a base's name can be `owner/name` or `owner/name@revision`."""
    repository, at, revision = name.partition("@")
    is_id = repository.count("/") == 1 and not name.startswith((".", "/", "~", "-")) and "\\" not in name
    return is_id and bool(revision) == bool(at)


def from_hub(name: str, variants: Sequence[str | None]) -> Path:
    """The local copy of a hub repository, fetched when it is not there yet.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        variants: of the weights, the first that is there is fetched, and no other; empty for the configs alone.

    Raises:
        ValueError: one line, whether offline, refused or unknown.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    at = revision or None
    try:
        if not variants:
            return Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*.model"], revision=at))
        with errors_only("diffusers.pipelines.pipeline_utils"):  # that the hub is away is said once, by us
            why = ValueError("it holds no safetensors weights")
            for variant in variants:
                try:
                    fetched = DiffusionPipeline.download(
                        repository, use_safetensors=True, trust_remote_code=False, variant=variant, revision=at
                    )
                except ValueError as error:  # there is no such variant, or the whole is not to be had
                    why = error
                    continue
                if holds_weights(Path(fetched)):
                    return Path(fetched)
            raise why
    except LOAD_ERRORS as error:
        raise ValueError(f"model {name!r}: no such folder here, and {_hub_trouble(error)}") from None


def _hub_trouble(error: BaseException) -> str:
    """Why the hub gave nothing, in words."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if HF_HUB_OFFLINE:
        return "the hub may not be asked (HF_HUB_OFFLINE is set): unset it, or give a local folder"
    causes = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return "the hub wants its licence accepted and a login first: hf auth login"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "the hub has none of that name, or none that this login may see"
    offline = isinstance(causes[-1], OSError) and not any(isinstance(cause, HfHubHTTPError) for cause in causes)
    if offline:
        return f"the hub cannot be reached (offline): {first_line(causes[-1])}"
    return f"the hub did not give it: {first_line(error)}"
