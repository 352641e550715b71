"""The verbs as commands: parse, call, print."""

import logging
import os
import signal as os_signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from shearling import __version__
from shearling.cli.draft import show_draft
from shearling.cli.options import (
    Arch,
    AtEnd,
    Autocast,
    BatchTokens,
    Checkpointing,
    Compile,
    DataStore,
    Device,
    Dtype,
    Every,
    Json,
    KeepEvery,
    KeepLast,
    Kernels,
    KlShare,
    LogEvery,
    LoraRank,
    Lr,
    MicroBatch,
    MixtureRule,
    MixtureSchedule,
    Model,
    Offload,
    Optimizer,
    Out,
    Reference,
    Repeats,
    Replicate,
    SaveEvery,
    Seed,
    Separate,
    SeqLen,
    Signal,
    Sink,
    Steps,
    TeacherCache,
    TeacherModel,
    Tokens,
    Weights,
    Workers,
    mixture_words,
    repeats_words,
    teacher_words,
    those_given,
)
from shearling.cli.show import (
    Progress,
    in_bytes,
    print_figures,
    print_json,
    print_losses,
    print_rows,
    print_table,
    say_done,
)
from shearling.errors import OnAnotherRank, Stopped, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Shears a pretrained language model to exactly the shape you ask for.",
)

INTERRUPTED, TERMINATED = 130, 143  # what typer exits with on Ctrl-C, and what a shell calls SIGTERM


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # Verbs are imported only once their words make sense: a mistake there is told before torch has loaded.
    pass


