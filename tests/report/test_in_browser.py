"""The page in a real browser: it draws, filters, fits a phone, prints, runs nothing of others."""

from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from report.clusters import CONFIG, clustered, store

from lmdbcache import build_report
from lmdbcache.cache import ClipFailure, Source, update_failures, write_sources
from lmdbcache.report import DatasetSplits

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no browser is here (package chromium)")
PHONE = {"width": 360, "height": 740}
CLASSES = ["baby_cry", "dog", "drum"]
MANY_CLASSES = [f"playing instrument number {number}" for number in range(309)]
ATTACK = "<script>document.title='owned'</script>"
HOSTILE = [
    f"{ATTACK}:dog",
    "</script><script>document.title='owned'</script>:dog",
    "<img src=x onerror=\"document.title='owned'\">:dog",
    "<!--<script>:dog",
    "<a href=\"javascript:document.title='owned'\">click</a>:dog",
    "%{x} {{ 7*7 }} ${document.title='owned'}:dog",
    "&lt;b&gt;&amp;:dog",
    "'\"`\\:dog",
    "喵喵 🐕‍🦺 \u202eevil:dog",
    "line\nbreak\t\x07:dog",
    "x" * 500 + ":dog",
    f"clip:{ATTACK}",
    "clip:\"' onmouseover=alert(1) x='",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three stores: three classes with duplicates and failures, 309 classes, hostile names."""
    folder = tmp_path_factory.mktemp("report")
    embeddings = clustered(20, CLASSES)
    embeddings["copy:dog"] = embeddings["video_00001:dog"].copy()
    cache = store(folder / "cache", embeddings)
    source = Source("video_00003.wav", 1, 1, None, root="/data/a #1")
    with cache.reader(CONFIG) as reader:
        ((key, checksum),) = reader.checksums_of([b"video_00003:drum"]).items()
    write_sources(cache.path(CONFIG), [(key.decode(), None, checksum, source)])
    failure = ClipFailure(f"{ATTACK}:dog", f"/{ATTACK}\udcff.wav", f"/{ATTACK}\udcff.wav: {ATTACK}")
    update_failures(cache.path(CONFIG), [], [failure])
    store(cache.root, clustered(4, MANY_CLASSES), CONFIG.replace(namespace="many"))
    hostile = dict(
        zip(HOSTILE, np.random.default_rng(0).normal(size=(len(HOSTILE), 4)), strict=True)
    )
    store(cache.root, hostile, CONFIG.replace(namespace="hostile", model_name=ATTACK))
    dataset = DatasetSplits(
        ATTACK, "vegas", {"train": list(embeddings), "test": [*embeddings, "missing:dog"]}
    )
    out = folder / "report.html"
    build_report(cache, out=out, datasets=[dataset])
    return out


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, report):
    """Open the report; errors, messages on the console and requests fail the test."""
    with contextlib.ExitStack() as contexts:
        problems: list[str] = []

        def opened(**options):
            context = contexts.enter_context(browser.new_context(**options))
            page = context.new_page()
            page.on("console", lambda message: problems.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: problems.append(f"error: {error}"))
            page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
            page.on(
                "request",
                lambda asked: asked.url == report.as_uri() or problems.append(f"asks {asked.url}"),
            )
            page.goto(report.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            return page

        yield opened
        assert not problems


def section(page, dataset):
    """The store of this dataset."""
    return page.locator("section.store").filter(has_text=f"namespace {dataset} ")


def drawn(page, within, kind="map"):
    plot = within.locator(f'.plot[data-chart="{kind}"]')
    if not plot.is_visible():  # in a part that is folded
        within.locator(".part:has(.plot) > summary").click()
    plot.scroll_into_view_if_needed()
    plot.locator(".main-svg").first.wait_for()
    return plot


def test_charts_are_drawn(opened):
    """Map and histograms of each store are there, with their axes named."""
    page = opened()
    for dataset in ("vegas", "many", "hostile"):
        within = section(page, dataset)
        for kind in ("map", "norms", "values"):
            plot = drawn(page, within, kind)
            assert plot.locator(".xtitle").text_content()
            assert plot.locator(".points path").count() > 10
    assert section(page, "many").locator(".colours li").count() == 11
    assert "299 other classes" in section(page, "many").locator(".colours").text_content()


def hover(page, plot, name):
    """Put the pointer on a sample's point; gives the text that shows."""
    place = plot.evaluate(
        """(plot, name) => {
            const box = plot.getBoundingClientRect(), { _fullLayout: full } = plot;
            for (const trace of plot.data) {
                const at = (trace.text || []).findIndex((text) => text.includes(name));
                if (at < 0) continue;
                return [
                    box.x + full.xaxis._offset + full.xaxis.l2p(trace.x[at]),
                    box.y + full.yaxis._offset + full.yaxis.l2p(trace.y[at]),
                ];
            }
        }""",
        name,
    )
    page.mouse.move(*place)
    label = plot.locator(".hoverlayer .hovertext")
    label.wait_for()
    return label.text_content()


def test_hover_shows_the_name(opened):
    """The pointer on a point shows the name, also one like markup; a click the file's path."""
    page = opened(viewport={"width": 1280, "height": 900})
    plot = drawn(page, section(page, "vegas"))
    assert hover(page, plot, "video_00003:drum") == "video_00003:drum"
    page.mouse.down()
    page.mouse.up()
    clip = section(page, "vegas").locator(".clip")
    clip.wait_for()
    assert clip.locator("strong").text_content() == "video_00003:drum"
    assert clip.locator("code").text_content() == "/data/a #1/video_00003.wav"
    assert clip.locator("audio").get_attribute("src") == "file:///data/a%20%231/video_00003.wav"
    plot = drawn(page, section(page, "hostile"))
    text = hover(page, plot, "&lt;script&gt;document.title")
    assert "<script>document.title='owned'</script>" in text
    assert plot.locator("a[href]").count() == 0


def test_filter_by_name_and_class(opened):
    """Search and classes narrow the map, its table and the lists; clearing brings all back."""
    page = opened()
    within = section(page, "vegas")
    plot = drawn(page, within)
    status = within.locator(".found")
    assert status.text_content().startswith("61 of 61 points")
    within.locator(".query").fill("VIDEO_00003")
    page.wait_for_function(
        "node => node.textContent.startsWith('3 of 61')", arg=status.element_handle()
    )
    assert plot.evaluate("plot => plot.data.map(trace => trace.x.length)")[0] == 58
    within.locator(".chooser summary").click()
    within.get_by_label("drum", exact=True).check()
    page.wait_for_function(
        "node => node.textContent.startsWith('1 of 61')", arg=status.element_handle()
    )
    assert within.locator(".colours li").all_text_contents() == ["◆drum"]
    within.locator(".point-table summary").click()
    within.locator(".point-table tbody th").first.wait_for()
    assert within.locator(".point-table tbody th").all_text_contents() == ["video_00003:drum"]
    assert within.locator("table.filtered tbody tr:visible").count() == 0
    page.keyboard.press("Escape")
    within.locator(".query").fill("copy:")
    within.locator(".chooser summary").click()
    within.get_by_role("button", name="Show all classes").click()
    page.wait_for_function(
        "node => node.textContent.startsWith('1 of 61')", arg=status.element_handle()
    )
    assert "copy:dog" in within.locator("table.filtered tbody tr:visible").first.text_content()


def test_keyboard_reaches_everything(opened):
    """Tab goes to the search, the classes and every container that scrolls; each has a name."""
    page = opened()
    within = section(page, "many")
    within.locator(".query").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("number 308")
    assert within.locator(".choices li:visible").all_text_contents() == [MANY_CLASSES[308]]
    page.keyboard.press("Escape")
    assert not within.locator(".choices").is_visible()
    nameless = page.evaluate(
        """[...document.querySelectorAll('.scroll[tabindex]')]
            .filter(node => !node.getAttribute('aria-label')).length"""
    )
    assert nameless == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(opened, scheme):
    """At 360 pixels the page doesn't scroll sideways; tables scroll on their own."""
    page = opened(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True)
    drawn(page, section(page, "vegas"))
    section(page, "many").locator(".chooser summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.scrollingElement.scrollHeight") > 740


def contrast(page, selector):
    """Contrast of an element's text with the page, as WCAG counts it."""
    colours = page.evaluate(
        """selector => [getComputedStyle(document.querySelector(selector)).color,
                        getComputedStyle(document.body).backgroundColor]
            .map(colour => colour.match(/[0-9.]+/g).slice(0, 3).map(Number))""",
        selector,
    )

    def luminance(colour):
        part = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_light_and_dark(opened, scheme, is_dark):
    """The page follows the system; text and links have the contrast that WCAG AA asks for."""
    page = opened(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) < 128) == is_dark
    for selector in ("body", ".note", "thead th", "a", ".flag.good", "summary"):
        assert contrast(page, selector) > 4.5, selector


