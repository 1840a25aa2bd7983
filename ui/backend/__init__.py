"""The app without widgets: what a browser asks for, checked; who is next; the base and the mix; the drawing itself."""
