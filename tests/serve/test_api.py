"""The endpoints, called by the openai client and by plain HTTP."""

import base64
import contextlib
import io
import json
import socket
import threading

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.serve.conftest import eventually, serving
from v2flow_cli.jobs.generate import Picture, Settings, draw_images
from v2flow_cli.serve.picture_urls import PictureUrls

openai = pytest.importorskip("openai")
PATIENT = 300  # seconds, since no test asserts a time


def post(url, timeout=PATIENT, **settings):
    return httpx.post(url, timeout=timeout, **settings)


def get(url, **settings):
    return httpx.get(url, timeout=PATIENT, **settings)


@pytest.fixture(scope="module")
def server(models):
    with serving(models, max_body_bytes=2_000_000, max_pixels=300_000) as (url, service):
        yield url, service


@pytest.fixture
def url(server):
    return server[0]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def drawn(answer):
    return [pixels(base64.b64decode(data.b64_json)) for data in answer.data]


@pytest.fixture
def photo(sample_images):
    file = io.BytesIO()
    sample_images[1].resize((300, 200)).save(file, "PNG")
    return file.getvalue()


def test_pictures_equal_those_of_the_command(client, models):
    answer = client.images.generate(prompt="a red fox", n=3, size="32x32", extra_body={"seed": 5, "temperature": 0.9})
    assert [data.seed for data in answer.data] == [5, 6, 7] and answer.size == "32x32" and answer.model == models.name
    plan = [Picture("a red fox", seed, 0.9, "", "") for seed in (5, 6, 7)]
    by_command = [np.asarray(image) for _, image in draw_images(models.llm, models.tokenizer, plan, Settings())]
    assert all(map(np.array_equal, drawn(answer), by_command))
    assert not np.array_equal(by_command[0], by_command[1])
    alone = client.images.generate(prompt="a red fox", extra_body={"seed": 6, "temperature": 0.9})
    assert np.array_equal(drawn(alone)[0], by_command[1])


def test_without_a_seed_pictures_differ_and_the_response_has_the_seed(client):
    first, second = (client.images.generate(prompt="a red fox") for _ in range(2))
    assert first.data[0].seed != second.data[0].seed
    again = client.images.generate(prompt="a red fox", extra_body={"seed": first.data[0].seed})
    assert np.array_equal(drawn(again)[0], drawn(first)[0])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_by_url(client, kind):
    ask = dict(prompt="two dogs", output_format=kind, extra_body={"seed": 1})
    answer = client.images.generate(response_format="url", **ask)
    fetched = get(answer.data[0].url)
    assert fetched.status_code == 200 and fetched.headers["content-type"] == f"image/{kind}"
    assert answer.data[0].b64_json is None
    assert base64.b64decode(client.images.generate(**ask).data[0].b64_json) == fetched.content
    gone = get(answer.data[0].url.replace(f".{kind}", f"x.{kind}"))
    assert gone.status_code == 404 and "lifetime of URLs is 60 minutes" in gone.json()["error"]["message"]


def test_urls_expire_by_time_and_by_size():
    now = [0.0]
    urls = PictureUrls(10, 100, clock=lambda: now[0])
    first = urls.add(b"x" * 60, "png")
    assert urls.get(first) == b"x" * 60 and urls.get("other.png") is None
    second = urls.add(b"y" * 60, "png")
    assert urls.get(first) is None and urls.get(second) and urls.size == 60
    now[0] = 11.0
    assert urls.get(second) is None and urls.size == 0


