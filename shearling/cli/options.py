"""The words that verbs share, and what sections of a recipe they stand for."""

from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Model = Annotated[str, typer.Argument(help="A model folder, a Hub id or a .gguf file.", show_default=False)]
Arch = Annotated[
    str | None, typer.Option(help="A file with the model's family, where that has no table: see `inspect --draft`.")
]
DataStore = Annotated[str, typer.Option("--data", help="A token store, made by `shearling data`.", show_default=False)]
Out = Annotated[str, typer.Option("--out", help="The folder that the result becomes.", show_default=False)]
Tokens = Annotated[str | None, typer.Option(help="How many tokens to train on: 200K, 1.5M, 50B.")]
Steps = Annotated[int | None, typer.Option(help="How many optimizer steps, instead of --tokens.")]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate; left out, from the model's size.")]
BatchTokens = Annotated[str | None, typer.Option(help="Tokens in a step; left out, from size and budget.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens in a window; left out, min(2048, the model's maximum).")]
MicroBatch = Annotated[
    str | None, typer.Option(help="Windows that go through the model at once: a number, or auto, by the memory here.")
]
Seed = Annotated[int, typer.Option(help="Decides data order and noise.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; left out, the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="Of the result's weights; left out, the source's.")]
Autocast = Annotated[str, typer.Option(help="auto, off or bfloat16.")]
MixtureSchedule = Annotated[
    str, typer.Option("--mixture", help="dynamic (follows losses), constant, proportional (to tokens), auto.")
]
Weights = Annotated[str | None, typer.Option(help="Starting shares: a=.5,b=.5; left out, by tokens.")]
Reference = Annotated[
    str | None, typer.Option(help="Losses to follow: a file of `shearling reference`, or a=1.9,b=2.1.")
]
MixtureRule = Annotated[str | None, typer.Option("--mixture-rule", help="anchored or paper (Sheared-LLaMA's).")]
Signal = Annotated[str | None, typer.Option(help="Held against the reference: held_out, training or teacher_kl.")]
Every = Annotated[int | None, typer.Option("--mixture-every", help="Steps between updates of the mixture.")]
TeacherModel = Annotated[
    str | None, typer.Option("--teacher", help="A model to learn from; with --kl-share alone, the one it was cut from.")
]
KlShare = Annotated[float | None, typer.Option(help="Share of the KL to the teacher in the loss; with --teacher, 0.5.")]
TeacherCache = Annotated[str | None, typer.Option(help="A folder for what the teacher says, to be used again.")]
Repeats = Annotated[str | None, typer.Option(help="Readings of a domain at most: 4, or a=1,b=4; left out, unlimited.")]
AtEnd = Annotated[str | None, typer.Option(help="Then: stop, redistribute or repeat; left out, refused beforehand.")]
Separate = Annotated[
    bool, typer.Option("--separate-documents", help="Keep documents apart in attention and positions.")
]
Workers = Annotated[int | None, typer.Option(help="Threads that read ahead; 0 for none.")]
SaveEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints; left out, ten minutes.")]
Sink = Annotated[
    list[str] | None,
    typer.Option("--sink", help="tensorboard or wandb: where figures go beside the record. Repeatable."),
]
LogEvery = Annotated[int | None, typer.Option(help="Steps between figures; left out: 1, on a GPU 10.")]
LoraRank = Annotated[
    int | None, typer.Option(help="Leave the weights as they are, in bfloat16; learn adapters of this rank on them.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")]
Checkpointing = Annotated[
    str, typer.Option(help="Recompute activations: full, selective (all but products and attention) or none.")
]
Replicate = Annotated[int | None, typer.Option(help="Groups of ranks that each hold a whole model (HSDP).")]
KeepLast = Annotated[int | None, typer.Option(help="How many checkpoints stay.")]
KeepEvery = Annotated[int | None, typer.Option(help="Checkpoints of steps that this divides stay for good.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep weights, gradients and moments in the computer's memory, not the GPU's.")
]
Kernels = Annotated[str | None, typer.Option(help="torch, or liger: its norms and activations, on a GPU.")]
Optimizer = Annotated[str | None, typer.Option(help="adamw, or adamw8bit: its moments in 8 bits (torchao).")]


def those_given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def mixture_words(schedule: str, weights: str | None, **options: Any) -> dict[str, Any]:
    """The section of a recipe that these options stand for."""
    from shearling.recipe import parse_shares

    shares = None if weights is None else parse_shares(weights, "--weights")
    return those_given(schedule=None if schedule == "auto" else schedule, weights=shares, **options)


def teacher_words(model: str | None, share: float | None, **options: Any) -> dict[str, Any]:
    """The section of a recipe that these options stand for: a teacher that is named is listened to."""
    half = 0.5 if model is not None and share is None else share
    return those_given(model=model, share=half, **options)


def repeats_words(text: str | None) -> Any:
    from shearling.recipe import parse_shares

    return parse_shares(text, "--repeats", int) if text and "=" in text else text
