"""The losses of each kind of training, one file per objective."""
