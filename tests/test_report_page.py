"""The report in a real browser: no errors, no network, the stored numbers, and no markup let in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.samplers import RandomSampler
from stored import ENVIRONMENT, add_trial, configured, measured, new_database

from accelsearch.pictures import keep_pairs
from accelsearch.report import report_to
from accelsearch.storage import Outcome, create_study, open_storage, record
from tests.browser import Opened, chromium

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]

NASTY = (
    "</script><script>alert('s')</script><img src=x onerror=alert('i')>"
    "<b class=injected>bold</b>{{ 7 * 7 }} &amp; \"'`"
)
BEST, SHADES = 3.456, (100, 150)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a study all of whose texts are nasty, with images of its two prompts."""
    folder = tmp_path_factory.mktemp("report")
    storage = open_storage(new_database(folder))
    configuration = configured(
        model=NASTY,
        prompts=(NASTY, f"{NASTY} too"),
        prompts_name=NASTY,
        negative_prompt=NASTY,
    )
    environment = replace(ENVIRONMENT, device=NASTY, versions={"torch": NASTY, NASTY: "1"})
    study = create_study(storage, configuration, environment, RandomSampler(seed=0))
    for number in range(20):
        params = {
            "cache_interval": 2 + number % 5,
            "cache_branch_id": number % 3,
            NASTY: [NASTY, "plain"][number % 2],
        }
        add_trial(study, 1.2 + number / 20, 0.0013 * number, params=params)
    trial = study.ask()
    found = measured(BEST, 0.0123, {NASTY: NASTY, "cache_interval": 9, "cache_branch_id": 0})
    record(trial, Outcome.FEASIBLE, NASTY, measurement=found, seconds={NASTY: 3.0, "latency": 2.0})
    baseline, accelerated = (
        torch.full((2, 3, 64, 64), shade, dtype=torch.uint8) for shade in SHADES
    )
    keep_pairs(folder / "artifacts", trial, baseline, accelerated, [0, 1])
    study.tell(trial, BEST)
    out = folder / "report.html"
    report_to(out, storage, artifacts=folder / "artifacts")
    return out


@pytest.fixture(params=["light", "dark"])
def opened(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    found = Opened(browser, page_file, color_scheme=request.param)
    found.page.wait_for_selector("html[data-ready=true]", state="attached")
    yield found
    found.page.close()


def test_the_page_opens_without_errors_and_without_the_network(opened: Opened) -> None:
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.endswith("report.html")] == []
    assert opened.page.locator(".chart .main-svg").count() >= 4


def test_the_page_tells_the_stored_numbers(opened: Opened) -> None:
    text = opened.page.inner_text("body")
    for told in ("3.46x", "95 % interval 3.46 to 3.46", "1.2 %", "of 2 % allowed", "21 settings"):
        assert told in text
    assert "<b>3.46x</b>" not in text  # the figure's own markup is drawn
    assert opened.page.locator(".chart", has_text="3.46x").count() >= 1


def test_text_from_outside_is_shown_and_never_run(opened: Opened) -> None:
    assert opened.complaints == []  # no alert
    assert opened.page.locator(".injected").count() == 0
    assert opened.page.locator("img[src=x]").count() == 0
    assert "{{ 7 * 7 }}" in opened.page.inner_text(".pairs")
    assert "<b class=injected>bold</b>" in opened.page.inner_text(".pairs")
    # Also where plotly draws it.
    assert opened.page.locator(".chart", has_text="<b class=injected>").count() >= 1
    # And what is injected after all would not run.
    opened.page.evaluate(
        "() => { const one = document.createElement('script');"
        " one.textContent = 'window.injected = true'; document.body.append(one); }"
    )
    assert opened.page.evaluate("window.injected") is None


def test_the_page_follows_light_and_dark(opened: Opened) -> None:
    page = opened.page

    def colours() -> tuple[str, str]:
        return (
            page.evaluate("getComputedStyle(document.body).backgroundColor"),
            page.locator(".chart .xtitle").first.evaluate("one => getComputedStyle(one).fill"),
        )

    before = colours()
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    page.emulate_media(color_scheme="light" if dark else "dark")
    page.wait_for_function(
        "old => getComputedStyle(document.body).backgroundColor !== old", arg=before[0]
    )
    page.wait_for_function(
        "old => getComputedStyle(document.querySelector('.chart .xtitle')).fill !== old",
        arg=before[1],
    )
    after = colours()
    assert all(one != other for one, other in zip(before, after, strict=True))


