"""The published models at their real size, without weights: `python -m benchmarks.full_size`."""
