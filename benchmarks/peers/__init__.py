"""What dora_diffusion costs, measured beside its peers in one process: `make bench` or `python -m benchmarks.peers`."""
