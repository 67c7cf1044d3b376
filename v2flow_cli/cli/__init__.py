"""The command line: one file per command, which parses options, calls a job, and prints.

Read ``app.py`` first. Only this package imports Typer. Command files import torch and other heavy packages inside their
functions, so that ``--help`` is fast.
"""
