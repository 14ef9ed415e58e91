"""A served page, and a real browser in front of it."""

import asyncio
import json
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from serving.api import create_app
from serving.page import mount_page
from tests.serving.served import running, wait_until

PAGE = "/ui"


@contextmanager
def page_server(generator, credentials):
    """The URL of a real server with a page."""
    app = create_app(generator, credentials, PAGE)
    mount_page(app, generator, PAGE, credentials)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
    served, bound = uvicorn.Server(config), socket.socket()
    bound.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(served.serve([bound])), daemon=True)
    with running(generator):
        thread.start()
        wait_until(lambda: served.started)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        served.should_exit = True
        served.force_exit = True
        thread.join(20)


@contextmanager
def chromium(width=1280, height=1400):
    """A browser that logs what its pages ask for and complain about."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine: apt install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in ("headless", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{option}")
    options.add_argument(f"--window-size={width},{height}")
    logged = {"performance": "ALL", "browser": "ALL"}
    options.set_capability("goog:loggingPrefs", logged)
    os.environ.setdefault("SE_OFFLINE", "true")
    started = webdriver.Chrome(options, Service(driver))
    try:
        yield Browser(started)
    finally:
        started.quit()


class Browser:
    """What people do with the page, by the ids of its parts."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, selector):
        """The element, as soon as it can be seen."""

        def seen(driver):
            found = driver.find_elements(By.CSS_SELECTOR, selector)
            return found[0] if found and found[0].is_displayed() else None

        return WebDriverWait(self.driver, 20, 0.05).until(seen, f"there is no {selector}")

    def type(self, name, text):
        field = self.find(f"#{name} textarea, #{name} input")
        self.driver.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));",
            field,
            text,
        )

    def click(self, name):
        self.find(f"button#{name}").click()

    def text(self, name):
        """That can be seen; in one step, as parts of the page are replaced at any time."""
        found = f"document.getElementById('{name}')"
        return self.run(f"return {found}?.getClientRects().length ? {found}.innerText : ''")

    def sees(self, name):
        return self.run(f"return !!document.getElementById('{name}')?.getClientRects().length")

    def wait_for(self, name, part):
        """The text of a part of the page, once it holds some words."""
        end = time.monotonic() + 15
        while part not in (text := self.text(name)):
            assert time.monotonic() < end, f"#{name} is {text!r}, and not: {part}"
            time.sleep(0.02)
        return text

    def wait_for_text(self, part):
        WebDriverWait(self.driver, 20, 0.05).until(lambda d: part in d.page_source, part)

    def has(self, name):
        return bool(self.driver.find_elements(By.ID, name))

    def resize(self, width):
        size = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": width < 640}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def run(self, script):
        return self.driver.execute_script(script)

    def requested(self):
        """URLs that were asked for since the last call."""
        messages = [json.loads(each["message"])["message"] for each in self._log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    def complaints(self):
        """Errors on the console since the last call."""
        return [each["message"] for each in self._log("browser") if each["level"] == "SEVERE"]

    def _log(self, kind):
        return self.driver.get_log(kind)
