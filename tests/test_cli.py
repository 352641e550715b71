"""The command line: exit codes, what goes to stdout and what to stderr; a few as real commands."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import shearling
from shearling import cli
from shearling.arch.llama import LLAMA
from shearling.axes.shape import shape_of
from shearling.axes.target import parse_target, resolve_target
from shearling.cli import show
from shearling.cli.options import mixture_words, repeats_words
from shearling.cli.show import step_note
from shearling.draft.draft import Draft
from shearling.errors import UserError
from shearling.recipe import load_recipe
from shearling.stage import Stage

VERBS = ("inspect", "data", "prune", "heal", "eval", "reference", "run", "demo")
ENV = {**os.environ, "PYTHONPATH": str(Path(shearling.__file__).parents[1]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
# A Llama of CONFIG with a tokenizer that knows bytes alone, and documents to read.
MAKE = """
import json, sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
folder = sys.argv[1]
vocab = {token: id for id, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder + "/model")
settings = json.loads(sys.argv[2])
settings.pop("model_type")
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**settings, bos_token_id=None, eos_token_id=0)).save_pretrained(folder + "/model")
"""


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "shearling.cli", *map(str, words)]


def shell(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=cwd, env=ENV, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with `model/` and `corpus/`, made without any of Shearling's code."""
    folder = tmp_path_factory.mktemp("workplace")
    subprocess.run([sys.executable, "-c", MAKE, str(folder), json.dumps(CONFIG)], check=True, env=ENV)
    for domain in ("fields", "hills"):
        (folder / "corpus" / domain).mkdir(parents=True)
        lines = [json.dumps({"text": f"{number} sheep in the {domain} and a dog"}) for number in range(40)]
        (folder / "corpus" / domain / "part.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def stored(workplace) -> subprocess.CompletedProcess[str]:
    return shell("data", "corpus", "--tokenizer", "model", "--out", "store", "--held-out", 0.2, cwd=workplace)


@pytest.fixture
def config_folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def run_main(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["shearling", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


# In process


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    result = CliRunner().invoke(cli.app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert f"Example: shearling {verb}" in re.sub(r"[`│\s]+", " ", result.stdout)
    assert "--json" in result.stdout


@pytest.mark.parametrize("words", [["prune"], ["shave"], ["prune", "m", "--steps", "few"], ["data", "--nonsense"]])
def test_usage_errors_end_with_2(monkeypatch, capsys, words):
    assert run_main(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert "Usage:" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", "absent"], "error: model absent: found neither a local folder nor a Hub id; expected a folder,"),
        (
            ["prune", "m", "--to", "hidden_size=big", "--data", "d", "--out", "o"],
            "error: target hidden_size: found 'big'; expected a whole number; write hidden_size=N\n",
        ),
        (
            ["prune", "m", "--to", "hidden_size=48", "--data", "d", "--out", "o", "--method", "magic"],
            "error: method: found 'magic'; expected ",
        ),
        (
            ["prune", "m", "--to", "hidden_size=48", "--data", "d", "--out", "o", "--start", "cold"],
            "error: masks.start: found 'cold'; expected 'ranked' or 'open'; change start\n",
        ),
        (
            ["heal", "m", "--data", "d", "--out", "o", "--sink", "foo"],
            "error: sinks (--sink): found 'foo'; expected 'tensorboard' or 'wandb'; change sinks\n",
        ),
        (
            ["heal", "m", "--data", "d", "--out", "o", "--tokens", "many"],
            "error: tokens: found 'many'; expected a count of tokens, as 200K, 1.5M or 50B; change tokens\n",
        ),
        (
            ["heal", "m", "--data", "d", "--out", "o", "--tokens", "1M", "--steps", "3"],
            "error: tokens and steps: found both, 1000000 tokens and 3 steps; expected one of them; leave one out\n",
        ),
        (["eval", "m", "--data", "d", "--seq-len", "0"], "error: seq_len: found 0; expected greater than 1;"),
        (["eval", "m", "--data", "d", "--windows", "-1"], "error: windows: found -1; expected greater than 0;"),
        (
            ["data", "d", "--tokenizer", "m", "--out", "o", "--held-out", "2"],
            "error: held_out: found 2.0; expected less than 1; change held_out\n",
        ),
        (
            ["heal", "m", "--data", "d", "--out", "o", "--weights", "=1"],
            "error: --weights: found '=1'; expected domain=number; write as a=.5,b=.5\n",
        ),
        (
            ["heal", "m", "--data", "d", "--out", "o", "--seed", str(2**64)],
            "error: seed: found 18446744073709551616; expected less than 9223372036854775808; change seed\n",
        ),
        (
            ["data", "d", "--tokenizer", "m", "--out", "o", "--seed", str(-(2**64))],
            "error: seed: found -18446744073709551616; expected greater than or equal to -9223372036854775808;",
        ),
        (["run", "absent.yaml"], "error: recipe absent.yaml: found No such file or directory; expected a YAML file"),
    ],
)
def test_mistakes_end_with_2_and_the_plain_message(monkeypatch, capsys, tmp_path, words, told):
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(told)
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_steps_take_the_place_of_the_papers_tokens(monkeypatch):
    from shearling.verbs import prune

    asked = {}
    monkeypatch.setattr(prune, "prune", lambda *_, **options: asked.update(options) or {})
    words = ["prune", "m", "--to", "hidden_size=8", "--data", "d", "--out", "o", "--paper", "--steps", 3, "--json"]
    assert run_main(monkeypatch, *words) == 0
    assert (asked["asked"].steps, asked["asked"].tokens, asked["asked"].seq_len) == (3, None, 4096)
    assert asked["asked"].masks.relaxation == "hard_concrete"


def test_inspect_prints_tables_or_one_object(monkeypatch, capsys, config_folder):
    assert run_main(monkeypatch, "inspect", config_folder) == 0
    text = capsys.readouterr().out
    assert run_main(monkeypatch, "inspect", config_folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"]["hidden_size"] == 32
    assert found["parameters"] == sum(found["parameters_by_group"].values())
    assert f"{found['parameters']:,} parameters" in text


# As real commands


def test_domains_may_have_an_equals_sign_in_their_names():
    assert mixture_words("auto", "lang=en=.5, lang=de=.5") == {"weights": {"lang=en": 0.5, "lang=de": 0.5}}
    assert repeats_words("lang=en=4") == {"lang=en": 4}


def test_a_draft_that_cannot_be_written_is_not_lost(monkeypatch, capsys, tmp_path, config_folder):
    drafted = Draft("mine", LLAMA, ("hidden",))
    monkeypatch.setattr("shearling.draft.draft.draft_model", lambda model: drafted)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", lambda *args, **kwargs: raising(full))
        assert run_main(monkeypatch, "inspect", config_folder, "--draft", "--out", tmp_path / "f.yaml") == 2
    told = capsys.readouterr()
    assert drafted.text() in told.out
    assert "f.yaml: found it can't be written (No space left on device)" in told.err
    within = config_folder / "config.json" / "f.yaml"
    monkeypatch.setattr("shearling.draft.draft.draft_model", lambda model: pytest.fail("it was drafted"))
    assert run_main(monkeypatch, "inspect", config_folder, "--draft", "--out", within) == 2
    assert "config.json, which is no folder; expected a folder that you may write to" in capsys.readouterr().err


def raising(error: Exception) -> None:
    raise error


def test_the_version():
    result = shell("--version")
    assert (result.returncode, result.stdout) == (0, f"{shearling.__version__}\n")


def test_what_nobody_expected_ends_with_1():
    script = "from shearling import cli\nfrom shearling.verbs import inspect\ninspect.inspect = None\ncli.main()"
    words = [sys.executable, "-c", script, "inspect", "x"]
    result = subprocess.run(words, env=ENV, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "TypeError" in result.stderr
    assert result.stdout == ""


FAILING = """
from shearling import cli
from shearling.errors import OnAnotherRank
from shearling.verbs import inspect

def failed(*args, **options):
    raise OnAnotherRank

inspect.inspect = failed
cli.main()
"""


def test_a_rank_that_another_failed_says_so_in_a_line():
    words, env = [sys.executable, "-c", FAILING, "inspect", "x"], {**ENV, "RANK": "3"}
    result = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "rank 3: another rank could not do its part: see what it said\n"


def test_data_counts_what_it_stored(stored):
    assert stored.returncode == 0, stored.stderr
    lines = [line.split() for line in stored.stdout.splitlines()]
    assert ["domain", "train", "tokens", "held", "out"] in lines
    counts = {line[0]: line[1:] for line in lines if line[0] in ("fields", "hills")}
    assert counts.keys() == {"fields", "hills"}
    assert all(int(count.replace(",", "")) > 0 for pair in counts.values() for count in pair)


def test_three_mistakes_as_commands(workplace, stored):
    prune = ["prune", "model", "--data", "store", "--out", "never", "--seq-len", 16]
    mistakes = [
        ([*prune, "--to", "hiden_size=24"], "target: found 'hiden_size'; expected a size of a Llama: hidden_size,"),
        (
            [*prune, "--to", "hidden_size=30"],
            "target hidden_size: found 30 with num_attention_heads=4; expected a mult",
        ),
        (["eval", "model", "--data", "corpus"], "corpus/manifest.json: found no such file; expected a token store;"),
    ]
    for words, told in mistakes:
        result = shell(*words, cwd=workplace)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {told}")
        assert result.stdout == ""
    assert not list(workplace.glob("never*"))


def test_ctrl_c_saves_and_the_same_command_then_goes_on(workplace, stored):
    words = ["prune", "model", "--to", "hidden_size=24", "--method", "masks", "--data", "store", "--out", "small"]
    words += ["--steps", 200, "--seq-len", 16, "--batch-tokens", 64, "--json"]
    record = workplace / "small.partial" / "record.jsonl"
    with subprocess.Popen(
        command(*words),
        cwd=workplace,
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        while not (record.is_file() and '"event": "step"' in record.read_text()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"it ended with {process.wait(0.05)}")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode == 130
    step = int(re.search(r"stopped at step (\d+), which is saved: the same command goes on from there\n$", told)[1])
    assert not (workplace / "small").exists()

    result = shell(*words, cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["done_before"] is False
    events = [json.loads(line) for line in (workplace / "small" / "record.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [step]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 201))
    assert not (workplace / "small" / "checkpoints").exists()
    assert len(result.stdout.splitlines()) == 1
    assert json.loads((workplace / "small" / "config.json").read_text())["hidden_size"] == 24
    assert not list(workplace.glob("small.partial*"))

    evaluated = shell("eval", "small", "--data", "store", "--seq-len", 16, "--windows", 4, "--json", cwd=workplace)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["losses"].keys() == {"fields", "hills"}
    assert len(evaluated.stdout.splitlines()) == 1


def test_a_second_process_on_the_same_output_is_refused(workplace, stored):
    words = ["data", "corpus", "--tokenizer", "model", "--out", "twice"]
    with Stage(workplace / "twice", {"verb": "data"}):
        result = shell(*words, cwd=workplace)
        assert not (workplace / "twice").exists()
    assert result.returncode == 2
    assert f"twice.partial.lock: found process {os.getpid()} on host" in result.stderr


def on_two_ranks(*words: object, restarts: int = 0) -> list[str]:
    """By torchrun, which starts the ranks again so often if one of them dies."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    return [sys.executable, *launcher, "-m", "shearling.cli", *map(str, words)]


def pid_of_rank(launcher: int, rank: int) -> int:
    """Of a rank that torchrun has started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes().replace(b"LOCAL_RANK", b""):
            return int(child)
    raise AssertionError("no such rank")


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_fault_17_a_rank_that_dies_takes_the_other_down_or_both_start_again(workplace, stored, restarts):
    out = workplace / f"ranks-{restarts}"
    words = ["heal", "model", "--data", "store", "--out", out.name, "--steps", 60, "--seq-len", 16]
    words += ["--batch-tokens", 64, "--save-every", 2, "--json"]
    saved = workplace / f"{out.name}.partial" / "checkpoints"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        on_two_ranks(*words, restarts=restarts), cwd=workplace, env=ENV, text=True, **pipes
    ) as process:
        while not list(saved.glob("step-?")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"it ended with {process.wait(0.05)}")
        os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
        printed, told = process.communicate(timeout=60 if restarts == 0 else 240)
    if restarts == 0:
        assert process.returncode != 0
        assert "exitcode  : -9" in told
        assert list(saved.glob("step-?*"))
    else:
        assert process.returncode == 0, told
        assert json.loads(printed)["tokens"] == 60 * 64
        events = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 61))
        assert [event["ranks"] for event in events if event["event"] == "resumed"] == [2]


def test_what_the_progress_line_says() -> None:
    figures = {"loss": 2.3456, "tokens_per_second": 12345.6, "data_wait_share": 0.01, "memory_bytes": 1_234_000_000}
    assert step_note(figures) == "loss 2.346; 12,346 tokens/s, 1.23 GB"
    on_a_gpu = step_note({**figures, "mfu": 0.412, "data_wait_share": 0.25})
    assert on_a_gpu == "loss 2.346; 12,346 tokens/s, MFU 41.2%, 1.23 GB, 25% waiting for data"


def test_a_log_gets_a_line_a_minute(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr(show, "monotonic", lambda: now[0])
    figures = {"loss": 2.3456, "tokens_per_second": 12345.6, "data_wait_share": 0.01, "memory_bytes": 1_234_000_000}
    for quiet in (True, False):
        with show.Progress(quiet=quiet) as progress:
            update = progress.steps("healing", 2000)
            for step in range(401, 405):  # gone on with at 400; 40 seconds a step
                now[0] += 40
                update(step, figures, {"web": 0.5})
            now[0] += 100
            progress.documents("web", 1500, 2_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "healing: step 402 of 2,000, 17:45:20 left; loss 2.346; 12,346 tokens/s, 1.23 GB; behind: web +0.50",
        "healing: step 404 of 2,000, 17:44:00 left; loss 2.346; 12,346 tokens/s, 1.23 GB; behind: web +0.50",
        "web: 1,500 documents, 2,000,000 tokens",
    ]


SMOLLM2 = {**CONFIG, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}


def test_examples_of_help_are_such_as_are_accepted():
    examples = {command.callback.__name__: command.epilog or "" for command in cli.verbs.app.registered_commands}
    to = re.search(r"--to (\S+)", examples["prune"])
    resolve_target(LLAMA, shape_of(LLAMA, SMOLLM2), parse_target(to[1]))
    path, setting = re.search(r"run (\S+) --set (\S+)`", examples["run"]).groups()
    assert load_recipe(Path(shearling.__file__).parents[1] / path, [setting]).heal.steps == 400


def test_a_size_without_its_sign():
    with pytest.raises(UserError, match=r"target: found 'hidden_size:48'; expected sizes by name; write it as"):
        parse_target("hidden_size:48")


def test_the_demo_takes_no_folder_with_something_else_in_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    result = CliRunner().invoke(cli.verbs.app, ["demo", "--out", str(tmp_path)])
    assert "found model.safetensors; expected nothing there, or what demos leave" in str(result.exception)
    assert len(list(tmp_path.iterdir())) == 1
