"""The HTML page: self-contained, escaped, and alive in a real browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.tokenizer.test_seams import build
from v2flow_cli.bench.report.page import DrawnPicture, Page, render, write_report
from v2flow_cli.bench.report.photo_view import photo_view
from v2flow_cli.bench.report.token_view import token_view
from v2flow_cli.bench.results import Table, tables
from v2flow_cli.bench.run import run_bench
from v2flow_cli.bench.sweep import parse_sweeps
from v2flow_cli.errors import DataError
from v2flow_cli.tokenizer import V2FlowTokenizer

EVIL = "<b onclick=alert(1)>\"'&"


@pytest.fixture(scope="module")
def page(tiny_tokenizer_folder: Path, sample_images) -> Page:
    tokenizer = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    photos = [("astronaut", sample_images[0]), (f"{EVIL}/2", sample_images[1]), ("coffee", sample_images[2])]
    models = {"v2flow": tokenizer}
    bench = run_bench(models, photos, settings=parse_sweeps(["cfg=1,3"]), batch_size=2, keep=2, codec_bytes=(200,))
    drawn = [DrawnPicture(EVIL, t, 1, np.full((32, 32, 3), 99, np.uint8)) for t in (0.5, 0.9)]
    return Page(
        title="Photos & words",
        lead=f"A lead with {EVIL}.",
        tables=tables([bench]),
        benches=[bench],
        views={name: token_view(tokenizer) for name, tokenizer in models.items()},
        command=f"v2flow bench {EVIL}",
        help_seconds={"": 0.25, "bench": 0.31},
        drawn=drawn,
        notes=bench.notes,
        failed=[f"{EVIL}.jpg: not an image"],
    )


class Tags(HTMLParser):
    """Collects start tags and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_loads_nothing_external_and_text_is_escaped(page: Page) -> None:
    text = render(page)
    found = Tags(text)
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert "onclick" not in attributes
        if "src" in attributes:
            assert str(attributes["src"]).startswith("data:image/")
    assert not re.search(r"https?://|@import|url\(", text)
    for part in (f"A lead with {EVIL}.", f"{EVIL}.jpg: not an image", f"{EVIL}/2", f"“{EVIL}”"):
        assert part in found.text


def test_shows_figures_published_rows_and_protocol(page: Page) -> None:
    text = Tags(render(page)).text
    result = page.benches[0].result
    protocol, digest = result.protocol, result.rows[0].weights_digest
    for part in (protocol.key, protocol.reference_digest, digest, "The first 2 of 3 photos", "MS-SSIM is left out"):
        assert part in text
    assert f"{result.rows[0].values['psnr_db'].mean:.2f}" in text
    assert "Taming-VQGAN" not in text  # the paper has no table at 32 px
    assert "1 file left out" in text and "slowest command, bench: 0.31 s" in text


def test_published_rows_are_marked_as_such(page: Page) -> None:
    protocol = {**page.tables[0].protocol, "image_size": 256}
    found = Tags(render(dataclasses.replace(page, tables=[Table(protocol, page.tables[0].rows)])))
    assert "measured by others on other pictures" in found.text
    assert all(figure in found.text for figure in ("Open-MAGVIT2", "262,144", "22.37"))


def test_an_unwritable_path_is_an_error(page: Page, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_report(page, tmp_path / "file" / "page.html")


def test_a_page_without_benches_has_tables_and_plots(page: Page) -> None:
    text = render(Page("Joined", "lead", page.tables, "v2flow bench --join"))
    assert '<article class="photo">' not in text and 'class="plots"' in text and page.tables[0].protocol["key"] in text


PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const seen = (node) => node.getBoundingClientRect().width > 0 && node.getBoundingClientRect().height > 0;
  const one = (selector) => document.querySelector(selector), all = (s) => Array.from(document.querySelectorAll(s));
  const shown = all("img").filter((image) => !image.hidden);
  const found = {
    undecoded: all("img").filter((image) => !image.complete || image.naturalWidth === 0).length,
    images: all("img").length,
    unseen: shown.filter((image) => !seen(image)).length,
    hidden: ["h1", ".stats", ".compare", ".pick img", ".sentence", "table", "dl", "figure img", ".plot svg", ".zoom",
      ".plot circle", ".plot rect", ".legend"].filter((s) => !all(s).length || !all(s).some(seen)),
    overflow: document.documentElement.scrollWidth - innerWidth,
    dark: getComputedStyle(document.body).backgroundColor,
    focusable: all("input, button, summary, [tabindex='0']").every((node) => node.tabIndex === 0),
    unnamed: all("input").filter((n) => !n.labels.length && !n.getAttribute("aria-label")).length,
  };
  const after = one(".compare .after"), before = after.src, radios = all(".photo")[0].querySelectorAll(".pick input");
  radios[3].click();
  found.picked = after.src !== before && after.src === radios[3].parentNode.querySelector("img").src;
  found.tag = one(".tag.right").textContent;
  const wipe = one(".compare input");
  wipe.value = 250;
  wipe.dispatchEvent(new Event("input"));
  found.wiped = one(".compare").style.getPropertyValue("--x");
  const view = one(".view"), width = one(".compare").getBoundingClientRect().width;
  one(".zoom button[value='4']").click();
  found.zoomed = one(".compare").getBoundingClientRect().width / width;
  const left = view.scrollLeft;
  wipe.value = 900;
  wipe.dispatchEvent(new Event("input"));
  found.panned = view.scrollLeft > left;
  one(".zoom button[value='1']").click();
  found.unzoomed = one(".compare").getBoundingClientRect().width / width;
  const walk = one(".sentence input");
  walk.value = 2;
  walk.dispatchEvent(new Event("input"));
  found.token = one(".words output").textContent;
  found.cell = getComputedStyle(one(".cell")).display;
  const strips = all(".words")[0].querySelectorAll(".sentence img");
  all(".words")[0].querySelectorAll(".metrics input")[1].click();
  found.strips = [strips[0].hidden, strips[1].hidden, strips[0].src !== strips[1].src];
  const plot = one(".plot"), drawings = () => Array.from(plot.querySelectorAll(".drawing"), (d) => d.hidden);
  const first = drawings();
  plot.querySelectorAll(".metrics input")[1].click();
  found.drawings = [first, drawings()];
  plot.querySelector(".drawing:not([hidden]) circle").dispatchEvent(new Event("pointerenter"));
  found.mark = plot.querySelector("output").textContent;
  const head = all("table.sorts")[0].querySelectorAll("th")[5];
  const values = () => Array.from(all("table.sorts")[0].tBodies[0].rows, (row) => +row.cells[5].dataset.value);
  head.querySelector("button").click();
  found.down = values();
  head.querySelector("button").click();
  found.up = values();
  found.sorted = head.getAttribute("aria-sort");
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
}, 50));
</script>
"""


LENGTHS_PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const slider = document.querySelector(".lengths input"), seen = [];
  const after = document.querySelector(".compare .after"), tag = document.querySelector(".tag.right");
  for (const value of [0, 1, 2]) {
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    seen.push([document.querySelector(".lengths b").textContent, tag.textContent, after.src]);
  }
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify({seen, width: slider.getBoundingClientRect().width});
  document.body.append(pre);
}, 50));
</script>
"""


