"""Scores of bases and adapters, and the grids of pictures that go with them."""