def test_images_to_tokens_and_tokens_to_images(url, models, photo):
    by_library = models.tokenizer.encode(
        models.tokenizer.image_processor.preprocess_one(Image.open(io.BytesIO(photo)))[None]
    )
    text = base64.b64encode(photo).decode()
    as_json = post(f"{url}/v1/images/tokens", json={"image": [text, f"data:image/png;base64,{text}"]}).json()
    as_form = post(f"{url}/v1/images/tokens", files={"image": ("a.png", photo)}, data={"size": "32x32"}).json()
    assert [data["tokens"] for data in as_json["data"]] == by_library.tolist() * 2
    assert as_form["data"] == as_json["data"][:1]
    assert as_form["codebook_size"] == 64 and as_form["tokenizer_digest"] == models.tokenizer.token_digest
    assert as_form["size"] == "32x32"

    refined = post(f"{url}/v1/images/tokens", files={"image": ("a.png", photo)}, data={"refine_steps": "3"}).json()
    image = models.tokenizer.image_processor.preprocess_one(Image.open(io.BytesIO(photo)))[None]
    assert [data["tokens"] for data in refined["data"]] == models.tokenizer.encode(image, refine_steps=3).tolist()
    assert (as_form["refine_steps"], refined["refine_steps"]) == (0, 3)

    tokens = as_form["data"][0]["tokens"]
    ask = {"tokens": [tokens, tokens], "seed": 3, "num_flow_steps": 2, "tokenizer_digest": as_form["tokenizer_digest"]}
    answer = post(f"{url}/v1/tokens/images", json=ask).json()
    decoded = models.tokenizer.decode(by_library, seeds=[3], num_flow_steps=2)
    expected = np.asarray(models.tokenizer.image_processor.to_pil(decoded)[0])
    assert len(answer["data"]) == 2
    for data in answer["data"]:
        assert np.array_equal(pixels(base64.b64decode(data["b64_json"])), expected) and data["seed"] == 3


def test_other_sizes_are_encoded_and_decoded(url, photo):
    image = base64.b64encode(photo).decode()
    encoded = post(f"{url}/v1/images/tokens", json={"image": image, "size": "64x64"}).json()
    tokens = encoded["data"][0]["tokens"]
    assert len(tokens) == 16
    answer = post(f"{url}/v1/tokens/images", json={"tokens": tokens, "seed": 0}).json()
    assert answer["size"] == "64x64" and pixels(base64.b64decode(answer["data"][0]["b64_json"])).shape == (64, 64, 3)


def test_models_and_health_and_metrics(url, client, models):
    [listed] = client.models.list().data
    assert listed.id == models.name == client.models.retrieve(models.name).id and listed.tokens_per_image == 4
    client.images.generate(prompt="a red fox", model=models.name, n=2)
    assert get(f"{url}/health").json() == {"status": "ok", "model": models.name}
    text = get(f"{url}/metrics").text
    assert 'v2flow_requests_total{endpoint="/v1/images/generations",status="200"}' in text
    assert 'v2flow_rows_total{task="draw"}' in text and "process_resident_memory_bytes" in text
    assert "v2flow_rows_waiting 0.0" in text
    assert get(f"{url}/openapi.json").status_code == 200


DRAW, ENCODE, DECODE = "/v1/images/generations", "/v1/images/tokens", "/v1/tokens/images"
FOX = {"prompt": "a red fox"}


