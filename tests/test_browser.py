"""The page in a real browser, with the demo's model behind it (Debian's Chromium).

Screenshots go to build/screenshots: look at them after a change of the page.
"""

import base64
import io
import json
import shutil
import time
from pathlib import Path

import PIL.Image
import pytest

from minigpt4_jax.generator import Generator
from minigpt4_jax.serving import site
from minigpt4_jax.serving.photos import FOLDER

pytestmark = pytest.mark.slow

SHOTS = Path(__file__).parent.parent / "build/screenshots"
WIDE, PHONE = (1280, 860), (375, 800)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-quic", "--hide-scrollbars"),
)
PATIENCE = 300  # seconds: a busy machine is slow, and a test of the page is no race


@pytest.fixture(scope="module")
def opened(demo_directory):
    generator = Generator.load("demo", batch_size=2, chunk=site.CHUNK)
    with site.Site(generator, port=0) as made:
        yield made


@pytest.fixture(scope="module")
def url(opened):
    return opened.url


class Page:
    """One window of a browser, with what a person does to the page in it."""

    def __init__(self, driver, url: str, size: tuple[int, int], *, dark: bool = False):
        self.driver = driver
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        screen = dict(width=size[0], height=size[1], deviceScaleFactor=1)
        screen["mobile"] = size[0] < 500
        self.tell("Emulation.setDeviceMetricsOverride", screen)
        self.tell("Emulation.setEmulatedMedia", {"features": media})
        driver.get(url)
        self.wait(lambda: self.all("#box textarea") and self.all("#examples img"))

    def tell(self, command: str, values: dict) -> dict:
        return self.driver.execute_cdp_cmd(command, values)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        self.wait(lambda: self.all(selector))
        return self.all(selector)[0]

    def wait(self, holds, seconds: float = PATIENCE):
        end = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < end, f"not within {seconds} s: {self.text()!r}"
            time.sleep(0.1)
        return found

    def texts(self, selector: str) -> list[str]:
        """What is to be read there; in one step, as a message may be drawn anew."""
        code = (
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        )
        return [text for text in self.driver.execute_script(code, selector) if text]

    def text(self) -> str:
        return "\n".join(self.texts("#chat"))

    def said(self, role: str) -> list[str]:
        """Texts of the messages of "user" or "bot"."""
        return [t.strip() for t in self.texts(f'#chat [data-testid="{role}"]')]

    def upload(self, path: Path) -> None:
        self.one('#photo input[type="file"]').send_keys(str(path))
        self.wait(lambda: self.all('#photo [data-testid="image"] img'))

    def ask(self, question: str) -> None:
        self.one("#box textarea").send_keys(question, "\ue007")  # Enter

    def answered(self, turns: int = 1) -> list[str]:
        """Texts of the model once so many of its answers have their note."""
        self.wait(lambda: self.text().count(" tokens") >= turns and self.ready())
        return self.said("bot")

    def ready(self) -> bool:
        return bool(self.all("#box button.submit-button"))

    def warning(self) -> str:
        return self.wait(lambda: "\n".join(self.texts(".toast-body")))

    def shoot(self, name: str) -> PIL.Image.Image:
        time.sleep(1)  # transitions
        SHOTS.mkdir(parents=True, exist_ok=True)
        data = base64.b64decode(self.driver.get_screenshot_as_base64())
        (SHOTS / f"{name}.png").write_bytes(data)
        return PIL.Image.open(io.BytesIO(data))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver

    chromium, chromedriver = map(shutil.which, ("chromium", "chromedriver"))
    if not chromium or not chromedriver:
        pytest.fail(
            "the page is tested in a real browser, which is absent here: "
            "apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(executable_path=chromedriver)
    made = webdriver.Chrome(options=options, service=service)
    yield made
    made.quit()


@pytest.fixture
def page(driver, url):
    return Page(driver, url, WIDE)


def idle_within(opened: site.Site, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while opened.server.busy and time.monotonic() < end:
        time.sleep(0.01)
    return not opened.server.busy


def test_a_photo_is_uploaded_and_talked_about_in_two_turns(page):
    page.upload(FOLDER / "dog.jpg")
    page.ask("What animal is in the photo?")
    lengths = set()

    def streamed():
        lengths.update(len(text) for text in page.said("bot")[:1])
        return " tokens" in page.text() and page.ready()

    page.wait(streamed)
    assert len(lengths) > 1  # words came one after another
    answer, note = page.said("bot")
    assert len(answer.split()) > 2 and "tokens/s" in note
    assert page.all('#chat [data-testid="user"] img')  # the photo is shown
    page.ask("What colour is it?")
    assert len(page.answered(2)) == 4
    assert len(page.all('#chat [data-testid="user"] img')) == 1
    page.shoot("wide")


def test_a_stop_in_the_middle_keeps_the_words_and_frees_the_model(opened, page):
    page.all("#examples .thumbnail-item")[3].click()  # asks for details
    page.wait(lambda: any(len(text) > 5 for text in page.said("bot")))
    page.one("#box button.stop-button").click()
    assert idle_within(
        opened, 3.0
    )  # the click itself takes its way through the browser
    assert "stopped" in page.answered()[-1]


def test_reset_in_the_middle_leaves_nothing(opened, page):
    page.all("#examples .thumbnail-item")[3].click()
    page.wait(lambda: any(len(text) > 5 for text in page.said("bot")))
    page.one("#reset").click()
    page.wait(lambda: not page.said("bot") and not page.said("user"))
    assert idle_within(opened, 3.0)
    time.sleep(2)
    assert page.said("bot") == [] and page.ready()


def test_retry_edit_and_copy_are_offered_and_work(page):
    page.ask("Why is the sky blue?")
    first = page.answered()
    assert page.all('#chat button[aria-label="Copy message"]')
    page.one('#chat button[aria-label="Retry"]').click()
    page.wait(lambda: page.said("bot") and page.said("bot") != first and page.ready())
    page.answered()
    page.one('#chat button[aria-label="Edit"]').click()
    field = page.one("#chat textarea")
    field.clear()
    field.send_keys("Why is grass green?")
    page.one('#chat button[aria-label="Submit"]').click()
    page.wait(lambda: page.said("user") == ["Why is grass green?"])
    page.answered()


def test_a_broken_image_is_told_in_words(page, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    page.one('#photo input[type="file"]').send_keys(str(broken))
    time.sleep(2)
    page.ask("What is this?")
    assert "not an image, or damaged" in page.warning()
    assert page.said("user") == []


def test_where_it_looks_is_shown_on_demand(page):
    page.upload(FOLDER / "seagull.jpg")
    assert not page.all("#seen img")
    page.one("#look").click()
    page.wait(lambda: page.all("#seen img"))
    page.shoot("look")


def test_two_tabs_at_once_do_not_mix(page, driver, url):
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    second, other = driver.current_window_handle, Page(driver, url, WIDE)
    other.ask("Name a fruit.")
    driver.switch_to.window(first)
    page.ask("Name an animal.")
    page.answered()
    assert page.said("user") == ["Name an animal."]
    driver.switch_to.window(second)
    other.answered()
    assert other.said("user") == ["Name a fruit."]
    driver.close()
    driver.switch_to.window(first)


def test_a_tab_that_is_closed_frees_the_model(opened, page, driver, url):
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    other = Page(driver, url, WIDE)
    other.all("#examples .thumbnail-item")[3].click()
    other.wait(lambda: any(len(text) > 5 for text in other.said("bot")))
    driver.close()
    driver.switch_to.window(first)
    assert idle_within(opened, 5.0)


def test_a_phone_shows_all_without_scrolling_sideways(driver, url):
    phone = Page(driver, url, PHONE)
    phone.all("#examples .thumbnail-item")[0].click()
    phone.answered()
    for selector in ("#photo", "#chat", "#box", "#reset", "#theme"):
        box = phone.one(selector).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0], selector
    width = driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= PHONE[0]
    driver.execute_script("document.querySelector('#talk').scrollIntoView()")
    phone.shoot("narrow")


def test_dark_follows_the_system_and_the_button(driver, url):
    dark = Page(driver, url, WIDE, dark=True)
    dark.all("#examples .thumbnail-item")[2].click()
    dark.answered()
    shot = dark.shoot("dark").convert("L")
    assert sum(shot.histogram()[:80]) > 0.6 * shot.width * shot.height
    dark.one("#theme").click()
    shot = dark.shoot("light").convert("L")
    assert sum(shot.histogram()[200:]) > 0.6 * shot.width * shot.height


def test_the_page_asks_no_other_host(page, driver, url):
    driver.get_log("performance")  # what the browser's own first page asked
    driver.get(url)
    page.wait(lambda: page.all("#examples img"))
    page.ask("Why?")
    page.answered()
    asked = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
    urls = [
        m["params"]["request"]["url"]
        for m in asked
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert len(urls) > 10
    assert [u for u in urls if not u.startswith((url, "data:", "blob:"))] == []
