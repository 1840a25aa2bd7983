"""What only a GPU can tell, in under ten minutes: `make gpu`."""