def shade_at(opened: Opened, share: float) -> int:
    """The grey in the middle of the first frame's height, at a share of its width."""
    import io

    from PIL import Image

    frame = opened.page.locator(".frame").first
    frame.scroll_into_view_if_needed()
    with Image.open(io.BytesIO(frame.screenshot())) as image:
        found = image.convert("L").getpixel((int(share * image.width), image.height // 2))
    assert isinstance(found, int)
    return found


def test_the_slider_uncovers_the_accelerated_image(opened: Opened) -> None:
    near = pytest.approx
    assert shade_at(opened, 0.3) == near(SHADES[0], abs=2)
    assert shade_at(opened, 0.7) == near(SHADES[1], abs=2)
    slider = opened.page.locator(".frame input").first
    slider.focus()
    slider.press("Home")
    assert shade_at(opened, 0.3) == near(SHADES[1], abs=2)
    slider.press("End")
    assert shade_at(opened, 0.7) == near(SHADES[0], abs=2)


def test_the_difference_and_both_side_by_side_can_be_looked_at(opened: Opened) -> None:
    opened.page.click("button[data-show=difference]")
    assert shade_at(opened, 0.5) == pytest.approx(4 * (SHADES[1] - SHADES[0]), abs=2)
    opened.page.click("button[data-show=side]")
    assert shade_at(opened, 0.25) == pytest.approx(SHADES[0], abs=2)
    assert shade_at(opened, 0.75) == pytest.approx(SHADES[1], abs=2)


def test_nothing_is_wider_than_a_phone(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file, viewport={"width": 375, "height": 700})
    opened.page.wait_for_selector("html[data-ready=true]", state="attached")
    width = opened.page.evaluate("document.documentElement.scrollWidth")
    opened.page.close()
    assert width <= 375


PAPER = {"width": 680, "height": 1000}  # what A4 leaves between its margins, in px


@pytest.fixture
def printed(browser: Any, page_file: Path) -> Iterator[Opened]:
    """The page as it is printed, drawn for a screen before."""
    found = Opened(browser, page_file, viewport={"width": 1280, "height": 900})
    found.page.wait_for_selector("html[data-ready=true]", state="attached")
    found.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    found.page.emulate_media(media="print")
    found.page.set_viewport_size(PAPER)
    yield found
    found.page.close()


def chart_widths(opened: Opened) -> list[float]:
    found = opened.page.eval_on_selector_all(
        ".chart .main-svg", "all => all.map(one => one.getBoundingClientRect().width)"
    )
    assert isinstance(found, list)
    return found


def test_charts_are_no_wider_than_the_paper(printed: Opened) -> None:
    page = printed.page
    room = page.evaluate(
        "(() => { const { width, paddingLeft, paddingRight } = getComputedStyle("
        "document.querySelector('main'));"
        " return parseFloat(width) - parseFloat(paddingLeft) - parseFloat(paddingRight); })()"
    )
    widths = chart_widths(printed)
    assert len(widths) >= 4
    assert max(widths) <= room
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_function(
        "[...document.querySelectorAll('.chart .main-svg')]"
        ".every(one => one.getBoundingClientRect().width > 900)"
    )


def test_paper_shows_both_images_whatever_was_looked_at(printed: Opened) -> None:
    page = printed.page
    for view in ("difference", "side", "slider"):
        page.eval_on_selector(".pairs", "(one, view) => { one.dataset.view = view; }", view)
        frame = page.locator(".frame").first
        one, other = (frame.locator(name).bounding_box() for name in (".baseline", ".accelerated"))
        assert one["width"] == pytest.approx(other["width"], abs=0.5), view
        assert one["x"] + one["width"] < other["x"], view
        assert not frame.locator(".difference").is_visible(), view
        assert frame.locator(".tag").first.is_visible(), view


def test_paper_leaves_out_what_is_folded(printed: Opened) -> None:
    folded = printed.page.locator("details").last
    assert not folded.is_visible()
    folded.evaluate("one => { one.open = true; }")
    assert folded.is_visible()


def test_the_footer_stands_under_the_text_on_paper(printed: Opened) -> None:
    page = printed.page
    page.set_viewport_size(PAPER | {"width": 760})
    text = page.locator("main .first").bounding_box()["x"]
    footer = page.eval_on_selector(
        "footer",
        "one => { const range = document.createRange(); range.selectNodeContents(one);"
        " return range.getBoundingClientRect().x; }",
    )
    assert footer == pytest.approx(text, abs=0.5)