def test_each_setting_has_a_slider_over_its_own_lengths(sample_images) -> None:
    sweep = parse_sweeps(["tokens=1,3,6", "refine=0,2"])
    bench = run_bench({"v2flow": build()}, [("astronaut", sample_images[0])], settings=sweep, keep=1, with_codecs=False)
    sliders = photo_view(bench, bench.result.kept[0], {}).sliders
    assert [slider.setting for slider in sliders] == ["v2flow, refine 0", "v2flow, refine 2"]
    for slider, refine in zip(sliders, (0, 2)):
        assert list(slider.steps) == [(str(n), f"v2flow, tokens {n}, refine {refine}") for n in (1, 3, 6)]


def test_a_slider_over_lengths_in_a_browser(sample_images, tmp_path: Path) -> None:
    photos = [("a", sample_images[0]), (EVIL, sample_images[1])]
    settings = parse_sweeps(["tokens=1,2,6"])
    flex = build()
    bench = run_bench({"flex": flex}, photos, settings=settings, batch_size=2, keep=2, with_codecs=False)
    views = {"flex": token_view(flex)}
    text = render(Page("Lengths", "lead", tables([bench]), "v2flow bench", benches=[bench], views=views))
    assert text.count('<label class="lengths">') == 2 and "flex: <b>1 to 6</b> tokens" in text
    assert text.count("6 tokens in reading order") == 2  # those of the longest sequence
    assert text.count("in their order, row by row") == 2 and "2 × 3 grid" not in text
    assert text.index('<label class="lengths">') < text.index('<div class="view"')  # a row of its own
    labels = [attributes.get("aria-label") for _, attributes in Tags(text).tags]
    assert f"Tokens of {EVIL}, flex" in labels  # escaped once
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", LENGTHS_PROBE + "</body>"), encoding="utf-8")
    found = ask_browser(file, tmp_path)
    assert [row[:2] for row in found["seen"]] == [[str(n), f"flex, tokens {n}"] for n in (1, 2, 6)]
    assert len({row[2] for row in found["seen"]}) == 3 and found["width"] > 100


def ask_browser(file: Path, folder: Path, *options: str) -> dict:
    """What a probe found in a page that a headless browser opened; nothing may be written to its console."""
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in done.stderr, done.stderr
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-2000:] + done.stderr
    return json.loads(html.unescape(match[1]))


def find_browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if browser := shutil.which(name):
            return browser
    pytest.skip("no Chromium here")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser(page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    file = tmp_path / "page.html"
    file.write_text(render(page).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    found = ask_browser(file, tmp_path, f"--window-size={width},900", *options)
    assert found["undecoded"] == found["unseen"] == found["unnamed"] == 0 and found["images"] > 20
    assert found["hidden"] == [] and found["focusable"]
    assert found["overflow"] <= 0
    assert found["dark"] == ("rgb(19, 19, 19)" if dark else "rgb(250, 249, 246)")
    assert found["picked"] and found["tag"] == "error, v2flow, cfg 1"
    assert found["wiped"] == "25%"
    assert 3.8 < found["zoomed"] <= 4  # a scroll bar takes its part
    assert found["panned"] and found["unzoomed"] == 1
    kept, view = page.benches[0].result.kept[0], page.views["v2flow"]
    ids = kept.token_ids["v2flow, cfg 1"]
    word = view.words[ids[2]]
    assert found["token"] == f"Token 3 of {len(ids)} is code {ids[2]:,}, nearest to the word “{word}”."
    assert found["cell"] == "block" and found["strips"] == [True, False, True]
    assert found["drawings"] == [[False, True], [True, False]]  # PSNR, then SSIM: the others need weights or size
    assert "v2flow, cfg" in found["mark"] and "bits a pixel" in found["mark"]
    assert found["down"] == sorted(found["down"], reverse=True) and found["up"] == sorted(found["up"])
    assert found["sorted"] == "ascending" and len(set(found["up"])) > 1