@app.command(name="inspect", epilog="Example: `shearling inspect models/SmolLM2-135M --json`")
def inspect_(
    model: Model,
    draft: Annotated[
        bool, typer.Option("--draft", help="Propose a table for a model type that has none, and prove it.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Of --draft: the file to write, for --arch.")] = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Shape, axes, parameters per group and memory; a config alone is enough."""
    if draft:
        show_draft(model, out=out, as_json=as_json)
        return
    from shearling.verbs.inspect import inspect

    found = inspect(model, arch=arch)
    if as_json:
        print_json(found)
        return
    active = found["active_parameters"]
    of_them = f" ({active:,} of them for each token)" if active < found["parameters"] else ""
    print(f"{found['family']}, {found['parameters']:,} parameters{of_them}, context {found['context_tokens']:,} tokens")
    print_table("shape", found["shape"])
    print_table("axes", found["axes"])
    print(f"  can be cut along {', '.join(found['cut_along'])}")
    for axis, reason in found["left_whole"].items():
        print(f"  not along {axis}: {reason}")
    print_table("parameters", found["parameters_by_group"])
    if "beside" in found:
        counts = found["beside"]["parameters"]
        shown = {key: "see the weights" if count is None else count for key, count in counts.items()}
        print_table(f"parameters beside the text model ({found['beside']['text_model']})", shown)
    print_table("memory", {k.removesuffix("_bytes"): in_bytes(v) for k, v in found.items() if k.endswith("_bytes")})
    per_token = {"KV-cache": in_bytes(found["kv_cache_bytes_per_token"]), "FLOPs, forward": found["flops_per_token"]}
    print_table("per token", per_token)


@app.command(epilog="Example: `shearling data corpus/ --tokenizer models/SmolLM2-135M --out store`")
def data(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Files, a folder, or a folder with a folder per domain.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The model whose tokenizer to use.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder that the store becomes.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add the documents to the store that --out is.")] = False,
    inspect: Annotated[
        str | None, typer.Option(metavar="STORE", help="Tell what a store holds; with --tokens, how often it is read.")
    ] = None,
    verify: Annotated[str | None, typer.Option(metavar="STORE", help="Read all of a store and check its sums.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Of --inspect: a training budget, 200K, 1.5M, 50B.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of --inspect: code=0.5,prose=0.5; left out, by size.")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of documents held out where no eval file is there.  [default: 0.01]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides which are held out.  [default: 0]")] = None,
    processes: Annotated[int | None, typer.Option(help="Left out, as many as there are cores.")] = None,
    text_column: Annotated[str, typer.Option(help="The column of texts.")] = "text",
    messages_column: Annotated[str | None, typer.Option(help="The column of conversations, instead of texts.")] = None,
    assistant_loss_only: Annotated[
        bool, typer.Option("--assistant-loss-only", help="The loss counts on what the assistant says alone.")
    ] = False,
    tokens_dtype: Annotated[str, typer.Option(help="Of MDS columns of tokens, which don't say.")] = "int64",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Pass over broken records, and count them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Documents to a token store: JSONL, plain text, .gz, .zst; folders of folders are domains by name.

    Killed, the same command goes on where it was.
    """
    if inspect is not None:
        _inspect_store(inspect, tokenizer=tokenizer, tokens=tokens, weights=weights, as_json=as_json)
        return
    if verify is not None:
        _verify_store(verify, as_json=as_json)
        return
    for name, value in (("inputs", inputs), ("--tokenizer", tokenizer), ("--out", out)):
        if not value:
            raise UserError(name, found="nothing", expected="inputs, --tokenizer and --out", change=f"add {name}")
    if add and (held_out is not None or seed is not None):
        change = "leave --held-out and --seed out"
        raise UserError("--add", found="settings", expected="the store's own share and seed", change=change)

    from shearling.recipe import Data, validated

    options = those_given(held_out=held_out, seed=seed, processes=processes, messages_column=messages_column)
    options |= {"text_column": text_column, "tokens_dtype": tokens_dtype, "skip_broken": skip_broken}
    asked = validated(Data, {"inputs": inputs, "assistant_loss_only": assistant_loss_only, **options})

    from shearling.verbs.data import add_documents, make_store

    with Progress(quiet=as_json) as progress:
        if add:
            store = add_documents(asked, tokenizer=str(tokenizer), out=str(out), progress=progress.documents)
            before = False
        else:
            store, before = make_store(asked, tokenizer=str(tokenizer), out=str(out), progress=progress.documents)
    counts = {
        domain: {split: store.num_tokens(domain, split) for split in ("train", "eval")} for domain in store.domains
    }
    if as_json:
        print_json({"out": out, "done_before": before, "tokens": counts})
        return
    say_done(str(out), before)
    print_rows(
        ("domain", "train tokens", "held out"), [(d, f"{c['train']:,}", f"{c['eval']:,}") for d, c in counts.items()]
    )


def _inspect_store(store: str, *, weights: str | None, as_json: bool, **options: str | None) -> None:
    from shearling.recipe import Inspect, parse_shares, validated

    shares = {"weights": parse_shares(weights, "--weights")} if weights else {}
    asked = validated(Inspect, {**those_given(**options), **shares})

    from shearling.verbs.data import inspect_store

    found = inspect_store(store, asked)
    if as_json:
        print_json(found)
        return
    print(f"{store}: ids below {found.vocab_size:,} as {found.dtype}, of {found.tokenizer} ({found.fingerprint[:12]})")
    rows = [
        (
            name,
            f"{domain.documents:,}",
            f"{domain.tokens:,}",
            in_bytes(domain.text_bytes),
            f"{domain.bytes_per_token:.2f}",
            f"{domain.held_out_documents:,}",
            f"{domain.held_out_tokens:,}",
            f"{domain.share:.3f}",
            "" if domain.repeats is None else f"{domain.repeats:.2f}",
        )
        for name, domain in found.domains.items()
    ]
    head = ("domain", "documents", "tokens", "text", "bytes/token", "held out", "tokens", "share", "repeats")
    print_rows(head, rows)
    for name, sample in found.samples.items():
        print(f"\n{name}: {sample!r}")
    if not found.samples:
        print("no samples: its tokenizer isn't on this machine under that name; --tokenizer says where it is")


def _verify_store(store: str, *, as_json: bool) -> None:
    from shearling.verbs.data import verify_store

    count = verify_store(store)
    if as_json:
        print_json({"store": store, "files": count})
        return
    print(f"{store}: {count} files, every sum as in the manifest")


@app.command(
    epilog="Example: `shearling prune models/SmolLM2-135M --to "
    "hidden_size=384,num_attention_heads=6,num_key_value_heads=2 --data store --tokens 2M --out small`"
)
def prune(
    model: Model,
    to: Annotated[str, typer.Option(help="Target sizes in the config's terms: hidden_size=N,...", show_default=False)],
    data: DataStore,
    out: Out,
    method: Annotated[str, typer.Option(help="masks (learned), activation (one-shot), auto (by budget).")] = "auto",
    relaxation: Annotated[str | None, typer.Option(help="Of the masks: soft_topk or hard_concrete.")] = None,
    start: Annotated[str | None, typer.Option(help="Of the masks: ranked (by activations) or open.")] = None,
    masks_only: Annotated[
        bool, typer.Option("--masks-only", help="Leave the weights as they are: 2 bytes a parameter instead of 16.")
    ] = False,
    mask_lr: Annotated[float | None, typer.Option(help="Learning rate of the masks.")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Sheared-LLaMA's masks, constraint, rates and budget.")
    ] = False,
    tokens: Tokens = None,
    steps: Steps = None,
    lr: Lr = None,
    batch_tokens: BatchTokens = None,
    seq_len: SeqLen = None,
    mixture: MixtureSchedule = "auto",
    weights: Weights = None,
    reference: Reference = None,
    mixture_rule: MixtureRule = None,
    signal: Signal = None,
    mixture_every: Every = None,
    teacher: TeacherModel = None,
    kl_share: KlShare = None,
    teacher_cache: TeacherCache = None,
    repeats: Repeats = None,
    at_end: AtEnd = None,
    separate_documents: Separate = False,
    workers: Workers = None,
    log_every: LogEvery = None,
    sink: Sink = None,
    save_every: SaveEvery = None,
    keep_last: KeepLast = None,
    keep_every: KeepEvery = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    autocast: Autocast = "auto",
    compile: Compile = False,
    activation_checkpointing: Checkpointing = "none",
    lora_rank: LoraRank = None,
    optimizer: Optimizer = None,
    offload: Offload = False,
    replicate: Replicate = None,
    micro_batch: MicroBatch = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Cuts a model to exactly the shape that you ask for, by learned masks or by one-shot scores."""
    from shearling.recipe import PAPER_PRUNE, Prune, validated

    masks = those_given(relaxation=relaxation, start=start, lr=mask_lr)
    training = those_given(tokens=tokens, steps=steps, lr=lr, batch_tokens=batch_tokens, seq_len=seq_len, device=device)
    training |= those_given(dtype=dtype, seed=seed, autocast=autocast, compile=compile, workers=workers, at_end=at_end)
    training |= those_given(save_every=save_every, micro_sequences=micro_batch, log_every=log_every, sinks=sink)
    training |= those_given(keep_last=keep_last, keep_every=keep_every, replicate=replicate)
    training |= those_given(lora_rank=lora_rank, optimizer=optimizer, offload=offload)
    training |= {"repeats": repeats_words(repeats), "separate_documents": separate_documents}
    mixing = mixture_words(mixture, weights, reference=reference, rule=mixture_rule, signal=signal, every=mixture_every)
    base = dict(PAPER_PRUNE) if paper else {}
    if steps is not None:
        base.pop("tokens", None)
    asked = {**base, **training, "activation_checkpointing": activation_checkpointing, "to": to, "method": method}
    asked["masks_only"] = masks_only
    asked["masks"] = {**base.get("masks", {}), **masks}
    asked["mixture"] = {**base.get("mixture", {}), **mixing}
    asked["teacher"] = teacher_words(teacher, kl_share, cache=teacher_cache)
    section = validated(Prune, asked)

    from shearling.verbs.prune import prune

    with Progress(quiet=as_json) as progress:
        result = prune(model, data=data, out=out, asked=section, arch=arch, watch=progress.steps)
    if as_json:
        print_json(result)
        return
    say_done(out, result.done_before)
    print(f"{result.source_parameters:,} parameters -> {result.parameters:,}")
    for miss in result.misses:
        print(f"the masks missed their target and were cut to it: {miss}")
    print_losses({"source": result.source_losses, "cut": result.losses})
    print(f"next: shearling heal {out} --data {data} --tokens N --out {out}-healed")


@app.command(epilog="Example: `shearling heal small --data store --tokens 50M --out healed`")
def heal(
    model: Model,
    data: DataStore,
    out: Out,
    tokens: Tokens = None,
    steps: Steps = None,
    lr: Lr = None,
    batch_tokens: BatchTokens = None,
    seq_len: SeqLen = None,
    mixture: MixtureSchedule = "auto",
    weights: Weights = None,
    reference: Reference = None,
    mixture_rule: MixtureRule = None,
    signal: Signal = None,
    mixture_every: Every = None,
    teacher: TeacherModel = None,
    kl_share: KlShare = None,
    teacher_cache: TeacherCache = None,
    repeats: Repeats = None,
    at_end: AtEnd = None,
    separate_documents: Separate = False,
    workers: Workers = None,
    log_every: LogEvery = None,
    sink: Sink = None,
    save_every: SaveEvery = None,
    keep_last: KeepLast = None,
    keep_every: KeepEvery = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    autocast: Autocast = "auto",
    compile: Compile = False,
    activation_checkpointing: Checkpointing = "none",
    kernels: Kernels = None,
    lora_rank: LoraRank = None,
    optimizer: Optimizer = None,
    offload: Offload = False,
    replicate: Replicate = None,
    micro_batch: MicroBatch = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Continued pre-training: brings back what the cut took."""
    from shearling.recipe import Heal, validated

    asked = those_given(tokens=tokens, steps=steps, lr=lr, batch_tokens=batch_tokens, seq_len=seq_len, device=device)
    asked |= those_given(dtype=dtype, seed=seed, autocast=autocast, compile=compile, workers=workers, at_end=at_end)
    asked |= those_given(save_every=save_every, micro_sequences=micro_batch, log_every=log_every, sinks=sink)
    asked |= those_given(keep_last=keep_last, keep_every=keep_every, replicate=replicate)
    asked |= those_given(lora_rank=lora_rank, optimizer=optimizer, offload=offload, kernels=kernels)
    asked |= {"repeats": repeats_words(repeats), "separate_documents": separate_documents}
    mixing = mixture_words(mixture, weights, reference=reference, rule=mixture_rule, signal=signal, every=mixture_every)
    asked |= {"activation_checkpointing": activation_checkpointing, "mixture": mixing}
    asked["teacher"] = teacher_words(teacher, kl_share, cache=teacher_cache)
    section = validated(Heal, asked)

    from shearling.verbs.heal import heal

    with Progress(quiet=as_json) as progress:
        result = heal(model, data=data, out=out, asked=section, arch=arch, watch=progress.steps)
    if as_json:
        print_json(result)
        return
    say_done(out, result.done_before)
    print_losses({"before": result.losses_before, "healed": result.losses})
    print(f"next: shearling eval {out} --data {data}")


@app.command(name="eval", epilog="Example: `shearling eval healed --data store --json`")
def eval_(
    model: Model,
    data: DataStore,
    seq_len: SeqLen = None,
    windows: Annotated[int | None, typer.Option(help="Held-out windows a domain; left out, all.")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="To compute in; left out, float32.")] = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Held-out loss per domain, with its standard error over documents, per byte, and as perplexity."""
    from shearling.recipe import Eval, validated

    asked = validated(Eval, those_given(seq_len=seq_len, windows=windows, device=device, dtype=dtype))

    from shearling.verbs.evaluate import evaluate

    result = evaluate(model, data=data, arch=arch, **asked.model_dump())
    if as_json:
        print_json(result)
        return
    print(f"{model}: {result.parameters:,} parameters, windows of {result.seq_len} tokens")
    print_figures(result.figures)


@app.command(
    epilog="Example: `shearling reference --scaling-law losses.yaml --size 1.3B --data store --out reference.json`"
)
def reference(
    from_source: Annotated[str | None, typer.Option(help="The model whose own held-out losses to take.")] = None,
    scaling_law: Annotated[
        str | None, typer.Option(help="A YAML or JSON file: sizes: [...], losses: {domain: [...]}.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="With --scaling-law: parameters of the small model, as 1.3B.")
    ] = None,
    given: Annotated[str | None, typer.Option(help="The losses themselves, as wiki=1.9,code=0.8.")] = None,
    data: Annotated[str | None, typer.Option(help="The token store that they are for.")] = None,
    seq_len: SeqLen = None,
    windows: Annotated[int | None, typer.Option(help="Held-out windows a domain; left out, as many as heal.")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="To compute in; left out, float32.")] = None,
    out: Annotated[str | None, typer.Option(help="The file to write, for `heal --reference`.")] = None,
    as_json: Json = False,
) -> None:
    """Losses per domain that a smaller model should reach: its source's, a scaling law's, or given."""
    from shearling.recipe import Eval, validated

    asked = validated(Eval, those_given(seq_len=seq_len, windows=windows, device=device, dtype=dtype))

    from shearling.verbs.reference import check_out, write_reference
    from shearling.verbs.reference import reference as find

    if out is not None:
        check_out(Path(out))
    found = find(from_source=from_source, scaling_law=scaling_law, given=given, size=size, data=data, asked=asked)
    if as_json:
        print_json(found.losses)
    else:
        print(found.how)
        print_rows(("domain", "nats per token"), [(domain, f"{loss:.4f}") for domain, loss in found.losses.items()])
    for note in found.notes:
        print(note, file=sys.stderr if as_json else sys.stdout)
    if out is None:
        return
    write_reference(found, Path(out))  # last: where something else is there what was measured isn't lost
    if not as_json:
        say_done(out, False)


@app.command(epilog="Example: `shearling run recipes/stories260k.yaml --set heal.steps=400`")
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file; docs in recipes/.", show_default=False)],
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override, as heal.tokens=2M.")] = None,
    as_json: Json = False,
) -> None:
    """All stages of a recipe in order, each skipped when it is finished already."""
    from shearling.recipe import load_recipe

    asked = load_recipe(Path(recipe), settings or [])

    from shearling.run import run

    with Progress(quiet=as_json) as progress:
        result = run(asked, watch=progress.steps, documents=progress.documents)
    if as_json:
        print_json(result)
        return
    print_losses(result.losses)
    print(f"the result: {result.model}; what happened: {result.report}")


@app.command(epilog="Example: `shearling demo --out demo`")
def demo(out: Out = "demo", seed: Seed = 0, as_json: Json = False) -> None:
    """Shears a small model to half, in minutes on a laptop's CPU, and compares; nothing is downloaded."""
    from shearling.demo.compare import compare
    from shearling.demo.page import summary, write_demo_page

    others = sorted(path.name for path in Path(out).glob("*") if not path.name.startswith("seed-"))
    if others:
        expected = "nothing there, or what demos leave"
        raise UserError(f"output {out}", found=", ".join(others[:3]), expected=expected, change="choose another --out")
    with Progress(quiet=as_json) as progress:
        found = compare(Path(out) / f"seed-{seed}", seed=seed, watch=progress.steps)
    page = write_demo_page(Path(out) / f"seed-{seed}.html", found)
    if as_json:
        print_json({**{arm.label: asdict(arm) for arm in found.arms}, "passed": found.passed, "page": page})
    else:
        print(f"{summary(found)}\n\nthe page: {page}")
    raise typer.Exit(0 if found.passed else 1)


def _terminated(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _quiet_about_kernels() -> None:
    """transformers imports torchao wherever it is installed, and that says which of its kernels aren't for here."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(lambda record: "Detected no triton" not in str(record.msg))


def main() -> None:
    """The entry point: a user's mistake ends with 2 and its message, Ctrl-C with 130, SIGTERM with 143, else with 1.

    What goes wrong is said by the rank that it happens on; the others say in a line that they aren't it.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("shearling").setLevel(logging.INFO)
    _quiet_about_kernels()
    if os.environ.get("RANK", "0") != "0":  # the first rank speaks for all; what goes wrong on another it says itself
        logging.getLogger("shearling").setLevel(logging.ERROR)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    os_signal.signal(os_signal.SIGTERM, _terminated)  # where nobody saves first
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OnAnotherRank as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except SystemExit as done:
        if done.code in (INTERRUPTED, TERMINATED):
            print("interrupted: what wasn't finished is not under its output's name", file=sys.stderr)
        raise
