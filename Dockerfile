# The server and the demo on a CPU; docs/serving.md says how to use it.
#
#   docker build -t v2flow .
#   docker run --rm -p 127.0.0.1:8000:8000 v2flow
#   docker run --rm -p 127.0.0.1:7860:7860 v2flow python -m v2flow_cli.demo --host 0.0.0.0
FROM python:3.12-slim

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY v2flow_cli v2flow_cli
# uv takes PyTorch's build without GPU libraries, a tenth of the size of the other one.
RUN pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --torch-backend cpu --constraint constraints.txt ".[demo,serve]" \
    && pip uninstall --yes uv

RUN useradd --create-home v2flow
USER v2flow
WORKDIR /home/v2flow
EXPOSE 8000 7860
HEALTHCHECK --interval=30s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# Inside a container 0.0.0.0 is the container's own network; what is reachable from outside is up to `docker run -p`.
CMD ["python", "-m", "v2flow_cli.serve", "--host", "0.0.0.0"]
