"""Training runs that are killed at random moments and given full disks, and what is left of them."""