@pytest.mark.parametrize(
    "path, body, status, param, says",
    [
        (DRAW, {}, 400, "prompt", "Missing required parameter"),
        (DRAW, {"prompt": " "}, 400, "prompt", "expected a text"),
        (DRAW, {"prompt": 3}, 400, "prompt", "valid string; found 3"),
        (DRAW, {"prompt": "fox " * 500}, 400, "prompt", "Use a shorter prompt"),
        (DRAW, {"prompt": "\ud800"}, 400, "prompt", "prompt"),
        (DRAW, FOX | {"n": 0}, 400, "n", "greater than or equal to 1; found 0"),
        (DRAW, FOX | {"n": 11}, 400, "n", "less than or equal to 10"),
        (DRAW, FOX | {"seed": -1}, 400, "seed", "found -1"),
        (DRAW, FOX | {"seed": 2**70}, 400, "seed", "less than or equal"),
        (DRAW, FOX | {"size": "1024x1024"}, 400, "size", "this model draws 32x32"),
        (DRAW, FOX | {"size": "big"}, 400, "size", "WIDTHxHEIGHT"),
        (DRAW, FOX | {"model": "gpt-image-1"}, 404, "model", "does not exist"),
        (DRAW, FOX | {"decoder": "blurred"}, 400, "decoder", "expected faithful; found 'blurred'"),
        (DRAW, FOX | {"colour": "red"}, 400, "colour", "Unknown parameter"),
        (DRAW, FOX | {"response_format": "jpg"}, 400, "response_format", "'b64_json' or 'url'"),
        (DRAW, FOX | {"stream": True}, 400, "stream", "found True"),
        (DRAW, [], 400, None, "Send a JSON object"),
        (ENCODE, {}, 400, "image", "Missing required parameter"),
        (ENCODE, {"image": []}, 400, "image", "0 images"),
        (ENCODE, {"image": "!!"}, 400, "image", "not base64"),
        (ENCODE, {"image": ""}, 400, "image", "empty"),
        (ENCODE, {"image": "aGVsbG8="}, 400, "image", "not an image of a known format"),
        (ENCODE, {"image": "https://example.org/a.png"}, 400, "image", "URLs are not supported"),
        (ENCODE, {"image": "aGVsbG8=", "size": "30x30"}, 400, "size", "multiples of"),
        (ENCODE, {"image": "aGVsbG8=", "size": "64x32"}, 400, "size", "not square"),
        (ENCODE, {"image": "aGVsbG8=", "size": "9216x9216"}, 400, "size", "limit of 512 pixels"),
        (ENCODE, {"image": "aGVsbG8=", "num_tokens": 3}, 400, "num_tokens", "3 tokens"),
        (ENCODE, {"image": "aGVsbG8=", "refine_steps": 101}, 400, "refine_steps", "less than or equal to 100"),
        (DECODE, {"tokens": []}, 400, "tokens", "0 images"),
        (DECODE, {"tokens": [1, 2, 3]}, 400, "tokens", "3 tokens"),
        (DECODE, {"tokens": [1, 2, 3, 64]}, 400, "tokens", "0 to 63"),
        (DECODE, {"tokens": [[1, 2, 3, 4], [1]]}, 400, "tokens", "1 and 4 ids"),
        (DECODE, {"tokens": [0] * 4096}, 400, "tokens", "limit of 512 pixels"),
        (DECODE, {"tokens": [1, 2, 3, 4], "tokenizer_digest": "f" * 16}, 400, "tokenizer_digest", "this server has"),
        ("/v1/images/edits", {}, 404, None, "no such endpoint"),
    ],
)
def test_errors_have_openais_format(url, path, body, status, param, says):
    answer = post(url + path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param and says in error["message"], error
    assert error["type"] == "invalid_request_error" and error["code"]
    assert "Traceback" not in answer.text and error["message"].endswith((".", "...")), error["message"]


@pytest.mark.parametrize("path", [DRAW, ENCODE, DECODE])
@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}', b"null"])
def test_bodies_that_are_not_json(url, path, body):
    answer = post(url + path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_the_client_raises_the_classes_that_its_users_catch(client):
    with pytest.raises(openai.BadRequestError, match="expected a text"):
        client.images.generate(prompt="\t")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.images.generate(prompt="a fox", model="dall-e-3")


def test_broken_and_large_images(url, photo):
    def encode(content):
        return post(f"{url}{ENCODE}", files={"image": ("a.png", content)})

    cut = encode(photo[: len(photo) // 2])
    assert cut.status_code == 400 and "damaged or truncated" in cut.json()["error"]["message"]
    large = io.BytesIO()
    Image.new("L", (1000, 301)).save(large, "PNG")
    answer = encode(large.getvalue())
    assert answer.status_code == 413 and "301,000 pixels; the limit is 300,000" in answer.json()["error"]["message"]
    form = post(f"{url}{ENCODE}", files={"image": ("a.png", photo)}, data={"sise": "32x32"})
    assert form.status_code == 400 and "Unknown parameter: 'sise'" in form.json()["error"]["message"]
    none = post(f"{url}{ENCODE}", files={"photo": ("a.png", photo)})
    assert none.status_code == 400 and none.json()["error"]["param"] == "image"
    many = post(f"{url}{ENCODE}", files=[("image", ("a.png", photo))] * 11)
    assert many.status_code == 400


def chunks(count):
    for _ in range(count):
        yield b" " * 100_000


@pytest.mark.parametrize("body", [b" " * 2_000_001, chunks(21)], ids=["length", "chunked"])
def test_large_bodies(url, body):
    answer = post(f"{url}{DRAW}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_an_api_key(models):
    with serving(models, api_key="secret") as (url, _):
        for key, fails in ((None, True), ("Bearer wrong", True), ("Basic secret", True), ("Bearer secret", False)):
            answer = get(f"{url}/v1/models", headers={"Authorization": key} if key else {})
            assert answer.status_code == (401 if fails else 200)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError, match="Incorrect or missing API key"):
                stranger.images.generate(prompt="a red fox")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as friend:
            answer = friend.images.generate(prompt="a red fox", response_format="url")
        assert get(answer.data[0].url).status_code == get(f"{url}/health").status_code == 200


@pytest.fixture
def held(models, monkeypatch):
    """An event that drawing waits for."""
    free, draw = threading.Event(), models.llm.generate

    def waits(*args, **kwargs):
        free.wait(600)
        return draw(*args, **kwargs)

    monkeypatch.setattr(models.llm, "generate", waits)
    yield free
    free.set()


@contextlib.contextmanager
def ask_without_waiting(url, n):
    """A client that requests ``n`` pictures and disconnects at the end of the block."""
    body = json.dumps(FOX | {"n": n}).encode()
    head = f"POST {DRAW} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        yield


def test_a_full_queue_a_timeout_and_disconnected_clients(models, held):
    with serving(models, max_waiting=10, max_batch=4, max_seconds=600) as (url, service):
        for n, places in ((1, (1, 0)), (10, (1, 10))):  # (running, waiting): the first is being drawn, ten wait
            with ask_without_waiting(url, n):
                eventually(lambda at=places: (service.batcher.running, len(service.batcher.waiting)) == at)
            eventually(lambda: service.batcher.waiting == [])
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(post(f"{url}{DRAW}", json=FOX | {"n": 5}))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: len(service.batcher.waiting) == 10)
        full = post(f"{url}{DRAW}", json=FOX)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["type"] == "rate_limit_error"
        held.set()
        for thread in threads:
            thread.join(600)
        assert [answer.status_code for answer in answers] == [200, 200]
        eventually(lambda: service.batcher.running == 0)


def test_a_request_over_the_time_limit_is_504(models, held):
    with serving(models, max_seconds=0.3) as (url, service):
        answer = post(f"{url}{DRAW}", json=FOX)
        assert answer.status_code == 504 and "limit of 0.3 s" in answer.json()["error"]["message"]
        assert service.batcher.waiting == []
        held.set()


def test_new_requests_are_refused_during_shutdown(models):
    with serving(models) as (url, service):
        service.closing = True
        answer = post(f"{url}{DRAW}", json=FOX)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert get(f"{url}/health").status_code == 503


def test_a_request_whose_body_is_still_on_the_way_at_shutdown_is_done(models):
    with serving(models) as (url, service):

        def body():
            content = json.dumps(FOX).encode()
            yield content[:5]
            eventually(lambda: service.metrics.in_flight._value.get() == 1)
            service.closing = True
            yield content[5:]

        answer = post(f"{url}{DRAW}", content=body(), headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        assert post(f"{url}{DRAW}", json=FOX).status_code == 503


def test_an_internal_error_has_the_same_format(models, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(models.llm, "generate", fails)
    with serving(models) as (url, _):
        answer = post(f"{url}{DRAW}", json=FOX)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text
        assert 'endpoint="/v1/images/generations",status="500"' in get(f"{url}/metrics").text


def test_models_that_do_not_belong_together_are_refused(models, tiny_tokenizer, tmp_path):
    from v2flow_cli.errors import ModelError
    from v2flow_cli.serve.tasks import Models

    with torch.no_grad():
        next(tiny_tokenizer.resampler.parameters()).add_(1.0)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="draws tokens of tokenizer"):
        Models.load(str(tmp_path), models.llm.name, "cpu")
