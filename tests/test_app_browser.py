"""The app as a person uses it, in a real Chromium, on the embedded base."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from app_server import BOTH, LAPTOP, PHONE, PLAIN, Server, chromium, screenshot, serve, write_outputs
from lora_samples import PROMPT
from PIL import Image

from bilora_diffusion.bases import Base
from bilora_diffusion.generation.engine import Engine
from bilora_diffusion.generation.png import read_settings
from bilora_diffusion.generation.settings import PictureSettings
from bilora_diffusion.grid import LABEL_PX, LEAST_SIDE_PX
from bilora_diffusion.runs import find_run, list_runs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(write_outputs(tmp_path_factory.mktemp("browser") / "outputs")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Callable]:
    with chromium() as open_page:
        yield open_page


@pytest.fixture
def page(server: Server, browser: Callable) -> Iterator:
    page = browser(server.url)
    yield page
    assert page.errors == [] and page.outside == []
    page.context.close()


def wait_for(page, area: str, text: str) -> None:
    page.wait_for_function("([area, text]) => document.querySelector(area)?.innerText.includes(text)", arg=[area, text])


def set_number(page, area: str, value: int) -> None:
    field = page.locator(f"{area} input[type=number]")
    for _ in range(5):  # a section that is just opening still writes its defaults into its fields
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(200)
        if field.input_value() == str(value):
            return
    raise AssertionError(f"{area} does not keep {value}")


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option", name=option, exact=True).click()


def generate(page, prompt: str = PROMPT, steps: int = 3) -> None:
    page.fill("#prompt textarea", prompt)
    set_number(page, "#steps", steps)
    page.click("#generate-button")
    wait_for(page, "#status", "Done")


def open_compare(page, prompts: str = PROMPT, steps: int = 2) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-prompts textarea", prompts)
    page.get_by_role("button", name="Settings").locator("visible=true").click()
    set_number(page, "#compare-steps", steps)


def compare(page, prompts: str = PROMPT, steps: int = 2) -> None:
    open_compare(page, prompts, steps)
    page.click("#compare-button")
    wait_for(page, "#compare-status", "Done")


def downloaded(page, press: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click(press)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_generate_and_take_the_settings_back(page, server: Server, tmp_path: Path) -> None:
    choose(page, "LoRA", "Bi-LoRA: both")
    set_number(page, "#seed", 41)
    page.fill("#prompt textarea", PROMPT)
    set_number(page, "#steps", 3)
    page.locator("#prompt textarea").press("Control+Enter")
    wait_for(page, "#status", "Done: seed 41")
    picture = page.locator("#gallery img").first
    picture.wait_for()
    source = picture.get_attribute("src")
    assert source.endswith(".png")
    path = tmp_path / "picture.png"
    path.write_bytes(page.request.get(source).body())
    settings = PictureSettings.from_json(read_settings(path))
    (drawn,) = Engine(Base("embedded")).draw(settings, [(server.outputs.parent / BOTH, BOTH, 1.0)])
    with Image.open(path) as file:
        assert file.tobytes() == drawn.picture.tobytes()
    screenshot(page, "generate")
    # The form is filled from the file.
    page.fill("#prompt textarea", "something else")
    set_number(page, "#seed", 5)
    page.locator("#png input[type=file]").set_input_files(path)
    wait_for(page, "#status", "settings of picture.png")
    assert page.input_value("#prompt textarea") == PROMPT
    assert page.input_value("#seed input[type=number]") == "41"
    # The box is free for the next, which may be dropped anywhere. A picture of another program is told.
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    page.locator("#png input[type=file]").wait_for(state="attached")
    drop(page, "#gallery", tmp_path / "other.png")
    wait_for(page, "#status", "holds no settings")


def drop(page, where: str, path: Path) -> None:
    """A file let go over an element, as a browser tells it; no page may leave it to the browser to open the file."""
    given = page.evaluate_handle(
        """([name, numbers]) => {
            const given = new DataTransfer();
            given.items.add(new File([new Uint8Array(numbers)], name, { type: "image/png" }));
            return given;
        }""",
        [path.name, list(path.read_bytes())],
    )
    for kind in ("dragover", "drop"):
        script = "(one, [kind, given]) => !one.dispatchEvent(new DragEvent(kind, " + (
            "{ bubbles: true, cancelable: true, dataTransfer: given }))"
        )
        assert page.eval_on_selector(where, script, [kind, given]), f"{kind} is left to the browser"


def test_what_the_base_does_not_read_is_told(page) -> None:
    page.fill("#prompt textarea", "a lion, " * 20 + "at the seaside")
    set_number(page, "#steps", 1)
    page.click("#generate-button")
    wait_for(page, "#status", "longer than the base reads; left out is:")
    assert page.inner_text("#status").strip().endswith("at the seaside")
    compare(page, f"{PROMPT}\n{'a lion, ' * 20}", steps=1)
    wait_for(page, "#compare-status", "longer than the base reads")


def test_what_was_drawn_before_a_cancel_is_kept(page) -> None:
    page.fill("#prompt textarea", PROMPT)
    set_number(page, "#steps", 10)
    set_number(page, "#pictures", 16)
    page.click("#generate-button")
    wait_for(page, "#status", "Picture 2 of 16")
    page.click("#cancel-button")
    wait_for(page, "#status", "of 16: seed 0")
    assert page.locator("#gallery img").count() >= 1 and "Cancelled after" in page.inner_text("#status")


def test_the_dice(page) -> None:
    page.click("#dice")
    page.wait_for_function("document.querySelector('#seed input').value !== '0'")
    assert 0 <= int(page.input_value("#seed input")) < 2**32


def test_compare_with_the_slider_and_the_files(page, server: Server, tmp_path: Path) -> None:
    compare(page, f"{PROMPT}\nan icon of a sun")
    table = page.locator("#comparison table")
    assert table.locator("thead th").all_inner_texts() == ["base", "LoRA", "Bi-LoRA"]
    assert table.locator("img").count() == 6
    text = page.inner_text("#comparison") + page.inner_text("#comparison-facts")
    for word in ("Rank", "rho", "1.5", "Training prompt", "Trained", "picture and prompt", "nearest training picture"):
        assert word in text
    # The slider: its line follows the mouse, and shows more of the one and less of the other.
    slider = page.locator("#slider")
    slider.locator("img").nth(1).wait_for()
    slider.scroll_into_view_if_needed()
    handle = slider.locator(".handle, [role=slider], .slider, .outer").first
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] + before["width"] / 2 - 120, before["y"] + before["height"] / 2, steps=5)
    page.mouse.up()
    after = handle.bounding_box()
    assert before["x"] - after["x"] > 80
    screenshot(page, "compare")
    path = downloaded(page, "#download-png", tmp_path)
    with Image.open(path) as sheet:
        assert sheet.height == LABEL_PX + 2 * LEAST_SIDE_PX
    settings = json.loads(downloaded(page, "#download-json", tmp_path).read_text())
    assert settings["columns"][2]["loras"] == [{"file": BOTH, "weight": 1.0}]
    assert settings["columns"][1]["loras"][0]["file"] == PLAIN and settings["steps"] == 2
    # Not on the wrong tab.
    page.get_by_role("tab", name="Generate").click()
    page.locator("#png input[type=file]").set_input_files(path)
    wait_for(page, "#status", "drop it on the Compare tab")
    page.get_by_role("tab", name="Compare").click()
    # Both files fill the form again.
    page.fill("#compare-prompts textarea", "")
    page.locator("#compare-file input[type=file]").set_input_files(path)
    wait_for(page, "#compare-status", "settings of comparison.png")
    assert page.input_value("#compare-prompts textarea") == f"{PROMPT}\nan icon of a sun"


def test_sweep(page) -> None:
    open_compare(page)
    page.get_by_role("button", name="Sweep").click()
    choose(page, "From row to row changes", "weight")
    page.fill("#sweep-values textarea", "0, 0.5, 1")
    page.locator("#sweep-values textarea").press("Control+Enter")
    wait_for(page, "#compare-status", "Done: 9 pictures")
    assert re.findall(r"weight [\d.]+", page.inner_text("#comparison")) == ["weight 0", "weight 0.5", "weight 1"]
    screenshot(page, "sweep")
    page.fill("#sweep-values textarea", "0, much")
    page.click("#compare-button")
    wait_for(page, "#compare-status", "weight is 'much'")


def test_cancel(page) -> None:
    page.fill("#prompt textarea", PROMPT)
    set_number(page, "#steps", 150)
    set_number(page, "#seed", 1)
    set_number(page, "#pictures", 16)
    page.click("#generate-button")
    wait_for(page, "#status", "of 150")
    page.wait_for_selector("#status .forming")
    screenshot(page, "forming")
    page.click("#cancel-button")
    page.set_default_timeout(5_000)
    wait_for(page, "#status", "Cancelled")
    page.set_default_timeout(60_000)
    generate(page)


def test_bad_files_are_told_and_the_app_goes_on(page, server: Server, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    narrow = tmp_path / "narrow.safetensors"
    tensors = load_file(server.outputs.parent / PLAIN)
    save_file({k: t[:, :-1].contiguous() if "lora_A" in k else t for k, t in tensors.items()}, narrow)
    nan = tmp_path / "nan.safetensors"
    save_file({k: t * float("nan") for k, t in tensors.items()}, nan)
    random, model = tmp_path / "random.safetensors", tmp_path / "model.safetensors"
    random.write_bytes(os.urandom(10 * 2**20))
    save_file({"model.weight": torch.zeros(4)}, model)
    for path, text in (
        (random, "no safetensors file"),
        (model, "is no LoRA"),
        (narrow, "is for another base"),
        (nan, "are no numbers"),
    ):
        page.locator("input[type=file][accept*='safetensors']").first.set_input_files(path)
        wait_for(page, "#status", text)
        assert page.locator("#status .error").count() == 1
    screenshot(page, "bad_file")
    generate(page)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Column 2").click()
    assert not {"narrow", "nan"} & set(re.findall(r"\w+", " ".join(page.get_by_role("option").all_inner_texts())))


def test_a_page_knows_the_files_of_the_moment(server: Server, browser: Callable, tmp_path: Path) -> None:
    """Also those that came after the app was started."""
    with serve(tmp_path / "outputs") as empty:
        (tmp_path / "outputs").mkdir(exist_ok=True)
        page = browser(empty.url)
        page.get_by_role("tab", name="Compare").click()
        columns = page.get_by_label(re.compile("^Column [1-4]$"))
        names = "[...document.querySelectorAll('input')].map((one) => one.value)"
        page.wait_for_function(f"{names}.filter((one) => one === 'base (no LoRA)').length === 2")
        shutil.copytree(server.outputs / "plain", tmp_path / "outputs" / "plain")
        shutil.copytree(server.outputs / "both", tmp_path / "outputs" / "both")
        page.reload()
        page.get_by_role("tab", name="Compare").click()
        page.wait_for_function(f"{names}.includes('LoRA: plain') && {names}.includes('Bi-LoRA: both')")
        assert columns.count() >= 4
        page.context.close()


def test_an_uploaded_lora_draws(page, server: Server, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes((server.outputs.parent / PLAIN).read_bytes())
    page.locator("input[type=file][accept*='safetensors']").first.set_input_files(path)
    wait_for(page, "#status", "Uploaded uploaded/mine-")
    generate(page)
    page.get_by_role("button", name="What the LoRAs say").click()
    wait_for(page, "#facts", "uploaded/mine-")


def test_prompts_are_never_html(page) -> None:
    evil = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>{{7*7}}'
    generate(page, evil)
    compare(page, evil)
    assert "<script>" in page.inner_text("#comparison")
    assert page.locator("#comparison script, #comparison img[src=x]").count() == 0
    assert page.evaluate("window.hacked") is None


def test_two_browsers_at_once(server: Server, browser: Callable) -> None:
    """The second is told that it waits, and gets its own pictures."""
    first, second = browser(server.url), browser(server.url)
    first.fill("#prompt textarea", PROMPT)
    set_number(first, "#steps", 150)
    set_number(first, "#pictures", 16)
    first.click("#generate-button")
    wait_for(first, "#status", "of 150")
    second.fill("#prompt textarea", PROMPT)
    set_number(second, "#steps", 2)
    set_number(second, "#seed", 8)
    second.click("#generate-button")
    wait_for(second, "#status", "Waiting: 1 before you")
    screenshot(second, "waiting")
    first.click("#cancel-button")
    wait_for(first, "#status", "Cancelled")
    wait_for(second, "#status", "Done: seed 8")
    assert first.locator("#gallery img").count() == 0
    for page in (first, second):
        page.context.close()


def test_a_closed_browser_does_not_hold_up_others(server: Server, browser: Callable) -> None:
    first, second = browser(server.url), browser(server.url)
    first.fill("#prompt textarea", PROMPT)
    set_number(first, "#steps", 150)
    set_number(first, "#pictures", 16)
    first.click("#generate-button")
    wait_for(first, "#status", "of 150")
    first.context.close()
    second.set_default_timeout(20_000)
    generate(second)
    second.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_it_reads_well(scheme: str, size: dict, server: Server, browser: Callable) -> None:
    page = browser(server.url, size, color_scheme=scheme)
    generate(page)
    screenshot(page, f"generate_{scheme}_{size['width']}")
    fits(page)
    compare(page, PROMPT)
    page.locator("#slider").scroll_into_view_if_needed()
    page.locator("#slider img").nth(0).wait_for()
    screenshot(page, f"compare_{scheme}_{size['width']}")
    fits(page)
    a_picture_is_enlarged(page, f"compare_large_{scheme}_{size['width']}")
    page.context.close()


def a_picture_is_enlarged(page, name: str) -> None:
    """It fills the window; the arrow keys go to its neighbours and no farther, Escape ends it."""
    pictures, large = page.locator(".comparison img"), page.locator(".comparison img.large")
    pictures.nth(0).click()
    box, window = large.bounding_box(), page.viewport_size
    assert (box["x"], box["y"]) == (0, 0)
    assert (box["width"], box["height"]) == pytest.approx((window["width"], window["height"]), abs=16)
    screenshot(page, name)
    page.keyboard.press("ArrowLeft")
    assert large.get_attribute("src") == pictures.nth(0).get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert large.count() == 1 and large.get_attribute("src") == pictures.nth(1).get_attribute("src")
    page.keyboard.press("Escape")
    assert large.count() == 0
    pictures.nth(1).focus()
    page.keyboard.press("Enter")
    assert large.get_attribute("src") == pictures.nth(1).get_attribute("src")
    page.keyboard.press("Escape")


def fits(page) -> None:
    """Nothing but the comparison's own table is wider than the window, and no button leaves it."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    for box in (one.bounding_box() for one in page.locator("button:visible").all()):
        assert box is None or box["x"] + box["width"] <= page.viewport_size["width"] + 1


