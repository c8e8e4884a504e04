"""The page that shows a latent space, served or in a file, used in Chromium and compared with onnxruntime."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CHROMEDRIVER, CHROMIUM, serving
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dgrad.config import configure
from dgrad.errors import InputError, RunError
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Trainer
from dgrad_cli.main import main
from dgrad_export import Codec, build_page, export_run
from dgrad_export.page.html import TEMPLATE, model_facts, page, policy

pytestmark = pytest.mark.slow

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
GREY_LEVEL = 1 / 255
MORE, LESS, STRONGER, SAME = np.array([255, 138, 43]), np.array([74, 134, 255]), 1.6, 0.5


def train(path: Path, **settings: Any) -> Run:
    settings = {"latent": "6x4", "estimator": "rloo", "steps": 20, "lr": "0.05", "device": "cpu", **settings}
    trainer = Trainer(configure(settings))
    run = Run.create(path, trainer.config)
    trainer.train(run)
    return run


class Page:
    """What a user of the page sees and does."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str, width: int = 1200, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(address)
        self.settle()

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def settle(self) -> None:
        """Wait until nothing is asked for any more."""
        WebDriverWait(self.driver, 30, 0.02).until(lambda _: self.get("main").get_attribute("aria-busy") == "false")

    def get(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()
        self.settle()

    def pixels(self, selector: str) -> np.ndarray:
        """What a canvas shows, `[H, W, 3]` in 0 to 255."""
        url = self.js("document.querySelector(arguments[0]).toDataURL()", selector)
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        return np.asarray(image.convert("RGB")).astype(float)

    def grey(self, selector: str) -> np.ndarray:
        """The same of a grey canvas, `[1, H, W]` in [0, 1]."""
        pixels = self.pixels(selector)
        assert (pixels == pixels[..., :1]).all()
        return pixels[None, ..., 0] / 255

    def code(self) -> list[int]:
        """As the chosen cells say it; the words below the picture must say the same."""
        code = [
            int(each) for each in self.js("[...document.querySelectorAll('.cells input:checked')].map((x) => x.value)")
        ]
        assert self.get("code").text == " ".join(map(str, code))
        return code

    def send(self, path: Path) -> None:
        self.get("file").send_keys(str(path))
        self.settle()

    def complaint(self) -> str:
        return str(self.get("error").text)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in [*ARGUMENTS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service(CHROMEDRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def browser(driver: webdriver.Chrome) -> Iterator[Page]:
    """A page to open; nothing may have been refused or have failed in it without a word."""
    driver.get_log("browser")
    yield Page(driver)
    driver.get("about:blank")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def linear(home: Path) -> Run:
    return train(home / "linear")


@pytest.fixture(scope="module")
def mixture(home: Path) -> Run:
    return train(
        home / "mixture", latent="3x2", model="mixture", gaussian=3, hidden=(24, 16), binarize="none", lr="0.01"
    )


@pytest.fixture(scope="module")
def served(home: Path, linear: Run) -> Iterator[tuple[str, Codec]]:
    """The address of a server, and what it serves."""
    export_run(linear.path, home / "linear-model")
    with serving(home / "linear-model") as (_, port):
        yield f"http://127.0.0.1:{port}/", Codec(home / "linear-model")


@pytest.fixture(scope="module")
def mixed(home: Path, mixture: Run) -> Iterator[tuple[str, Codec]]:
    """The same of a mixed model whose variables have names, exported with sampling."""
    folder = home / "mixture-model"
    export_run(mixture.path, folder, sampling=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "attributes": ["Round", "Two_Holes", "</script>"]}))
    with serving(folder) as (_, port):
        yield f"http://127.0.0.1:{port}/", Codec(folder)


def digit(path: Path, seed: int = 0, size: int = 8) -> np.ndarray:
    """Write a grey picture; its pixels, `[1, H, W]` uint8."""
    pixels = np.random.default_rng(seed).integers(256, size=(size, size), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels[None]


# Served


@pytest.mark.browser
def test_a_click_on_a_value_decodes_it(browser: Page, served: tuple[str, Codec]) -> None:
    address, codec = served
    browser.open(address)
    assert browser.get("title").text == "6 variables of 4 values"
    assert re.match(
        r"trained on digits with rloo · images of 8 × 8 · test bound \d+\.\d\d nats", browser.get("facts").text
    )
    assert browser.js("document.querySelectorAll('.variable').length") == 6
    for variable, value in ((0, 3), (5, 0), (0, 1), (3, 2)):
        browser.click(f".variable:nth-child({variable + 1}) .cell:nth-child({value + 1})")
        code = browser.code()
        assert code[variable] == value
        image = codec.decode([code])[0]
        np.testing.assert_allclose(browser.grey("#image"), image, atol=GREY_LEVEL)
    # and what each other value would decode to: what stays is dim, what appears orange, what goes blue
    for other in range(4):
        cell = browser.pixels(f".variable:nth-child(4) .cell:nth-child({other + 1}) canvas")
        change = codec.decode([[*code[:3], other, *code[4:]]])[0] - image
        same = np.repeat(255 * (image + np.minimum(change, 0))[0, ..., None], 3, -1)
        stain = np.minimum(STRONGER * np.abs(change), 1)[0, ..., None] * np.where(change[0, ..., None] > 0, MORE, LESS)
        expected = same if other == 2 else np.minimum(SAME * same + stain, 255)
        np.testing.assert_allclose(cell, expected, atol=1)
    assert browser.driver.get_log("browser") == []


@pytest.mark.browser
def test_random_codes_differ_and_are_what_is_shown(browser: Page, served: tuple[str, Codec]) -> None:
    address, codec = served
    browser.open(address)
    codes = []
    for _ in range(6):
        browser.click("#random")
        codes.append(browser.code())
        np.testing.assert_allclose(browser.grey("#image"), codec.decode([codes[-1]])[0], atol=GREY_LEVEL)
    assert len({tuple(code) for code in codes}) > 3
    assert set(np.ravel(codes)) == {0, 1, 2, 3}


@pytest.mark.browser
def test_the_arrow_keys_choose_values_and_the_focus_is_seen(browser: Page, served: tuple[str, Codec]) -> None:
    address, codec = served
    browser.open(address)
    focused = "document.activeElement"
    reached = []
    for _ in range(6):  # everything that can be done stands before the rows, then one stop for each row
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        reached.append(browser.js(f"{focused}.id || {focused}.name"))
    assert [name for name in reached if name.startswith("variable")][:1] == ["variable-0"]
    assert {"random", "file", "invert"} <= set(reached)
    browser.js("document.querySelector('[name=variable-0]:checked').focus()")
    before = browser.code()
    ActionChains(browser.driver).send_keys(Keys.ARROW_RIGHT).perform()
    browser.settle()
    code = browser.code()
    assert code == [(before[0] + 1) % 4, *before[1:]]
    np.testing.assert_allclose(browser.grey("#image"), codec.decode([code])[0], atol=GREY_LEVEL)
    assert browser.js(f"getComputedStyle({focused}.closest('label')).outlineStyle") == "solid"
    ActionChains(browser.driver).send_keys(Keys.TAB).perform()
    assert browser.js(f"{focused}.name") == "variable-1"
    assert browser.js(f"{focused}.closest('[role=radiogroup]').getAttribute('aria-label')") == "variable 2"


@pytest.mark.browser
@pytest.mark.parametrize("how", ["chosen", "dropped"])
def test_an_image_becomes_its_code_and_its_reconstruction(
    browser: Page, served: tuple[str, Codec], tmp_path: Path, how: str
) -> None:
    address, codec = served
    browser.open(address)
    pixels = digit(tmp_path / "digit.png")
    if how == "chosen":
        browser.send(tmp_path / "digit.png")
    else:
        drop(browser, (tmp_path / "digit.png").read_bytes(), "digit.png")
    expected = codec.encode(pixels)
    assert browser.code() == expected[0].tolist()
    np.testing.assert_array_equal(browser.grey("#input") * 255, pixels)
    for canvas in ("#image", "#reconstruction"):
        np.testing.assert_allclose(browser.grey(canvas), codec.decode(expected)[0], atol=GREY_LEVEL)
    browser.click("#invert")
    np.testing.assert_array_equal(browser.grey("#input") * 255, 255 - pixels)
    assert browser.code() == codec.encode(255 - pixels)[0].tolist()
    browser.click("#random")
    assert browser.get("back").is_displayed() == (browser.code() != codec.encode(255 - pixels)[0].tolist())
    if browser.get("back").is_displayed():
        browser.click("#back")
    assert browser.code() == codec.encode(255 - pixels)[0].tolist()
    browser.click("#clear")
    assert not browser.get("reconstruction").is_displayed()


def drop(browser: Page, data: bytes, name: str) -> None:
    browser.driver.execute_script(
        """
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], arguments[1]));
        const options = { bubbles: true, cancelable: true, dataTransfer: transfer };
        document.getElementById("own").dispatchEvent(new DragEvent("drop", options));
        """,
        base64.b64encode(data).decode(),
        name,
    )
    browser.settle()


@pytest.mark.browser
def test_the_middle_of_a_large_picture_in_colour_is_scaled_and_made_grey(
    browser: Page, served: tuple[str, Codec], tmp_path: Path
) -> None:
    address, codec = served
    picture = np.zeros((400, 800, 3), np.uint8)
    picture[:, 200:400] = [255, 0, 0]  # the left half of the middle
    picture[:, 400:600] = [0, 255, 255]
    Image.fromarray(picture).save(tmp_path / "wide.png")
    browser.open(address)
    browser.send(tmp_path / "wide.png")
    sent = browser.grey("#input")
    grey = np.asarray(Image.open(tmp_path / "wide.png").convert("L"))[0, [300, 500]] / 255
    np.testing.assert_allclose(sent[0, :, [1, 2]], grey[0], atol=2 * GREY_LEVEL)
    np.testing.assert_allclose(sent[0, :, [5, 6]], grey[1], atol=2 * GREY_LEVEL)
    assert browser.code() == codec.encode(np.round(sent * 255).astype(np.uint8))[0].tolist()


@pytest.mark.browser
def test_what_is_drawn_is_encoded(browser: Page, served: tuple[str, Codec]) -> None:
    address, codec = served
    browser.open(address)
    pad = browser.get("input")
    step = pad.size["width"] / 8
    chain = ActionChains(browser.driver).move_to_element_with_offset(pad, -3 * step, 0).click_and_hold()
    chain.move_to_element_with_offset(pad, 3 * step, 0).release().perform()
    browser.settle()
    drawn = browser.grey("#input")
    assert drawn[0, :2].max() == 0 and drawn[0, 3:5, 2:6].min() > 0.3
    assert browser.code() == codec.encode(np.round(drawn * 255).astype(np.uint8))[0].tolist()


@pytest.mark.browser
def test_what_fails_is_said_and_what_works_again_is_not(browser: Page, home: Path, tmp_path: Path, served: Any) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with serving(home / "linear-model") as (process, port):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.send(tmp_path / "text.png")
        assert "text.png is no image that this browser can open" in browser.complaint()
        browser.click("#random")
        assert not browser.get("error").is_displayed()
        browser.driver.execute_script("code[0] = 9; refresh()")
        browser.settle()
        assert "expected 0 to 3" in browser.complaint()  # the server's words
        process.kill()
        process.wait()
        digit(tmp_path / "digit.png")
        for act in (lambda: browser.click("#random"), lambda: browser.send(tmp_path / "digit.png")):
            act()
            assert "The server does not answer" in browser.complaint()


@pytest.mark.browser
@pytest.mark.parametrize("model", ["served", "mixed"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(
    browser: Page, model: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    address, _ = request.getfixturevalue(model)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.open(address, width=360, height=740)
    digit(tmp_path / "digit.png")
    browser.send(tmp_path / "digit.png")
    browser.click("#random")
    assert browser.js("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    screen = Image.open(io.BytesIO(base64.b64decode(browser.driver.get_screenshot_as_base64()))).convert("L")
    assert (np.median(screen) > 128) == (scheme == "light")
    sizes = browser.js(
        "[...document.querySelectorAll('.cell, button, #choose')].filter((x) => x.offsetParent)"
        ".map((x) => [x.offsetWidth, x.offsetHeight])"
    )
    assert np.min(sizes) >= 24
    browser.driver.execute_script("scrollTo(0, document.documentElement.scrollHeight)")
    box = browser.js("document.getElementById('image').getBoundingClientRect().toJSON()")
    assert box["top"] >= 0 and box["bottom"] < 250  # it stays in sight


@pytest.mark.browser
def test_switches_and_styles(browser: Page, mixed: tuple[str, Codec], tmp_path: Path) -> None:
    address, codec = mixed
    browser.open(address)
    names = browser.js("[...document.querySelectorAll('[role=switch]')].map((x) => x.getAttribute('aria-label'))")
    assert names == ["Round", "Two_Holes", "</script>"]
    assert browser.js("[...document.querySelectorAll('.switch .name')].map((x) => x.textContent)")[1] == "Two Holes"

    def state() -> tuple[list[int], list[float]]:
        code = browser.js("[...document.querySelectorAll('[role=switch]')].map((x) => Number(x.checked))")
        assert browser.get("code").text == " ".join(map(str, code))
        return code, [
            float(x) for x in browser.js("[...document.querySelectorAll('#sliders input')].map((x) => x.value)")
        ]

    def is_shown(style: Any = None) -> None:
        code, shown = state()
        style = shown if style is None else style
        np.testing.assert_allclose(browser.grey("#image"), codec.decode([code], [style])[0], atol=GREY_LEVEL)

    before, style = state()
    assert style == [0, 0, 0]
    browser.click(".switch:nth-child(2)")
    assert state()[0] == [before[0], 1 - before[1], before[2]]
    is_shown()
    browser.driver.execute_script("document.querySelectorAll('[role=switch]')[0].focus()")
    ActionChains(browser.driver).send_keys(Keys.SPACE).perform()
    browser.settle()
    assert state()[0][0] == 1 - before[0]
    browser.driver.execute_script("document.querySelectorAll('#sliders input')[1].focus()")
    ActionChains(browser.driver).send_keys(Keys.END).perform()
    browser.settle()
    assert state()[1] == [0, 3, 0]
    is_shown()
    browser.click("#random-style")
    assert len({0, 3, *state()[1]}) == 5
    browser.click("#mean-style")
    assert state()[1] == [0, 0, 0]

    pixels = digit(tmp_path / "digit.png")
    browser.send(tmp_path / "digit.png")
    assert state()[0] == codec.encode(pixels)[0].tolist()
    np.testing.assert_allclose(state()[1], codec.style(pixels)[0], atol=0.0051)  # the sliders' steps
    is_shown(codec.style(pixels)[0])


@pytest.mark.browser
def test_colour_and_more_images_than_are_shown_at_once(browser: Page, tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    np.savez(tmp_path / "colour.npz", images=draws.integers(256, size=(60, 60, 60, 3), dtype=np.uint8))
    run = train(tmp_path / "run", dataset=str(tmp_path / "colour.npz"), latent="7x14", binarize="none", steps=2)
    export_run(run.path, tmp_path / "model")
    codec = Codec(tmp_path / "model")
    Image.fromarray(draws.integers(256, size=(60, 60, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png")).transpose(2, 0, 1)
    with serving(tmp_path / "model") as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.send(tmp_path / "picture.png")
        np.testing.assert_array_equal(browser.pixels("#input").transpose(2, 0, 1), pixels)
        code = browser.code()
        assert code == codec.encode(pixels)[0].tolist()
        shown = browser.pixels("#image").transpose(2, 0, 1)
        np.testing.assert_allclose(shown, 255 * codec.decode([code])[0], atol=1)
        # 7 * 14 * 3 * 60 * 60 numbers are too many: only the row in use has pictures
        assert browser.js("document.querySelectorAll('.drawn').length") == 0
        browser.click(".variable:nth-child(3) .cell:nth-child(6)")
        assert browser.js("[...document.querySelectorAll('.variable')].map((x) => x.classList.contains('drawn'))") == [
            index == 2 for index in range(7)
        ]
        code = browser.code()
        assert code[2] == 5
        cell = browser.pixels(".variable:nth-child(3) .cell:nth-child(2) canvas").transpose(2, 0, 1)
        np.testing.assert_allclose(cell, 255 * codec.decode([[*code[:2], 1, *code[3:]]])[0], atol=1)


@pytest.mark.browser
def test_a_latent_without_independent_variables_can_still_encode(
    browser: Page, home: Path, served: Any, tmp_path: Path
) -> None:
    shutil.copytree(home / "linear-model", tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    manifest["latent"]["values"] = None
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    pixels = digit(tmp_path / "digit.png")
    with serving(tmp_path / "model") as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        assert "not independent" in browser.get("key").text and not browser.get("random").is_displayed()
        browser.send(tmp_path / "digit.png")
        codec = Codec(tmp_path / "model")
        code = codec.encode(pixels)
        assert browser.get("code").text == " ".join(map(str, code[0]))
        np.testing.assert_allclose(browser.grey("#image"), codec.decode(code)[0], atol=GREY_LEVEL)


def test_the_page_may_ask_for_nothing_from_elsewhere(served: tuple[str, Codec]) -> None:
    port = int(re.findall(r":(\d+)/", served[0])[0])
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", "/")
        response = connection.getresponse()
        html = response.read().decode()
    assert response.status == 200 and response.getheader("content-type") == "text/html; charset=utf-8"
    assert response.getheader("x-content-type-options") == "nosniff"
    assert response.getheader("referrer-policy") == "no-referrer"
    rules = dict(rule.split(" ", 1) for rule in (response.getheader("content-security-policy") or "").split("; "))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert (rules["default-src"], rules["connect-src"], rules["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert "unsafe" not in " ".join(rules.values())
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", html)
    assert set(re.findall(r"https?://[^'\"\s]+", html)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_what_the_page_is_told() -> None:
    manifest = {
        "latent": {"spec": "1x3", "shape": [1, 3], "code_shape": [1], "values": 3},
        "image_shape": [1, 8, 8], "classes": ["a", "b", "</script>"], "files": {"x": "secret"},
    }  # fmt: skip
    assert model_facts(manifest, {})["names"] is None  # the values of a code that was not taught have no names
    facts = model_facts(manifest, {"labels": 100})
    assert facts["names"] == ["a", "b", "</script>"]
    assert model_facts({**manifest, "attributes": ["x"]}, {"labels": 100})["names"] is None
    html = page({**facts, "note": "n"})
    assert html.count("</script>") == TEMPLATE.read_text().count("</script>") and "secret" not in html
    assert policy(html) == policy(TEMPLATE.read_text())


# In a file

FILES: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"model": "mlp", "hidden": (20, 12), "likelihood": "squared-error", "binarize": "none"},
    "mixture": {
        "latent": "3x2",
        "model": "mixture",
        "gaussian": 3,
        "hidden": (24, 16),
        "binarize": "none",
        "lr": "0.01",
    },
}


@pytest.mark.browser
@pytest.mark.parametrize("name", FILES)
def test_a_file_computes_what_onnxruntime_does(browser: Page, name: str, tmp_path: Path, capsys: Any) -> None:
    run = train(tmp_path / "run", **FILES[name])
    export = [
        "export",
        str(run.path),
        "--out",
        str(tmp_path / "model"),
        "--page",
        str(tmp_path / "page.html"),
        "--json",
    ]
    with pytest.raises(SystemExit, match=r"^\d$") as exit_:
        main(export)
    assert exit_.value.code == 0
    said = json.loads(capsys.readouterr().out)["page"]
    codec = Codec(tmp_path / "model")
    tolerance = 2 * said["largest"] + GREY_LEVEL  # on other codes than those it was measured on
    assert 0 < said["mean"] < said["largest"] < 0.05 and said["same_codes"] > 0.97
    browser.open((tmp_path / "page.html").as_uri())
    differences = []
    for _ in range(5):
        for button in ["#random"] + ["#random-style"] * (codec.gaussian > 0):
            browser.click(button)
        style = np.array([browser.js("style")]) if codec.gaussian else None
        differences.append(browser.grey("#image") - codec.decode([browser.js("code")], style)[0])
    assert np.abs(differences).max() < tolerance and np.abs(differences).mean() < 2 * said["mean"] + GREY_LEVEL

    # Of some pictures the one whose code is the least in doubt: others may be rounded to another.
    images = np.random.default_rng(1).integers(256, size=(200, 1, 8, 8), dtype=np.uint8)
    ordered = np.sort(codec.logits(images), -1)
    surest = images[(ordered[..., -1] - ordered[..., -2]).min(-1).argmax()]
    Image.fromarray(surest[0]).save(tmp_path / "digit.png")
    browser.send(tmp_path / "digit.png")
    code = codec.encode(surest)
    assert browser.js("code") == code[0].tolist()
    style = codec.style(surest) if codec.gaussian else None
    if style is not None:
        np.testing.assert_allclose(browser.js("style"), style[0], atol=0.05)
    np.testing.assert_allclose(browser.grey("#reconstruction"), codec.decode(code, style)[0], atol=tolerance)
    assert browser.driver.get_log("browser") == []
    assert "differed by" in browser.get("note").text


def test_a_page_of_20x10_has_less_than_a_megabyte(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(40, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    run = train(tmp_path / "run", dataset=str(tmp_path / "images.npz"), latent="20x10", steps=1)
    built = build_page(run.path, tmp_path / "page.html")
    assert not built.path.exists()
    built.save()
    assert built.path.stat().st_size < 500_000
    assert "connect-src 'none'" in built.path.read_text().partition("<title>")[0]


@pytest.mark.slow
def test_pages_that_cannot_be_made(linear: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def said(*arguments: object) -> str:
        with pytest.raises(SystemExit, match=r"^\d$") as exit_:
            main([str(each) for each in ("export", *arguments)])
        assert exit_.value.code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return str(error)

    assert "give --out DIR for the ONNX files, --page FILE.html" in said(linear.path)
    for place, message in (
        ("page.txt", "must end with .html"),
        ("nowhere/page.html", "there is no directory"),
        ("folder.html", "is a directory"),
        ("taken.html", "--overwrite"),
    ):
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        (tmp_path / "taken.html").write_text("mine")
        assert message in said(linear.path, "--page", tmp_path / place)
    assert (tmp_path / "taken.html").read_text() == "mine"
    assert "give --out DIR too" in said(linear.path, "--page", tmp_path / "page.html", "--sampling")
    conv = train(tmp_path / "conv", model="conv", hidden=(4,), gaussian=2, binarize="none", steps=1)
    message = said(conv.path, "--page", tmp_path / "page.html", "--out", tmp_path / "model")
    assert "a page computes linear layers and ReLU alone; the conv model" in message
    assert not (tmp_path / "model").exists() and not (tmp_path / "page.html").exists()
    built = build_page(linear.path, tmp_path / "taken.html", overwrite=True)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dgrad_export.write.single_page.write_text", refuse)
    with pytest.raises(RunError, match="No space left on device; make room"):
        built.save()
    model, state = load_model(linear, "best")
    torch.nn.init.constant_(model.decoder.first.bias, math.nan)
    monkeypatch.setattr("dgrad_export.write.single_page.load_model", lambda *_: (model, state))
    with pytest.raises(RunError, match="are no numbers"):
        build_page(linear.path, tmp_path / "page.html")
    with pytest.raises(InputError, match="no run"):
        build_page(tmp_path / "nothing", tmp_path / "page.html")
