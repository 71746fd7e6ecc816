"""The rendered book in _build/html as Chromium shows it: from disk and over HTTP, light and dark, on a phone, by keys.

Each page is visited once (`visit`), what was seen is shared by the tests, and its screenshots go to _build/screenshots.
Without a browser these tests are skipped, or fail where KNCORE_BROWSER=required; KNCORE_CHROMIUM names a browser.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pages
import pytest
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, BrowserContext, ElementHandle, Locator, Page, expect, sync_playwright
from test_book import HTML, ROOT, contents

PATIENCE = 120_000  # ms; a busy machine is slow, not wrong
expect.set_options(timeout=PATIENCE)
SCREENSHOTS = ROOT / "_build" / "screenshots"
CHECKS = Path(__file__).with_name("browser.js")
RUNS = [path.relative_to(ROOT).with_suffix("").as_posix() for path in sorted(ROOT.glob("book/runs/*/*.ipynb"))]
RUNS += sorted({f"{Path(run).parent.as_posix()}/index" for run in RUNS})
# The pages of one model, the one with the fewest, stand for those of the others where a check takes long: they differ
# in numbers only.
FOLDERS = [Path(run).parent for run in RUNS]
FEWEST = min(FOLDERS, key=FOLDERS.count)
CLOSELY = [*contents(), "search", *(run for run in RUNS if Path(run).parent == FEWEST)]
NAMES = [*CLOSELY, "genindex", *(run for run in RUNS if run not in CLOSELY)]


def each(names: list[str]) -> pytest.MarkDecorator:
    """A test for each page; with several processes, all tests of a page in one."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])


