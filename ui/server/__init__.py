"""What strangers meet: documented endpoints, /health, and the guards before both."""