# --- Training runs ---

START = "#run-name textarea, #run-name input"


def flag(name: str) -> str:
    return f"#flag-{name} textarea, #flag-{name} input"


@pytest.fixture
def no_run_left(server: Server) -> Iterator[None]:
    """Whatever becomes of the test, no training goes on behind it."""
    yield
    for run in list_runs(server.outputs):
        if process := run.process():
            process.kill()


def test_a_run_is_started_watched_stopped_and_opened(server: Server, browser: Callable, no_run_left: None) -> None:
    """Closing the browser does not stop it; its LoRA can be used at once."""
    page = browser(server.url)
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="Start a run").click()
    for group in ("Training", "Method", "Previews"):
        page.get_by_role("button", name=re.compile(f"^{group}")).click()
    page.fill(START, "from the browser")
    page.fill(flag("max_train_steps"), "100000")
    page.fill(flag("train_batch_size"), "1")
    page.fill(flag("rank"), "0")
    page.click("#start-run")
    wait_for(page, "#start-answer", "cannot be a run's")
    page.fill(START, "from_the_browser")
    page.click("#start-run")
    wait_for(page, "#start-answer", "--rank is 0")
    page.fill(flag("rank"), "2")
    page.fill(flag("validation_prompt"), PROMPT)
    page.fill(flag("validation_steps"), "5")
    page.fill(flag("num_validation_images"), "1")
    page.click("#start-run")
    wait_for(page, "#start-answer", "is started")
    wait_for(page, "#runs-table", "from_the_browser")
    page.context.close()

    page = browser(server.url)
    page.set_default_timeout(90_000)
    page.get_by_role("tab", name="Runs").click()
    wait_for(page, "#run-status", "from_the_browser: running, step")
    wait_for(page, "#previews", "step 0000")
    log = page.input_value("#run-log textarea")
    assert "bilora:" in log and "/100000" in log
    screenshot(page, "runs_live")
    page.click("#stop-run")
    wait_for(page, "#run-answer", "Stopping")
    wait_for(page, "#run-status", "from_the_browser: interrupted")
    stopped = find_run(server.outputs, "from_the_browser").state()["step"]
    page.click("#resume-run")
    wait_for(page, "#run-answer", "goes on from its last checkpoint")
    page.click("#resume-run")
    wait_for(page, "#run-answer", "is at work")
    wait_for(page, "#run-status", "from_the_browser: running, step")
    assert find_run(server.outputs, "from_the_browser").state()["step"] >= stopped
    assert "--resume_from_checkpoint latest" in page.input_value("#run-command textarea")
    page.click("#stop-run")
    wait_for(page, "#run-status", "from_the_browser: interrupted")
    page.wait_for_function("document.querySelector('#run-file input')?.value")
    page.click("#to-generate")
    page.locator("#prompt textarea").wait_for()
    names = "[...document.querySelectorAll('input')].map((one) => one.value).join()"
    page.wait_for_function(f"{names}.includes('from_the_browser')")
    generate(page)
    page.context.close()


