"""The version, in the one place that has it: pyproject.toml, files and pictures read it from here."""

__version__ = "0.1.0"
