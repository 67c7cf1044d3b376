"""What each kind of training minimises: one file per objective."""
