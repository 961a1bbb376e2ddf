"""The report of a real study in a real browser: it is drawn, sorted and searched without a network."""

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import hpo
from tests import browser
from tests.conftest import LINEAR, interrupt_after, run_hpo

pytestmark = pytest.mark.skipif(browser.MISSING is not None, reason=browser.MISSING or "")

STUDY = """
name: wide
objective: linear.py
trials: 12
epochs: 6
tracking: off
stack: 1
pruner: {name: median, n_startup_trials: 4, n_warmup_steps: 1}
sampler: random
start_with:
  - {kind: good, learning_rate: 0.09}
  - {kind: nan}
  - {kind: good, learning_rate: 0.08}
  - {kind: "</script><script>document.title='broken'</script>", learning_rate: 0.07}
  - {kind: good, learning_rate: 0.06}
  - {kind: good, learning_rate: 0.001}
params:
  learning_rate: {type: float, low: 1.0e-3, high: 1.0e-1, log: true}
  kind: {type: categorical, choices: [good, "</script><script>document.title='broken'</script>", nan]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a finished study with pruned, failed and retried trials, and its report."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "linear.py").write_text(LINEAR)
        (folder / "study.yaml").write_text(STUDY)
        interrupt_after("trial 1 failed", "study.yaml")  # trial 2 is in training for a second and more
        done = run_hpo("run", "study.yaml")
        assert done.returncode == 0, done.stderr
        done = run_hpo("report", "study.yaml", "--out", "report.html")
        assert done.returncode == 0, done.stderr
        trials = hpo.open_study("study.yaml").trials
        assert {"COMPLETE", "PRUNED", "FAIL"} <= set(trials["state"])
        assert trials["retry_of"].notna().any()
    return folder


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as opened:
        yield opened


@pytest.fixture
def page(chromium, folder):
    browser.errors(chromium), browser.requests(chromium)
    chromium.get((folder / "report.html").as_uri())
    shown = "#trials-table th button"  # on a busy machine its texts are there before they are laid out
    WebDriverWait(chromium, 30).until(lambda page: page.find_element(By.CSS_SELECTOR, shown).text)
    return chromium


def column(page, name):
    heads = page.find_elements(By.CSS_SELECTOR, "#trials-table th button")
    at = [each.get_attribute("textContent") for each in heads].index(name) + 1
    return [each.text for each in page.find_elements(By.CSS_SELECTOR, f"#trials-table tbody td:nth-child({at})")]


def test_every_figure_is_drawn_without_an_error_or_a_request(page, folder):
    page.execute_script("plots.forEach(draw)")
    plots = page.find_elements(By.CSS_SELECTOR, "[data-figure]")
    assert len(plots) >= 9
    wait = WebDriverWait(page, 30)
    wait.until(lambda page: all(plot.find_elements(By.CSS_SELECTOR, ".main-svg") for plot in plots))
    assert browser.errors(page) == []
    assert browser.requests(page) == [(folder / "report.html").as_uri()]
    assert page.title == "wide: report"  # no text of the study's ran
    assert not page.find_elements(By.CSS_SELECTOR, "[data-title*='hare'], [data-title*='loud']")


def test_the_best_value_is_on_the_page(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    best = hpo.open_study("study.yaml").best
    assert page.find_element(By.ID, "best-value").text == f"{best.value:.6g}"
    body = page.find_element(By.TAG_NAME, "main").text
    assert f"Trial {best.number}, epoch {best.epoch + 1}" in body
    assert "The test set was read once." in body


def test_the_table_is_sorted_by_click_and_by_key(page):
    numbers = [int(each) for each in column(page, "number")]
    assert numbers == sorted(numbers)
    button = next(b for b in page.find_elements(By.CSS_SELECTOR, "#trials-table th button") if b.text == "value")
    head = button.find_element(By.XPATH, "..")
    page.execute_script("arguments[0].click()", button)
    values = [float(each) for each in column(page, "value") if each]
    assert values == sorted(values)
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "value")[-1] == ""  # what is not there comes last, in both directions
    button.send_keys(Keys.ENTER)
    assert [float(each) for each in column(page, "value") if each] == sorted(values, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "value")[-1] == ""
    assert len(page.find_elements(By.CSS_SELECTOR, "[aria-sort=none]")) >= 5


def test_the_table_is_searched(page):
    search = page.find_element(By.ID, "trials-search")
    search.send_keys("Pruned good")
    states = column(page, "state")
    assert states
    assert set(states) == {"PRUNED"}
    assert f"of {len(states)} trials" in page.find_element(By.ID, "trials-shown").text
    search.send_keys(" nothing like it")
    assert page.find_element(By.ID, "trials-shown").text == "no trial has that"


def test_all_trials_are_printed_and_then_the_page_is_as_it_was(page):
    trials = len(column(page, "number"))
    page.execute_script("state.atOnce = 5; state.page = 1; show()")
    assert len(column(page, "number")) == 5
    page.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert len(column(page, "number")) == trials > 5
    assert page.execute_script("return [state.page, state.before]") == [0, 1]
    page.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert page.execute_script("return state.atOnce === PER_PAGE")


def test_another_metric_s_curves_are_chosen(page):
    choice = page.find_element(By.ID, "curve-choice")
    page.execute_script("arguments[0].scrollIntoView()", choice)
    choice.send_keys("train_loss")
    axis = "return document.getElementById('curves-plot').layout.yaxis.title.text"
    WebDriverWait(page, 10).until(lambda page: page.execute_script(axis) == "train_loss")
    assert browser.errors(page) == []


@pytest.mark.parametrize("width", [390, pytest.param(1400, marks=pytest.mark.slow)])
def test_nothing_is_wider_than_the_screen(page, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.execute_script("plots.forEach(draw)")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_script_in_the_page_that_is_not_its_own_does_not_run(page, folder):
    evil = (folder / "report.html").read_text().replace("</main>", "<script>document.title = 'broken'</script></main>")
    (folder / "evil.html").write_text(evil)
    page.get((folder / "evil.html").as_uri())
    assert page.title == "wide: report"
    assert any("Content Security Policy" in error for error in browser.errors(page))
