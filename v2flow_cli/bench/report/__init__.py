"""The HTML report of a bench.  Read ``page.py`` first."""
