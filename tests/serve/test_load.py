"""Many clients at a time, some of them broken: everyone gets the right answer, and nothing stays behind."""

import asyncio
import base64
import gc
import io
import random
import threading

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serve.conftest import eventually, serving
from v2flow_cli.jobs.generate import Picture, Settings, draw_images
from v2flow_cli.serve.limits import Limits

PROMPTS = ("a red fox", "two dogs on a beach", "a red fox runs")


@pytest.fixture(scope="module")
def expected(models, sample_images):
    """What each request must be answered with, computed one by one: pictures by (prompt, seed), tokens by photo."""
    pictures = {}
    for prompt in PROMPTS:
        for seed in range(4):
            [(_, image)] = draw_images(models.llm, models.tokenizer, [Picture(prompt, seed, 1.0, "", "")], Settings())
            pictures[prompt, seed] = np.asarray(image)
    photos = {}
    for image in sample_images[:3]:
        file = io.BytesIO()
        image.resize((160, 120)).save(file, "JPEG")
        pixels = models.tokenizer.image_processor.preprocess(Image.open(file))["pixel_values"]
        photos[file.getvalue()] = models.tokenizer.encode(pixels)[0].tolist()
    return pictures, photos


async def draws(http, client, number, expected):
    prompt, seed = PROMPTS[number % 3], number % 3
    answer = await client.images.generate(prompt=prompt, n=2, extra_body={"seed": seed})
    for i, data in enumerate(answer.data):
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))))
        assert np.array_equal(drawn, expected[0][prompt, seed + i])


async def encodes(http, client, number, expected):
    photo, tokens = list(expected[1].items())[number % 3]
    answer = await http.post("/v1/images/tokens", files={"image": ("a.jpg", photo)})
    assert answer.json()["data"] == [{"tokens": tokens}]
    decoded = await http.post("/v1/tokens/images", json={"tokens": tokens, "seed": 1, "response_format": "url"})
    fetched = await http.get(decoded.json()["data"][0]["url"])
    assert Image.open(io.BytesIO(fetched.content)).size == (32, 32)


async def sends_a_broken_image(http, client, number, expected):
    photo = next(iter(expected[1]))
    answer = await http.post("/v1/images/tokens", files={"image": ("a.jpg", photo[: len(photo) // (2 + number % 3)])})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_image"


async def sends_too_much(http, client, number, expected):
    body = b" " * 3_000_000

    async def chunks():
        for _ in range(30):
            yield body[:100_000]

    answer = await http.post("/v1/images/generations", content=body if number % 2 else chunks())
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


async def hangs_up(http, client, number, expected):
    """In the middle of its body, or while it waits."""
    _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    body = b'{"prompt": "a red fox", "n": 10}'
    head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sent = body if number % 2 else body[:9]
    writer.write(b"POST /v1/images/generations HTTP/1.1\r\n" + head.encode() + sent)
    await writer.drain()
    await asyncio.sleep(0.01)
    writer.transport.abort()


KINDS = (draws, draws, encodes, draws, sends_a_broken_image, encodes, sends_too_much, hangs_up)


async def storm(url, count, at_a_time, expected):
    places = asyncio.Semaphore(at_a_time)
    async with (
        httpx.AsyncClient(base_url=url, timeout=300) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=20, timeout=300) as client,
    ):

        async def one(number):
            async with places:
                await KINDS[number % len(KINDS)](http, client, number, expected)

        order = list(range(count))
        random.Random(0).shuffle(order)
        await asyncio.gather(*map(one, order))


def check(models, expected, count, at_a_time):
    # Room for all requests at a time: a refusal would be correct too, but clients that do not retry would fail.
    limits = dict(max_body_bytes=2_000_000, max_waiting=200, max_seconds=300)
    with serving(models, **limits) as (url, service):
        asyncio.run(storm(url, count, at_a_time, expected))
        eventually(lambda: service.batcher.running == 0)
        assert service.batcher.waiting == []
        eventually(lambda: "v2flow_requests_in_flight 1.0" in httpx.get(f"{url}/metrics", timeout=300).text)  # that one
        assert "v2flow_body_bytes 0.0" in httpx.get(f"{url}/metrics", timeout=300).text
        asyncio.run(storm(url, len(KINDS), at_a_time, expected))  # later requests succeed


def test_several_clients_at_once(models, expected):
    before = threading.active_count()
    check(models, expected, 24, 8)
    eventually(lambda: threading.active_count() <= before + 1)


@pytest.mark.slow
def test_200_requests_16_at_a_time(models, expected):
    check(models, expected, 200, 16)
    gc.collect()
    tasks = [found for found in gc.get_objects() if type(found) is asyncio.Task and not found.done()]
    assert tasks == []


def test_limits_allow_the_largest_request():
    assert Limits().max_waiting >= 10
