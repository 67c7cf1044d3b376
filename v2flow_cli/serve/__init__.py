"""An HTTP server in the style of OpenAI's API (``python -m v2flow_cli.serve``); read ``app.py`` first."""
