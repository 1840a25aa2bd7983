"""What every package may use and none is about: atomic files, pictures, text."""
