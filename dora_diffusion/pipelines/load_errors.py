"""What loading a base can end in, whoever's fault it is."""

from safetensors import SafetensorError

# What diffusers and transformers raise on folders and files that are not what they should be.
LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError),
    SafetensorError,
)
