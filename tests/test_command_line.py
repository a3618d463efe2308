"""From words and a YAML file to a configuration; what is refused, in one line; `--help`; docs/flags.md."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bilora_diffusion import __version__
from bilora_diffusion.command_line import flags_markdown, parse
from bilora_diffusion.config import FLAGS, GROUPS, TrainingConfig
from bilora_diffusion.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["--pretrained_model_name_or_path", "tiny-random", "--instance_data_dir", "photos"]
BOOLS = [name for name, flag in FLAGS.items() if flag.kind is bool]


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, text: str | bytes) -> str:
    file = folder / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_the_least_words_give_the_defaults() -> None:
    assert parse(WORDS) == TrainingConfig(pretrained_model_name_or_path="tiny-random", instance_data_dir="photos")


@pytest.mark.parametrize("name", [name for name in BOOLS if name != "with_prior_preservation"])
def test_a_switch_can_be_said_in_all_ways(name: str) -> None:
    true = [[f"--{name}"], [f"--{name}", "True"], [f"--{name}=true"], [f"--{name}", "1"]]
    false = [[f"--no-{name}"], [f"--{name}", "False"], [f"--{name}=false"], [f"--{name}", "no"]]
    assert [getattr(parse(WORDS + words), name) for words in true] == [True] * 4
    assert [getattr(parse(WORDS + words), name) for words in false] == [False] * 4


def test_a_switch_before_another_flag_takes_nothing_from_it() -> None:
    config = parse(["--center_crop", *WORDS, "--random_flip", "--rank", "8"])
    assert (config.center_crop, config.random_flip, config.rank) == (True, True, 8)


def test_numbers_and_texts() -> None:
    config = parse([*WORDS, "--rho", "1e-3", "--rank=8", "--seed", "0", "--instance_prompt", "a photo of sks dog"])
    assert (config.rho, config.rank, config.seed) == (1e-3, 8, 0)
    assert config.instance_prompt == "a photo of sks dog"


def test_the_last_of_two_wins() -> None:
    assert parse([*WORDS, "--rank", "8", "--rank", "16"]).rank == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rhoo", "0.1"], "unknown flag --rhoo: did you mean --rho?"),
        (["--rhoo=0.1"], "unknown flag --rhoo: did you mean --rho?"),
        (["--max-train-steps", "3"], "unknown flag --max-train-steps: did you mean --max_train_steps?"),
        (["-rank", "3"], "unknown flag -rank: did you mean --rank?"),
        (["--learning", "3"], "unknown flag --learning: did you mean --learning_rate?"),
        (["--no_center_crop"], "unknown flag --no_center_crop: did you mean --no-center_crop?"),
        (["--qqqq"], "unknown flag --qqqq: --help lists them"),
        (["--bad\nname"], "unknown flag --bad\\nname"),
        (["photos"], "unexpected 'photos': a value belongs behind its flag"),
        (["--rank"], "--rank: needs a value"),
        (["--rho", "-1e-3"], "--rho: needs a value"),
        (["--rho=-1e-3"], "--rho is -0.001: it must be a number >= 0"),
        (["--rank", "-1"], "--rank is -1: it must be an integer in [1, 1024]"),
        (["--rank", "4.0"], "--rank is '4.0': it must be an integer in [1, 1024]"),
        (["--rank", "none"], "--rank is 'none': it must be an integer in [1, 1024]"),
        (["--rho", "abc"], "--rho is 'abc': it must be a number >= 0"),
        (["--rho", "nan"], "--rho is nan: it must be a number >= 0"),
        (["--center_crop", "perhaps"], "--center_crop is 'perhaps': it must be true or false"),
        (["--no-center_crop", "True"], "unexpected 'True'"),
        (["--no-center_crop=True"], "--no-center_crop: takes no value"),
        (["--method", "nonsense"], "--method is 'nonsense': it must be one of bilora, lora, bilora-fresh, "),
        (["--ascent", "adam"], "did you mean adamw?"),
        (["--revision", ""], "--revision is empty"),
        (["--dataset_name", "x"], "--dataset_name and --instance_data_dir are both set"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given 2 times"),
        (["--config", "missing.yaml"], "--config missing.yaml: cannot be read: No such file or directory"),
        (["--config", "."], "--config .: cannot be read: Is a directory"),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    assert message in refusal([*WORDS, *words])


def test_what_is_required_is_named() -> None:
    assert "--pretrained_model_name_or_path is missing" in refusal([])
    assert "--instance_data_dir" in refusal(WORDS[:2])


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "rank: 8\nlearning_rate: 1e-3\ncenter_crop: yes\nmax_train_steps: 10\nrho: 1\n")
    config = parse([*WORDS, "--config", file])
    assert (config.rank, config.learning_rate, config.center_crop, config.rho) == (8, 1e-3, True, 1.0)
    # Said and equal to the default, it still wins.
    config = parse(["--config", file, *WORDS, "--rank", "4", "--no-center_crop", "--max_train_steps", "none"])
    assert (config.rank, config.center_crop, config.max_train_steps) == (4, False, None)


def test_a_rival_on_the_command_line_displaces_the_files(tmp_path: Path) -> None:
    file = written(tmp_path, "pretrained_model_name_or_path: b\nrho_relative: 0.01\ndataset_name: owner/dogs\n")
    config = parse(["--config", file, "--rho", "0.05", "--instance_data_dir", "photos"])
    assert (config.rho, config.rho_relative, config.dataset_name) == (0.05, None, None)
    both = written(tmp_path, "rho: 1\nrho_relative: 0.01\n")
    assert "--rho and --rho_relative" in refusal([*WORDS, "--config", both])


def test_a_few_crops_on_the_command_line_displace_the_files_middle(tmp_path: Path) -> None:
    def crops(line: str, *given: str) -> tuple[bool, int | None]:
        config = parse([*WORDS, "--config", written(tmp_path, line), *given])
        return config.center_crop, config.crops_per_image

    assert crops("center_crop: true", "--crops_per_image", "4") == (False, 4)
    assert crops("crops_per_image: 4", "--center_crop") == (True, None)
    assert crops("crops_per_image: 4", "--no-center_crop") == (False, 4)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeffrank: 4\n", "{rank: 4}", '{"rank": 4}'])
def test_files_that_change_nothing(text: str, tmp_path: Path) -> None:
    assert parse([*WORDS, "--config", written(tmp_path, text)]) == parse(WORDS)


def test_a_no_that_yaml_takes_for_false(tmp_path: Path) -> None:
    assert parse([*WORDS, "--config", written(tmp_path, "mixed_precision: no\n")]).mixed_precision == "no"
    assert parse([*WORDS, "--config", written(tmp_path, "mixed_precision: null\n")]).mixed_precision is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 4\nrhoo: 1\n", ", line 2: unknown key 'rhoo': did you mean rho?"),
        ("max-train-steps: 1\n", ", line 1: unknown key 'max-train-steps': did you mean max_train_steps?"),
        ("--rank: 4\n", "unknown key '--rank': did you mean rank?"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("1: 4\n", "unknown key '1'"),
        ("[a]: 4\n", "unknown key \"['a']\""),
        ("rank: 4\nrank: 8\n", ", line 2: rank is set a second time"),
        ("rank: '4'\n", ", line 1: rank is '4': it must be an integer in [1, 1024]"),
        ("rank: 3.0\n", "rank is 3.0: it must be an integer in [1, 1024]"),
        ("rank: true\n", "rank is True: it must be an integer in [1, 1024]"),
        ("rank: 0\n", ", line 1: rank is 0: it must be an integer in [1, 1024]"),
        ("rank:\n", "rank is null: it must be an integer in [1, 1024]; leave it out for the default"),
        ("rank: [1, 2]\n", "rank is [1, 2]: it must be an integer in [1, 1024]"),
        ("rho: abc\n", "rho is 'abc': it must be a number >= 0"),
        ("rho: .nan\n", "rho is nan: it must be a number >= 0"),
        ("center_crop: 'yes'\n", "center_crop is 'yes': it must be true or false"),
        ("center_crop: 0\n", "center_crop is 0: it must be true or false"),
        ("method: nonsense\n", "method is 'nonsense': it must be one of bilora, lora, bilora-fresh, "),
        ("optimizer: adam\n", "did you mean AdamW?"),
        ("revision: 12\n", "revision is 12: it must be text; put it in quotes"),
        ("output_dir: 2026-01-01\n", "it must be text; put it in quotes"),
        ("output_dir: 2026-13-01\n", "not valid YAML"),
        ("rank: 4\nrho: [1\n", ", line 3: not valid YAML"),
        ("rank: 4\n\trho: 1\n", ", line 2: not valid YAML"),
        ("rank: !!python/object:os.system {}\n", "not valid YAML"),
        ("- rank\n", "it must hold lines of the form flag: value"),
        ("rank 4\n", "it must hold lines of the form flag: value"),
        ("rank: 4\n---\nrank: 8\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        (b"\xff\xfe\x00rank", "not a text file in UTF-8"),
        (b"rank: \x00\n", "not valid YAML"),
    ],
)
def test_wrong_files(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    refused = refusal([*WORDS, "--config", file])
    assert message in refused
    assert file in refused


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


def test_help_is_grouped_whole_and_fast() -> None:
    heavy = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "numpy", "PIL")
    code = (
        "import sys\nfrom bilora_diffusion.command_line import parse\n"
        "try: parse(['--help'])\n"
        f"finally: print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert time.perf_counter() - began < 2
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert all(f"\n{group}:\n" in done.stdout for group in GROUPS)
    assert all(f"\n  --{name} " in done.stdout for name in [*FLAGS, "config"])


def test_the_committed_table_is_the_generated_one() -> None:
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert text == flags_markdown(), "run: python -m bilora_diffusion.command_line > docs/flags.md"
