"""What a verification found, for people and for scripts."""

from dataclasses import dataclass, field
from pathlib import Path

from reshard.text import count, human, some, table
from reshard.verify.beyond import Beyond
from reshard.verify.exact import STATED
from reshard.verify.figures import Figures
from reshard.verify.settings import Difference
from reshard.verify.trace import Point


@dataclass(frozen=True)
class Result:
    """One run held against the reference: the shards as they are, or with a defect. `points` follow the model's parts;
    `suspects` are the stored tensors of the first that is off."""

    name: str
    figures: Figures
    points: list[Point] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """The logits agree, and so does what no prompt reaches."""
        return self.figures.passed and not any(point.apart for point in self.points if point.decides)

    @property
    def parted(self) -> Point | None:
        """The first part whose output is not the reference's."""
        return next((point for point in self.points if point.apart), None)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: of its stored tensors, of its weights in the dtype that was computed in, and the most its process held."""

    rank: int
    stored: int
    held: int
    peak: int


@dataclass(frozen=True)
class Report:
    """A verification. `shared` is how many ranks had one device; `ids` the sequences and positions that ran; `settings` those that
    are not the original's; `unexercised` what no part of it ran or compared; `reached` how many of all experts the prompts went to."""

    checkpoint: Path
    reference: Path
    format: str
    mesh: str
    architecture: str
    depth: int
    dtype: str
    device: str
    backend: str
    nproc: int
    shared: int
    ids: tuple[int, int]
    method: str
    shards: Result
    controls: list[Result]
    ranks: list[RankMemory]
    seconds: float
    settings: list[Difference] = field(default_factory=list)
    unexercised: list[str] = field(default_factory=list)
    reached: tuple[int, int] = (0, 0)

    @property
    def passed(self) -> bool:
        """The shards agree with the original, in settings too, and planted defects were found, each of them."""
        return self.shards.passed and not self.settings and bool(self.controls) and not self.missed

    @property
    def missed(self) -> list[str]:
        """Planted defects that the comparison did not find: then it proves nothing."""
        return [control.name for control in self.controls if control.figures.passed]

    def __bool__(self) -> bool:
        return self.passed

    def to_json(self) -> dict:
        """The keys of CLI.md; `control` is the planted defect that was hardest to see, `controls` are all."""
        controls = [{"name": control.name, **control.figures.to_json()} for control in self.controls]
        weakest = min(controls, key=lambda c: c["max_abs_diff"] if c["max_abs_diff"] is not None else float("inf"), default=None)
        parted = self.shards.parted
        return {
            **self.shards.figures.to_json(), "passed": self.passed, "nproc": self.nproc, "device": self.device, "backend": self.backend,
            "control": weakest, "controls": controls, "method": self.method, "dtype": self.dtype, "format": self.format, "mesh": self.mesh,
            "architecture": self.architecture, "tokens": list(self.ids), "ranks_per_device": self.shared,
            "settings": [difference.to_json() for difference in self.settings], "not_exercised": self.unexercised, "experts_reached": list(self.reached),
            "precision": STATED, "first_apart": parted and parted.path, "suspects": self.shards.suspects, "seconds": round(self.seconds, 2),
            "trace": [{"path": p.path, "relative": p.relative if p.relative < float("inf") else None, "apart": p.apart} for p in self.shards.points],
            "ranks": [{"rank": r.rank, "bytes_stored": r.stored, "bytes_held": r.held, "peak_bytes": r.peak} for r in self.ranks],
        }  # fmt: skip

    def describe(self, traced: bool = False) -> str:
        """Verdict, figures and controls as text; with `traced`, every part's error."""
        sequences, positions = self.ids
        where = (
            f"{self.nproc} process{'es' * (self.nproc > 1)} on {self.device} ({self.backend})"
            if self.method == "tp"
            else f"one process on {self.device}"
        )
        if self.shared > 1:
            where += f", up to {self.shared} ranks to a device"
        f = self.shards.figures
        head = "", "max |Δlogit|", "of max |logit|", "mean KL", "same top-1", ""
        rows = [_row(result, control=i > 0) for i, result in enumerate([self.shards, *self.controls])]
        least = f.tolerance / (f.max_abs_logit or 1)
        lines = [
            f"{self.checkpoint}  {self.format} {self.mesh}  {self.architecture}, {self.depth} layers",
            f"{self.reference}  the original, run by transformers",
            f"{where}, {self.dtype}, {sequences} × {positions} tokens, {self.seconds:.1f} s"
            + (f"; {STATED}" if self.device != "cpu" else "")
            + "\n",
            table(rows, head),
            f"\ntolerance {f.tolerance:.2g} ({least:.2g} of the largest logit, {f.max_abs_logit:.4g}): rounding in {self.dtype} over {self.depth} layers",
        ]
        if self.ranks:
            lines.append(
                f"per rank: {_span([r.stored for r in self.ranks])} stored, {_span([r.held for r in self.ranks])} held in {self.dtype}"
            )
        if traced and self.shards.points:
            rows = [(p.path, f"{p.relative:.2g}", "apart" if p.apart else "") for p in self.shards.points]
            lines += ["", table(rows, ("output of", "off by (relative)", ""))]
        if self.settings:
            lines += [
                "",
                f"{count(len(self.settings), 'setting')} beside the shards differ{'s' * (len(self.settings) == 1)}:",
                *(f"  {d}" for d in self.settings),
            ]
        if self.unexercised:
            lines += ["", "not exercised:", *(f"  {text}" for text in self.unexercised)]
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        """One line."""
        if reasons := [text for text in (self._logits(), self._settings()) if text]:
            return f"FAILED: {'; '.join(reasons)}"
        if not self.controls:
            return "INCONCLUSIVE: logits agree, but no defect could be planted in these shards, to show that one would be seen"
        if self.missed:
            return f"INCONCLUSIVE: logits agree, but so they do with a planted defect ({self.missed[0]}): this model hides it"
        found = (
            ", and the planted defect was found"
            if len(self.controls) == 1
            else f", and all {len(self.controls)} planted defects were found"
        )
        return f"passed: logits agree{found}"

    def _logits(self) -> str:
        if self.shards.passed:
            return ""
        parted = self.shards.parted
        if parted is None:
            return "these shards are not the original" + ("; hidden states agree, the output layer does not" if self.shards.points else "")
        suspects = f": look at {some(self.shards.suspects)}" if self.shards.suspects else ""
        return f"these shards are not the original; the first output that is off is {parted.path}'s, by {parted.relative:.2g}{suspects}"

    def _settings(self) -> str:
        more = f" (and {count(len(self.settings) - 1, 'other setting')})" if len(self.settings) > 1 else ""
        return f"{self.settings[0]}{more}" if self.settings else ""


