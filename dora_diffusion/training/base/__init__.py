"""What is trained: the base with adapters in it, without weights too, and the memory that it takes."""