def test_two_runs_curves_and_a_checkpoint_in_compare(server: Server, browser: Callable) -> None:
    for name, factor in (("alpha_run", 1.0), ("beta_run", 0.5)):
        folder = server.outputs / name
        (folder / "checkpoint-50").mkdir(parents=True)
        lines = [{"step": n, "loss": factor / n, "c_over_rho": min(1, n / 50), "loss_gap": 0.01} for n in range(1, 101)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "state.json").write_text('{"state": "finished", "step": 100, "steps": 100, "pid": 1}')
        (folder / "config.yaml").write_text("method: bilora")
        lora = (server.outputs.parent / BOTH).read_bytes()
        (folder / "checkpoint-50" / "pytorch_lora_weights.safetensors").write_bytes(lora)
    page = browser(server.url)
    page.set_default_timeout(20_000)
    page.get_by_role("tab", name="Runs").click()
    wait_for(page, "#runs-table", "beta_run")
    wait_for(page, "#run-status", "finished")
    for name in ("alpha_run", "beta_run"):
        if name not in page.inner_text("#runs-chosen"):
            page.locator("#runs-chosen input").click()
            page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")
    # Three plots, two lines in each, of two colours.
    lines = "[...document.querySelectorAll('#plots polyline')].map((one) => one.getAttribute('stroke'))"
    try:
        page.wait_for_function(f"{lines}.length === 6 && new Set({lines}).size === 2")
    finally:
        screenshot(page, "runs")
    page.wait_for_function("document.querySelector('#run-file input')?.value === 'checkpoint-50'")
    page.click("#to-compare")
    page.locator("#compare-prompts textarea").wait_for()
    page.fill("#compare-prompts textarea", PROMPT)
    page.click("#compare-button")
    wait_for(page, "#compare-status", "Done")
    wait_for(page, "#comparison-facts", "checkpoint-50")
    page.context.close()


def test_runs_on_a_phone(server: Server, browser: Callable) -> None:
    page = browser(server.url, PHONE, color_scheme="dark")
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="Start a run").click()
    page.wait_for_timeout(500)
    screenshot(page, "runs_dark_390")
    fits(page)
    page.context.close()