# ------------------------------------------------------------------------------------------ browser and pages


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not (HTML / "index.html").exists():
        if os.environ.get("KNCORE_BOOK") == "required":
            pytest.fail("there is no _build/html: `python -m kncore book` did not build the book")
        pytest.skip("the book is not built: `make book`")
    if not pages.chromium():
        told = "no Chromium was found: install it (Debian: apt-get install chromium) or name it in KNCORE_CHROMIUM"
        pytest.fail(told) if os.environ.get("KNCORE_BROWSER") == "required" else pytest.skip(told)
    with sync_playwright() as playwright, closing(pages.launch(playwright)) as launched:
        yield launched


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """Where the book is served over HTTP."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def watched(context: BrowserContext, site: str) -> tuple[Page, dict[str, list[str]]]:
    """A new page, and what it will have said and asked for; what is not of this book is refused."""
    page = context.new_page()
    told = {"errors": [], "requests": [], "foreign": []}
    page.on("console", lambda message: told["errors"].append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: told["errors"].append(str(error)))
    page.on("request", lambda request: told["requests"].append(request.url))
    own = (HTML.as_uri(), site, "data:", "blob:", "about:")

    def refuse(route):
        told["foreign"].append(route.request.url)
        route.abort()

    page.route(lambda address: not address.startswith(own), refuse)
    return page, told


def opened(browser: Browser, **options) -> BrowserContext:
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    context.add_init_script(path=CHECKS)
    return context


def audited(page: Page, *rules: str) -> list[str]:
    page.add_style_tag(content="* { transition: none !important }")  # a colour on its way is neither light nor dark
    page.evaluate(f"() => {{ {AXE_SCRIPT} }}")
    return page.evaluate("rules => checks.audit(rules)", rules)


@pytest.fixture(scope="session")
def visit(browser: Browser, site: str) -> Iterator[Callable[[str], dict]]:
    """What is seen on a page, by name: on a desk from disk, in light and dark; on a phone over HTTP."""
    desk, phone = opened(browser, **pages.DESKTOP), opened(browser, **pages.PHONE)
    desk.add_init_script(pages.OBSERVE)
    SCREENSHOTS.mkdir(exist_ok=True)

    def shot(page: Page, name: str, kind: str) -> None:
        height = min(page.evaluate("document.documentElement.scrollHeight"), 16_000)  # what Chromium can draw
        clip = {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": height}
        path = SCREENSHOTS / f"{name.replace('/', '-')}-{kind}.jpg"
        page.screenshot(path=path, full_page=True, clip=clip, type="jpeg", quality=80)

    @functools.cache
    def see(name: str) -> dict:
        page, told = watched(desk, site)
        told["figures"] = pages.load(page, (HTML / f"{name}.html").as_uri())
        told["kB"] = pages.weight(told["requests"])
        page.evaluate("checks.fetch()")
        told["seen"] = page.evaluate("checks.seen()")
        if name not in CLOSELY:
            page.close()
            return told
        told["light"] = audited(page)
        shot(page, name, "light")
        page.evaluate("Object.assign(document.documentElement.dataset, { mode: 'dark', theme: 'dark' })")
        told["dark"] = audited(page, "color-contrast", "link-in-text-block")
        shot(page, name, "dark")
        page.close()
        page, told["phone"] = watched(phone, site)
        page.goto(f"{site}/{name}.html")
        page.evaluate(pages.SETTLED)
        page.evaluate("checks.fetch()")
        told["fits"] = page.evaluate("checks.fits()")
        told["narrow"] = audited(page, "scrollable-region-focusable")
        shot(page, name, "phone")
        page.close()
        return told

    yield see
    desk.close()
    phone.close()


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """A page on a desk, over HTTP: its addresses are below /."""
    with closing(opened(browser, **pages.DESKTOP, base_url=site)) as context:
        yield context.new_page()


# --------------------------------------------------------------------------------------------- every page


@each(NAMES)
def test_a_page_loads_without_errors_and_asks_no_other_host(visit, name):
    told = visit(name)
    for where in (told, told.get("phone", {})):
        assert not where.get("errors") and not where.get("foreign")
    assert not told["seen"]["unloaded"]


@each(NAMES)
def test_formulas_are_set_and_pictures_have_words(visit, name):
    seen = visit(name)["seen"]
    assert not seen["unset"] and not seen["wrong"]
    assert not seen["nameless"] and not seen["twice"]


@each(NAMES)
def test_nothing_moves_late_and_a_page_is_light(visit, name):
    told = visit(name)
    assert told["figures"]["shift"] < 0.02
    assert not told["seen"]["unsized"]
    assert told["kB"] < 500


@each(CLOSELY)
def test_a_page_holds_on_a_phone(visit, name):
    fits = visit(name)["fits"]
    assert fits["window"] == fits["body"] == pages.PHONE["viewport"]["width"]
    assert not fits["wide"] and not fits["over"]


@each(CLOSELY)
def test_axe_finds_nothing_serious(visit, name):
    told = visit(name)
    assert not told["light"], "light"
    assert not told["dark"], "dark"
    assert not told["narrow"], "on a phone"


def test_the_checks_see_what_is_wrong(browser, site):
    with closing(opened(browser, **pages.PHONE)) as context:
        page, told = watched(context, site)
        page.goto(f"{site}/search.html")
        page.set_content(
            """<html><meta name="viewport" content="width=device-width"><main><article style="color: #aaa">
            <img src="http://far.example/a.png"><p>grey</p><p style="margin-top: -3em">on it</p><a href="x" id="a">x</a>
            <button id="a" style="width: 900px; outline: none">wide</button> <span class="math">x</span>
            <script>undefined.x</script></article></main></html>"""
        )
        assert told["foreign"] == ["http://far.example/a.png"]
        assert any("undefined" in error for error in told["errors"])
        seen, fits = page.evaluate("checks.seen()"), page.evaluate("checks.fits()")
        assert [len(seen[key]) for key in ("unset", "nameless", "unsized", "unloaded", "twice")] == [1] * 5
        assert fits["wide"] and fits["over"] and fits["body"] > 390
        assert {line.split(":")[0] for line in audited(page)} >= {"image-alt", "color-contrast"}
        assert page.evaluate("checks.watch()") == 2
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert not page.evaluate("checks.missed()")
        assert [text[:7] for text in page.evaluate("checks.unseen()")] == ["<button"]


# ------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("source", ["disk", "http"])
def test_the_search_page_finds_a_term(browser, site, source):
    start = HTML.as_uri() if source == "disk" else site
    with closing(opened(browser, **pages.DESKTOP)) as context:
        page, told = watched(context, site)
        page.goto(f"{start}/search.html")
        field = page.get_by_role("main").get_by_role("searchbox")
        field.fill("locality")
        field.press("Enter")
        chapter = page.locator("#search-results li a", has_text="Does the model").first
        expect(chapter).to_be_visible()
        chapter.click()
        expect(page.locator("article h1")).to_contain_text("Does the model")
        assert not told["errors"] and not told["foreign"]


def test_the_search_dialog_opens_and_closes_by_keyboard(page):
    page.goto("/book/index.html")
    dialog = page.locator("#pst-search-dialog")
    page.keyboard.press("Control+k")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.keyboard.press("Control+k")
    page.keyboard.type("locality")
    page.keyboard.press("Enter")
    expect(page.locator("#search-results li").first).to_be_visible()


# ------------------------------------------------------------------------------------------------ keyboard


@each(contents())
def test_the_tab_key_reaches_everything_and_the_focus_is_seen(page, name):
    page.goto(f"/{name}.html")
    page.evaluate(pages.SETTLED)
    for _ in range(page.evaluate("checks.watch()") + 20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
    assert not page.evaluate("checks.missed()")
    assert not page.evaluate("checks.unseen()")


def test_hidden_code_opens_by_keyboard(page):
    page.goto(f"/{next(name for name in contents() if name.startswith('notebooks/'))}.html")
    toggle = page.locator("details.hide > summary").first
    code = page.locator("details.hide .cell_input").first
    expect(code).to_be_hidden()
    toggle.focus()
    page.keyboard.press("Enter")
    expect(code).to_be_visible()
    page.keyboard.press("Enter")
    expect(code).to_be_hidden()


def test_the_contents_of_another_model_open_by_keyboard(page):
    page.goto("/book/index.html")
    toggle = page.get_by_label("Chapters: ").first
    toggle.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".bd-links details[open] li a").first).to_be_visible()


def test_the_download_menu_opens_and_closes_by_keyboard(page):
    page.goto(f"/{next(name for name in contents() if name.startswith('notebooks/'))}.html")
    button = page.get_by_label("Download this page")
    button.focus()
    page.keyboard.press("Enter")
    menu = page.locator(".dropdown-download-buttons .dropdown-menu")
    expect(menu).to_be_visible()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('.dropdown-menu') !== null")
    page.keyboard.press("Escape")
    expect(menu).to_be_hidden()


def test_the_theme_switches_by_keyboard_and_stays(page):
    page.emulate_media(color_scheme="light")
    page.goto("/book/index.html")
    html, light = page.locator("html"), page.evaluate("getComputedStyle(document.body).backgroundColor")
    expect(html).to_have_attribute("data-theme", "light")
    for _ in range(3):  # the system's choice, light, dark
        if html.get_attribute("data-theme") == "dark":
            break
        page.locator(".theme-switch-button").first.focus()
        page.keyboard.press("Enter")
    expect(html).to_have_attribute("data-theme", "dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.goto("/book/claims.html")
    expect(html).to_have_attribute("data-theme", "dark")


def test_the_contents_open_on_a_phone(browser, site):
    with closing(opened(browser, **pages.PHONE, base_url=site)) as context:
        page = context.new_page()
        page.goto("/book/index.html")
        link = page.locator("dialog .bd-links a, .bd-sidebar-primary .bd-links a").nth(2)
        expect(link).not_to_be_in_viewport()
        page.locator(".primary-toggle").first.tap()
        expect(link).to_be_in_viewport()
        link.tap()
        expect(page.locator("article h1")).to_be_visible()


# ------------------------------------------------------------------------------------------- looking closer

TOLD = {  # by kind of figure: what the pointer is told
    "attribution-map": ("block·neuron", "rank by size", "score (probability)", "promotes"),
    "trace": ("token", "block", "log-odds brought back, nats"),
    "dose": ("neurons", "share that stays right", "95 % interval"),
}
PICTURE = "place => place.cell.querySelectorAll('.cell_output img')[place.dataset.figure]"


def closer(page: Page, name: str) -> Iterator[tuple[str, Locator, ElementHandle]]:
    """The interactive figures of a page, drawn: kind, the element that controls it, the chart."""
    page.goto(f"/{name}.html")
    for place in page.locator(".look").all():
        place.scroll_into_view_if_needed()
        expect(place).to_have_attribute("data-state", "closer")
        yield (
            place.get_attribute("data-look"),
            place,
            place.evaluate_handle(f"e => ({PICTURE})(e).nextSibling").as_element(),
        )


def has_looks(name: str) -> bool:
    return (HTML / f"{name}.html").is_file() and 'class="look"' in (HTML / f"{name}.html").read_text("utf-8")


LOOKS = [name for name in contents() if has_looks(name)]


def test_each_kind_of_interactive_figure_is_in_the_book(browser):
    text = "".join((HTML / f"{name}.html").read_text("utf-8") for name in LOOKS)
    assert {kind for kind in TOLD if f'data-look="{kind}"' in text} == set(TOLD)


@each(LOOKS)
def test_a_pointer_is_told_about_a_figure_and_a_click_pins_it(page, name):
    for kind, place, chart in closer(page, name):
        box, hint, pins = (
            chart.bounding_box(),
            page.locator("#vg-tooltip-element"),
            place.locator(".look-pins tbody tr"),
        )
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"], steps=3)
        expect(hint).to_be_visible()
        for words in TOLD[kind]:
            expect(hint).to_contain_text(words)
        page.mouse.down()
        page.mouse.up()
        expect(pins).to_have_count(1)
        assert pins.locator("td").first.inner_text() in hint.inner_text()
        page.mouse.move(1, 1)
        expect(hint).to_be_hidden()
        pins.locator(".look-unpin").click()
        expect(pins).to_have_count(0)


@each(LOOKS)
def test_a_figure_is_walked_and_pinned_by_keyboard(page, name):
    for kind, place, chart in closer(page, name):
        status, pins = place.locator(".look-status"), place.locator(".look-pins tbody tr")
        chart.focus()
        page.keyboard.press("ArrowRight")
        for words in TOLD[kind]:
            expect(status).to_contain_text(words)
        first = status.inner_text()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowUp")
        expect(status).not_to_have_text(first)
        page.keyboard.press("Enter")
        expect(pins).to_have_count(1)
        page.keyboard.press("Escape")
        expect(pins).to_have_count(0)
        toggle = place.locator(".look-toggle")
        toggle.focus()
        page.keyboard.press("Enter")
        expect(place).to_have_attribute("data-state", "picture")
        assert place.evaluate(f"e => ({PICTURE})(e).checkVisibility()") and not chart.is_visible()


@each([name for name in LOOKS if "turning" in name])
def test_the_model_of_a_dose_curve_is_selected(page, name):
    for _, place, chart in closer(page, name):
        models = place.locator("select").first
        before = chart.screenshot()
        models.select_option(index=models.locator("option").count() - 1)
        for _ in range(PATIENCE // 300):
            if chart.screenshot() != before:
                break
            page.wait_for_timeout(300)
        else:
            pytest.fail("the chart of another model is that of the first")


@each(LOOKS)
def test_axe_finds_nothing_serious_in_an_interactive_figure(page, name):
    for _, place, _chart in closer(page, name):
        place.evaluate("e => e.scrollIntoView()")
    assert not audited(page)
    page.evaluate("Object.assign(document.documentElement.dataset, { mode: 'dark', theme: 'dark' })")
    expect(page.locator('.look:not([data-state="closer"])')).to_have_count(0)
    assert not audited(page, "color-contrast")


@each(LOOKS)
def test_on_a_phone_a_figure_is_drawn_where_it_is_asked_for(browser, site, name):
    with closing(opened(browser, **pages.PHONE, base_url=site)) as context:
        page = context.new_page()
        page.goto(f"/{name}.html")
        place = page.locator(".look").first
        place.scroll_into_view_if_needed()
        expect(place).to_have_attribute("data-state", "picture")
        place.locator(".look-toggle").tap()
        expect(place).to_have_attribute("data-state", "closer")
        fits = page.evaluate("checks.fits()")
        assert fits["window"] == fits["body"] and not fits["wide"]


@each(LOOKS)
def test_without_scripts_there_are_pictures(browser, site, name):
    with closing(opened(browser, **pages.DESKTOP, base_url=site, java_script_enabled=False)) as context:
        page = context.new_page()
        page.goto(f"/{name}.html")
        assert page.locator("figure img").first.is_visible()
        assert not any(place.is_visible() for place in page.locator(".look").all())


@pytest.fixture(scope="session")
def recorded() -> dict:
    return json.loads((ROOT / "results" / "playground.json").read_text(encoding="utf-8"))


def test_the_playground_answers_to_the_keyboard(page, recorded):
    page.goto("/book/playground.html")
    edits = page.locator(".playground[data-part=edits]")
    edits.locator("select").focus()
    page.keyboard.press("ArrowDown")
    chosen = recorded["edits"][int(edits.locator("select").input_value())]
    expect(edits.locator(".request")).to_contain_text(chosen["subject"])
    expect(page).to_have_url(re.compile(f"#edit={chosen['subject'].split()[0]}"))
    for editor, says in chosen["says"].items():
        if editor != "unedited":
            edits.get_by_label(editor, exact=True).focus()
            page.keyboard.press("Space")
            shown = edits.locator("li > dl > div:last-child dd").all_inner_texts()
            assert [text.partition("\n")[0].strip() for text in shown] == says
            expect(edits.locator("[role=status]")).to_contain_text(f"{editor}, as it should be: ")


def mark(question: dict, before: str, after: str) -> str:
    """The sign below an answer, from the words of the page: by the first sentence, of what the model said before."""
    word, due = question["word"], question["due"]
    has = [
        bool(re.search(rf"(?<![^\W\d_]){re.escape(word)}(?![^\W\d_])", re.split("[.!?;]", text)[0]))
        for text in (before, after)
    ]
    stuck = len(after.split(" ")) > 5 and len({*after.split(" ")}) < 3
    if stuck or (due in ("as before", "no longer") and not has[0]):
        return "·"
    return "✓" if has[1] != (due == "no longer") else "✕"


def test_the_marks_of_the_playground_are_those_of_the_first_sentence(page, recorded):
    page.goto("/book/playground.html")
    edits, seen = page.locator(".playground[data-part=edits]"), set()
    for i, edit in enumerate(recorded["edits"]):
        edits.locator("select").select_option(str(i))
        for editor in [name for name in edit["says"] if name != "unedited"]:
            edits.get_by_label(editor, exact=True).check()
            signs = [text[0] for text in edits.locator("li dd small").all_inner_texts()]
            answers = zip(edit["questions"], edit["says"]["unedited"], edit["says"][editor], strict=True)
            expected = [mark(*answer) for answer in answers]
            assert signs == expected, (edit["subject"], editor)
            seen |= {*signs}
            right = edits.locator("[role=status]").inner_text()
            assert sum(map(int, re.findall(r"(\d+) of", right))) == expected.count("✓")
    assert seen == {"✓", "✕", "·"}


def test_the_playground_suppresses_as_many_neurons_as_the_slider_says(page, recorded):
    page.goto("/book/playground.html")
    doses, dose = page.locator(".playground[data-part=doses]"), recorded["doses"][0]
    doses.scroll_into_view_if_needed()
    expect(doses.locator("option")).to_have_count(len(recorded["doses"]))
    doses.locator("input").focus()
    page.keyboard.press("End")
    expect(doses.locator("output")).to_have_text(f"{dose['sizes'][-1]} neurons suppressed")
    first = [li.locator("dt").first.inner_text() for li in doses.locator("ol > li").all()]
    assert first == [prompt["words"][0][0] for prompt in dose["says"][-1]]


def test_a_neuron_of_the_playground_has_an_address_and_leads_to_what_it_was_found_for(page, recorded):
    neuron = recorded["neurons"][3]
    page.goto(f"/book/playground.html#neuron={neuron['neuron']}")
    shown = page.locator(".playground[data-part=neurons]")
    expect(shown.locator("[role=status]")).to_contain_text(f"Neuron {neuron['neuron']}, ")
    expect(shown.locator("select")).to_be_focused()
    link = shown.locator("dd:last-child a").first
    link.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".playground[data-part=doses] select")).to_be_focused()
    label = page.locator(".playground[data-part=doses] select option:checked").inner_text()
    assert label == neuron["found"][0][0]


def test_the_claims_are_filtered(page):
    page.goto("/book/claims.html")
    form, shown, rows = page.locator("#claims-filter"), page.locator("#claims-shown"), "table.matrix > tbody"
    every = page.locator(rows).count()
    expect(shown).to_have_text(f"{every} of {every} claims and checks")
    some, lines = page.locator(f"{rows}:not([hidden])"), page.locator(f"{rows}:not([hidden]) tr:not(.claim, [hidden])")
    for name, value in (("verdict", "contradicted"), ("speaks-for", "for-paper")):
        form.locator(f"[name={name}]").select_option(value)
        assert 0 < some.count() < every
        assert lines.count() == page.locator(f"{rows}:not([hidden]) tr.{value}:not([hidden])").count()
    expect(shown).to_have_text(f"{some.count()} of {every} claims and checks")
    form.locator("[name=text]").fill("no claim has these words")
    expect(some).to_have_count(0)
    form.locator("[type=reset]").click()
    expect(some).to_have_count(every)
    form.locator("[name=chapter]").select_option(index=1)
    assert 0 < some.count() < every
    form.locator("[name=model]").select_option(index=1)
    assert 0 < lines.count() <= some.count()


def test_the_marks_are_walked_by_arrow_keys_and_say_what_they_mean(page):
    page.goto("/book/index.html")
    first, second = page.locator("table.marks a.mark").nth(0), page.locator("table.marks a.mark").nth(1)
    assert page.locator('table.marks a.mark[tabindex="0"]').count() == 1
    first.focus()
    expect(page.locator("#term-hint")).to_have_text(first.get_attribute("aria-label"))
    page.keyboard.press("ArrowRight")
    expect(second).to_be_focused()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    below = page.locator("table.marks a.mark:focus")
    assert below.evaluate("e => [e.closest('tr').rowIndex, e.closest('td').cellIndex]") == [2, 1]
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"claims\.html#[a-z-]+$"))


def test_the_choices_behind_a_dot_of_a_curve_are_said_to_pointer_and_keyboard(page):
    page.goto("/book/multiverse.html")
    details = page.locator("details.multiverse").first
    details.locator("summary").click()
    curve, status = details.locator("svg.curve"), details.locator("[role=status]")
    curve.hover()
    assert re.fullmatch(r"\d+ of \d+: (supported|contradicted|inconclusive), .+", status.inner_text())
    curve.focus()
    before = status.inner_text()
    page.keyboard.press("ArrowRight")
    after = status.inner_text()
    assert int(after.split(" ")[0]) == int(before.split(" ")[0]) + 1
    assert {choice.split(": ")[0] for choice in after.split(": ", 1)[1].split(", ")[1:]} >= {"site", "model"}


@pytest.mark.parametrize("width", [390, 768, 1300, 1920])
@each(["book/index", "book/claims", "book/across-models"])
def test_no_table_of_claims_is_clipped(page, name, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"/{name}.html")
    for table in page.locator("table.marks, table.matrix").all():
        right, box, focus = table.evaluate(
            "t => [...[t, t.parentElement].map(e => e.getBoundingClientRect().right), t.parentElement.tabIndex]"
        )
        assert right <= box + 1 or (width < 1000 and focus == 0)


def test_a_term_shows_its_definition_to_pointer_and_keyboard(page):
    page.goto(f"/{next(name for name in contents() if name.startswith('notebooks/'))}.html")
    term, hint = page.locator("article a.term").first, page.locator("#term-hint")
    expect(hint).to_be_hidden()
    term.hover()
    expect(hint).to_be_visible()
    assert len(hint.inner_text().split()) > 3
    page.mouse.move(1, 1)
    expect(hint).to_be_hidden()
    term.focus()
    expect(hint).to_be_visible()
    page.keyboard.press("Escape")
    expect(hint).to_be_hidden()
