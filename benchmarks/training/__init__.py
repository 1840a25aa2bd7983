"""What a step of our trainer costs beside diffusers' own recipe and PEFT's LoRA: `make bench-train`."""