def test_print(opened):
    """Charts are printed within the sheet and in light colours, and go back to the screen's."""
    page = opened(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") >= 3
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = page.evaluate("[...document.querySelectorAll('.main-svg')].map(n => n.clientWidth)")
    assert widths
    assert max(widths) <= 660
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not section(page, "vegas").locator(".filter").is_visible()
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_function("document.querySelector('.plot.map .main-svg').clientWidth > 700")


def test_nothing_of_others_runs(opened):
    """Names and reasons with markup are text everywhere: in tables, charts, legend and chooser."""
    page = opened(viewport={"width": 1280, "height": 900})
    for dataset in ("vegas", "hostile"):
        within = section(page, dataset)
        drawn(page, within)
        within.locator(".chooser summary").click()
        within.locator(".point-table summary").click()
        within.locator(".point-table tbody th").first.wait_for()
    assert page.title() == "cache: embedding cache"
    assert page.locator("body script").count() == 3
    assert page.locator("img, iframe, object, [onerror], [onmouseover]").count() == 0
    shown = set(section(page, "hostile").locator(".point-table tbody th").all_text_contents())
    assert {name for name in HOSTILE if name.isprintable()} <= shown
    assert "line\\nbreak\\t\\x07:dog" in shown
    assert f"/{ATTACK}\\udcff.wav: {ATTACK}" in section(page, "vegas").text_content()


def test_policy_stops_scripts_that_get_in(browser, report, tmp_path):
    """Were a script to get into the page, the browser would refuse it, and any request."""
    broken = tmp_path / "broken.html"
    extra = "<script>document.title='owned'</script><img src='https://example.org/x.png'></body>"
    broken.write_text(report.read_text("utf-8").replace("</body>", extra), "utf-8")
    with browser.new_context() as context:
        page = context.new_page()
        failed = {}
        page.on("requestfailed", lambda request: failed.update({request.url: request.failure}))
        page.goto(broken.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        assert page.title() == "cache: embedding cache"
        assert failed == {"https://example.org/x.png": "csp"}


def test_without_scripts_the_tables_are_there(browser, report):
    """JavaScript switched off: the facts and lists are still on the page."""
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(report.as_uri())
        page.get_by_text("Coverage of").first.click()
        assert page.locator("table.heat").first.is_visible()
        assert page.get_by_text("need JavaScript").is_visible()
        assert not page.locator(".filter").first.is_visible()