def unexercised(config, positions: int, beyond: Beyond) -> list[str]:
    """What a verification neither ran nor compared, of a model of transformers' text `config`."""
    out = []
    longest = getattr(config, "max_position_embeddings", None) or 0
    if longest > positions:
        out.append(f"positions {positions} to {longest - 1}: settings that act there (windows, rotary scaling) were compared, not run")
    if beyond.left:
        out.append(f"{count(len(beyond.left), 'tensor')} of layers that predict further tokens: {some(beyond.left)}")
    if beyond.scales:
        out.append(
            f"{count(len(beyond.scales), 'scale')} of quantised caches that {'are' if len(beyond.scales) > 1 else 'is'} not 1: {some(beyond.scales)}"
        )
    return out


def _row(result: Result, control: bool) -> tuple:
    f = result.figures
    verdict = ("MISSED" if f.passed else "found") if control else ("equal" if result.passed else "DIFFERENT")
    name = f"planted: {result.name}" if control else result.name
    return name, f"{f.max_abs_diff:.2g}", f"{f.relative:.2g}", f"{f.mean_kl:.2g}", f"{f.top1_agreement:.0%}", verdict


def _span(sizes: list[int]) -> str:
    low, high = human(min(sizes)), human(max(sizes))
    return low if low == high else f"{low} to {high}"
