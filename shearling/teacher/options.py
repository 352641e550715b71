"""How a teacher teaches, if there is to be one.

On stories260K, healed for 300 steps, a share of a half gained some 0.04 nats (one seed, no other share tried).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from shearling.errors import check_ranges

Weights = Literal["as_is", "int8"]
KindName = Literal["top_k", "sampled"]


@dataclass(frozen=True)
class Options:
    """The loss is (1 - share) cross-entropy + share KL(teacher || student), and `hidden` times the streams' difference.

    `share_end`: where the share ends, linearly; left out: it stays. `model`: the teacher; left out: the model that the
    student was cut from. `hidden` asks for a student cut from the teacher, and for a teacher that runs along.

    `dtype`, `device`, `weights`: the teacher's own; left out: bf16 (fp32 on a CPU), the student's device.

    `cache`: a folder for what it says, at `k` ids a token: `sampled` from its distribution or its `top_k`. Windows that
    are there aren't asked for again, by this run or another over the same data, window length and teacher.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    share: float = 0.0
    share_end: float | None = None
    hidden: float = 0.0
    model: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    weights: Weights = "as_is"
    cache: str | None = None
    kind: KindName = "sampled"
    k: int = 32  # 68 bytes a token: the head's gradient is off by 5% over 4,096 tokens (benchmarks/)

    def __post_init__(self) -> None:
        check_ranges(self, {"share": (0, 1), "share_end": (0, 1), "hidden": (0, None), "k": (1, None)})
        named = [name for name in ("model", "cache", "dtype", "device") if getattr(self, name) is not None]
        if named and not self.wanted:
            raise ValueError(f"a share above 0 (or hidden) beside {', '.join(named)}")

    @property
    def wanted(self) -> bool:
        """Whether there is to be a teacher at all."""
        return bool(self.share or self.share_end or self.hidden)

    @property
    def end(self) -> float:
        return self.share if self.share_end is None else self.share_end
