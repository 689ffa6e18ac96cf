"""Ray, and nothing else that knows it; what a cluster needs to be, and whether it is."""
