"""Two demos: a live app (``python -m v2flow_cli.demo``) and one page on disk (``python -m v2flow_cli.demo.page``)."""
