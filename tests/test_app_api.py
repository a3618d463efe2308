"""The app from programs: the same pictures as the package gives, and nothing that hostile input can do."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from app_server import BOTH, PLAIN, Server, serve, write_outputs
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from lora_samples import PROMPT
from PIL import Image
from safetensors.torch import save_file

from bilora_diffusion.bases import Base
from bilora_diffusion.generation.engine import Engine
from bilora_diffusion.generation.png import read_settings
from bilora_diffusion.generation.settings import PictureSettings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    outputs = write_outputs(tmp_path_factory.mktemp("api") / "outputs")
    (outputs / "secret.txt").write_text("secret")
    with serve(outputs) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(server.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def pixels(path: str | Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def test_the_names_that_programs_rely_on(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/generate", "/compare", "/loras"}
    assert all(one["description"] for one in endpoints.values())
    names = {one["parameter_name"] for one in endpoints["/generate"]["parameters"]}
    assert names == set(PictureSettings().to_json())


def test_loras(client: Client) -> None:
    files = {one["file"]: one for one in client.predict(api_name="/loras")}
    assert {PLAIN, BOTH} <= set(files) and len(files) == 4
    assert files[BOTH]["facts"]["method"] == "bilora" and files[BOTH]["facts"]["rho"] == "1.5"


def test_the_same_picture_as_the_package_gives(client: Client, server: Server) -> None:
    paths, settings = client.predict(
        prompt=PROMPT, loras=[{"file": BOTH, "weight": 0.8}], steps=3, seed=11, pictures=2, api_name="/generate"
    )
    engine = Engine(Base("embedded"))
    lora = (server.outputs.parent / BOTH, BOTH, 0.8)
    drawn = engine.draw(PictureSettings(prompt=PROMPT, steps=3, seed=11, pictures=2), [lora])
    assert [pixels(path) for path in paths] == [one.picture.tobytes() for one in drawn]
    assert all(Path(path).suffix == ".png" for path in paths)
    assert [read_settings(Path(path)) for path in paths] == settings
    again, _ = client.predict(**settings[1], api_name="/generate")
    assert pixels(again[0]) == pixels(paths[1])


def test_compare(client: Client) -> None:
    settings = {"columns": [{}, {"loras": [PLAIN]}, {"loras": [BOTH]}], "prompts": [PROMPT], "steps": 2}
    path, told = client.predict(settings=settings, api_name="/compare")
    assert [column["title"] for column in told["columns"]] == ["base", "LoRA", "Bi-LoRA"]
    assert all(one["value"] is not None for column in told["columns"] for one in column["measures"])
    assert told["columns"][2]["loras"][0]["facts"]["rho"] == "1.5"
    again, _ = client.predict(settings=told["settings"], api_name="/compare")
    assert pixels(again) == pixels(path)
    assert read_settings(Path(path))["comparison"] == told["settings"]


def refusal(client: Client, api_name: str, **values: object) -> str:
    with pytest.raises(AppError) as error:
        client.predict(**values, api_name=api_name)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"prompt": PROMPT, "steps": 10**12}, "steps is 1000000000000"),
        ({"prompt": PROMPT, "steps": "20; rm -rf /"}, "steps is"),
        ({"prompt": PROMPT, "steps": None}, "steps is null"),
        ({"prompt": PROMPT, "width": 10**6}, "width is 1000000"),
        ({"prompt": PROMPT, "pictures": 10**6}, "pictures is"),
        ({"prompt": PROMPT, "seed": {"a": 1}}, "seed is"),
        ({"prompt": ["a"]}, "prompt is"),
        ({"prompt": "x" * 10**6}, "prompt has 1000000 characters"),
        ({"prompt": PROMPT, "guidance_scale": "1e400"}, "guidance_scale is"),
        ({"prompt": PROMPT, "scheduler": "os.system"}, "scheduler is"),
        ({"prompt": PROMPT, "base": "/etc"}, "base is '/etc'"),
        ({"prompt": PROMPT, "base": "tiny-random"}, "there are embedded"),
        ({"prompt": PROMPT, "loras": {"a": 1}}, "loras is"),
        ({"prompt": PROMPT, "loras": [PLAIN] * 100}, "at most 6"),
        ({"prompt": PROMPT, "loras": ["../secret.txt"]}, "only .safetensors"),
        ({"prompt": PROMPT, "loras": ["outputs/../../../etc/x.safetensors"]}, "there is no LoRA file"),
        ({"prompt": PROMPT, "loras": ["/etc/passwd"]}, "only .safetensors"),
        ({"prompt": PROMPT, "loras": [{"file": PLAIN, "weight": "inf"}]}, "weight is inf"),
    ],
)
def test_hostile_values_get_a_sentence(values: dict, word: str, client: Client) -> None:
    text = refusal(client, "/generate", **values)
    assert word in text and "\n" not in text and "Traceback" not in text and len(text) < 500


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ("text", "the comparison is 'text'"),
        ({"columns": [{}] * 40, "prompts": ["a"]}, "2 to 4"),
        ({"columns": [{}, {}], "prompts": ["a"] * 10**4}, "10000 prompts"),
        ({"columns": [{}, {"loras": ["outputs/../x.safetensors"]}], "prompts": ["a"]}, "there is no LoRA file"),
        ({"columns": [{}, {}], "prompts": ["a"], "seeds": [10**30]}, "a seed is"),
    ],
)
def test_hostile_comparisons_get_a_sentence(settings: object, word: str, client: Client) -> None:
    assert word in refusal(client, "/compare", settings=settings)


def test_files_of_others_kinds(client: Client, server: Server, tmp_path: Path) -> None:
    """Files that appear in the folder: random bytes, another model; each gets its line, and the app goes on."""
    (server.outputs / "random.safetensors").write_bytes(os.urandom(10 * 2**20))
    import torch

    save_file({"model.weight": torch.zeros(4)}, server.outputs / "model.safetensors")
    (server.outputs / "link.safetensors").symlink_to("/etc/hostname")
    for name, word in {"random": "no safetensors file", "model": "no LoRA", "link": "there is no"}.items():
        assert word in refusal(client, "/generate", prompt=PROMPT, loras=[f"outputs/{name}.safetensors"])
    assert len(client.predict(api_name="/loras")) == 4
    assert len(client.predict(prompt=PROMPT, steps=1, api_name="/generate")[0]) == 1


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(ROOT / "pyproject.toml"), "../../etc/passwd", "secret.txt", "pyproject.toml"]
)
def test_the_server_gives_no_other_files(path: str, server: Server) -> None:
    for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
        for spelled in (path, quote(path, safe=""), f"{server.outputs}/secret.txt"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{server.url}/{route}{spelled}")
            assert refused.value.code in (400, 403, 404, 405, 422)


def test_a_file_that_was_not_uploaded_is_not_taken(server: Server) -> None:
    """Straight at the tab's own upload handler, past the form: a path of the server's disk."""
    config = json.loads(urllib.request.urlopen(f"{server.url}/config").read())
    handlers = [one for one in config["dependencies"] if any(event == "upload" for _, event in one["targets"])]
    assert len(handlers) >= 2
    for handler in handlers:
        data = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]
        data += [None] * (len(handler["inputs"]) - 1)
        answer = call(server, handler["id"], data)
        assert "root:" not in answer and "error" in answer


def call(server: Server, fn_index: int, data: list) -> str:
    """What the server's queue answers to a raw request."""
    session = f"s{time.time_ns()}"
    body = json.dumps({"data": data, "fn_index": fn_index, "session_hash": session}).encode()
    request = urllib.request.Request(f"{server.url}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=20).read()
        with urllib.request.urlopen(f"{server.url}/gradio_api/queue/data?session_hash={session}", timeout=20) as stream:
            lines = []
            for line in stream:
                lines.append(line.decode())
                if "process_completed" in lines[-1] or "close_stream" in lines[-1]:
                    break
            return "".join(lines)
    except urllib.error.HTTPError as error:
        return f"error {error.code}"


def test_two_programs_at_once_wait_for_each_other(server: Server, tmp_path: Path) -> None:
    """Neither is refused, and each gets the picture it would get alone."""
    results: dict[int, bytes] = {}

    def draw(seed: int) -> None:
        one = Client(server.url, verbose=False, download_files=str(tmp_path / str(seed)))
        loras = [{"file": PLAIN if seed % 2 else BOTH}]
        paths, _ = one.predict(prompt=PROMPT, steps=4, seed=seed, loras=loras, api_name="/generate")
        results[seed] = pixels(paths[0])

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    together = dict(results)
    results.clear()
    for seed in (1, 2, 3, 4):
        draw(seed)
    assert together == results and len(set(results.values())) == 4


def test_uploads_of_the_api_stay_uploads(client: Client, tmp_path: Path) -> None:
    """A client cannot hand over a file in place of a name."""
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(AppError):
        client.predict(prompt=PROMPT, loras=[{"file": handle_file(str(path))}], api_name="/generate")


def test_the_base_can_be_switched(tmp_path: Path) -> None:
    """And back: the first one's picture is the same again."""
    outputs = write_outputs(tmp_path / "outputs")
    with serve(outputs, bases=("embedded", "tiny-random")) as running:
        one = Client(running.url, verbose=False, download_files=str(tmp_path))
        values = {"prompt": PROMPT, "steps": 2, "api_name": "/generate"}
        first = pixels(one.predict(**values)[0][0])
        other, settings = one.predict(**values, base="tiny-random")
        assert pixels(other[0]) != first and settings[0]["base"] == "tiny-random"
        assert pixels(one.predict(**values, base="embedded")[0][0]) == first
        text = refusal(one, "/generate", prompt=PROMPT, base="tiny-random", loras=[PLAIN])
        assert "is for another base" in text and "unet." in text
        assert pixels(one.predict(**values)[0][0]) == first


def test_a_password_is_asked_for_everything(tmp_path: Path) -> None:
    outputs = write_outputs(tmp_path / "outputs")
    with serve(outputs, auth=("me", "secret")) as running:
        for route in ("config", "gradio_api/info", f"gradio_api/file={outputs}/plain/config.yaml"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{running.url}/{route}")
            assert refused.value.code in (401, 403, 404)
        assert "error" in call(running, 0, [PROMPT])
        with pytest.raises(Exception, match=r"(?i)auth|credentials|401"):
            Client(running.url, verbose=False)
        one = Client(running.url, verbose=False, auth=("me", "secret"), download_files=str(tmp_path))
        assert len(one.predict(api_name="/loras")) == 4
