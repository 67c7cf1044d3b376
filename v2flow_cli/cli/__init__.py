"""The command line: one file per command, each of which parses, calls a room, and prints.

Read ``app.py`` first. This is the only room that knows Typer, and command files import torch and friends only
inside their functions, so that ``--help`` answers at once.
"""
