"""The losses of each kind of training, one file an objective; ``objective.py`` is the interface for the loop."""
