"""``flax-transformers plan``."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flax_transformers.cli.parsing import Config, Flag, number, option
from flax_transformers.errors import UserError
from flax_transformers.ranges import integers, parse_integer

if TYPE_CHECKING:
    from jax import Device
    from rich.console import Console
    from rich.table import Table

    from flax_transformers.models.config import TransformerConfig
    from flax_transformers.planning import plan as plans
    from flax_transformers.planning.decode import DecodePlan
    from flax_transformers.training.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """Compile a training step for devices that are not present: memory, FLOPs, traffic, time.

    Any field of the config can be set, as in --mesh.fsdp 16.
    """

    config: Config
    topology: Annotated[str, option("TOPOLOGY")]
    """Such as v5e:4x4, v5p:8x8x8, 2xv5e:16x16, h100:8, cpu:8."""
    slices: Annotated[int, number("--slices", integers(1, 2**16))] = 1
    """Number of slices of this topology."""
    phase: Annotated[int, number("--phase", integers(-1000, 1000))] = -1
    """Index of the phase; -1 is the last."""
    search: Flag = False
    """Try meshes, rematerialization and gradient accumulation for this batch, and rank them."""
    search_limit: Annotated[int, number("--search-limit", integers(1, 10_000))] = 6
    """Largest number of candidates that are compiled."""
    decode: Annotated[str | None, option("BATCHxPROMPTxNEW")] = None
    """Plan generation instead of a training step: prompts, tokens of each, new tokens."""
    json: Annotated[Path | None, option("FILE")] = None
    """Write all figures to this file."""
    hlo: Annotated[Path | None, option("FILE")] = None
    """Write the compiled program to this file, as HLO."""

    def run(self, overrides: Sequence[str]) -> int:
        # The accelerators of this machine are not used. Set before jax looks for them.
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        jax.config.update("jax_platforms", "cpu")
        from flax_transformers.cli.config_file import load_config
        from flax_transformers.planning.topology import devices_of
        from flax_transformers.training.check_run import check_config

        for name, file in (("json", self.json), ("hlo", self.hlo)):
            file = file and file.expanduser()
            if file is not None and not file.absolute().parent.is_dir():
                raise UserError(f"--{name} is {file}; create the folder of this file first")
            if file is not None and file.is_dir():
                raise UserError(f"--{name} is {file}, which is a folder; name a file in it")
        config = _with_initial_model(load_config(self.config, overrides), overrides)
        check_config(config)
        devices = devices_of(self.topology, self.slices)
        if self.decode is not None:
            return self._decode(config, devices)
        return self._step(config, devices)

    def _step(self, config: TrainConfig, devices: Sequence[Device]) -> int:
        """Plans a training step, or ranks the plans of a search."""
        from flax_transformers.planning.plan import advice, plan
        from flax_transformers.planning.search import search

        try:
            phase = config.phases[self.phase]
        except IndexError:
            raise UserError(
                f"there is no phase {self.phase}; the config has {len(config.phases)}, from 0"
            ) from None
        if self.search and self.hlo is not None:
            raise UserError("--hlo writes one program and --search compiles many; give one of them")
        teacher = teacher_of(config)
        if self.search:
            names = partial(settings, config, self.phase % len(config.phases))
            ranked = search(
                config,
                phase,
                devices,
                self.topology,
                limit=self.search_limit,
                on_plan=lambda found: print(f"{names(found)}: {outcome(found)}", flush=True),
                teacher=teacher,
            )
            show_ranked(ranked, names)
        else:
            ranked = [plan(config, phase, devices, self.topology, hlo=self.hlo, teacher=teacher)]
        show(ranked[0])
        if self.json is not None:
            figures = [as_json(one) for one in ranked]
            write_json(self.json, figures if self.search else figures[0])
        if not ranked[0].fits:
            raise UserError(advice(ranked[0]))
        return 0

    def _decode(self, config: TrainConfig, devices: Sequence[Device]) -> int:
        """Plans generation."""
        from flax_transformers.planning.decode import plan_decode

        if self.search or self.hlo is not None:
            raise UserError("--decode excludes --search and --hlo; leave these out")
        numbers = [parse_integer(part) for part in (self.decode or "").split("x")]
        sizes = [size for size in numbers if size is not None and integers().admits(size)]
        if len(numbers) != 3 or len(sizes) != 3:
            raise UserError(
                f"--decode {self.decode} is not three numbers from 1, as in 8x1024x128: prompts, "
                "tokens of each, new tokens"
            )
        batch, prompt, new = sizes
        found = plan_decode(
            config, devices, self.topology, batch=batch, prompt_length=prompt, new_tokens=new
        )
        show_decode(found)
        if self.json is not None:
            values = dataclasses.asdict(found) | {"tokens_per_second": found.tokens_per_second}
            write_json(self.json, values)
        if not found.fits:
            raise UserError(
                f"it does not fit: {found.total / 2**30:.1f} GiB of "
                f"{(found.available or 0) / 2**30:.2f} on each device; generate for fewer prompts "
                "at once, or shard the model further, with --mesh.tensor"
            )
        return 0


def _with_initial_model(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """``config`` with the model that `train` would start from. If it is not there, a line says
    that the config's own is planned."""
    from flax_transformers.pretrained import find_pretrained
    from flax_transformers.runtime import with_initial_model

    if config.init_from is None:
        return config
    try:
        find_pretrained(config.init_from)
    except UserError as error:
        print(f"the model of the config is planned: {error}", file=sys.stderr)
        return config
    return with_initial_model(config, overrides)


def teacher_of(config: TrainConfig) -> TransformerConfig | None:
    """The model that an objective learns from, if it is on this machine."""
    from flax_transformers.pretrained import describe_pretrained, find_pretrained, is_checkpoint

    path = getattr(config.objective, "teacher", None)
    if path is None or not (is_checkpoint(path) or Path(path).expanduser().is_dir()):
        return None
    return describe_pretrained(find_pretrained(path))


def write_json(file: Path, figures: Any) -> None:
    from etils import epath

    from flax_transformers.monitoring.metrics import json_text
    from flax_transformers.storage.workdir import write_text

    write_text(epath.Path(file.expanduser().absolute()), json_text(figures, indent=1))


def _begin(
    found: plans.StepPlan | DecodePlan, work: str, memory: Mapping[str, float | None]
) -> tuple[Console, Table]:
    """Prints what is planned; returns a table with the rows of ``memory``, in bytes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)
    mesh = " x ".join(f"{name}={size}" for name, size in found.mesh.items()) or "one device"
    console.print(
        f"{found.topology}: {found.devices} devices ({found.chip}), mesh {mesh}; {work}",
        highlight=False,
    )
    table = Table("on each device", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, value in memory.items():
        if value is not None:
            table.add_row(name, f"{value / 2**30:.2f} GiB")
    return console, table


def show_decode(found: DecodePlan) -> None:
    """Prints a plan of generation as a table."""
    console, table = _begin(
        found,
        f"{found.batch} prompts of {found.prompt_length} tokens, {found.new_tokens} new ones of "
        "each",
        {
            "parameters": found.parameters,
            "temporaries, with cache": found.temporaries,
            "total": found.total,
            "available": found.available,
            "cache of all devices": found.cache,
        },
    )
    for name, flops in (("prompts", found.prompt_flops), ("a token", found.token_flops)):
        if flops is not None:
            table.add_row(name, f"{flops / 1e9:.3f} GFLOP")
    for name, r in (("prompts", found.prompt_roofline), ("a token", found.token_roofline)):
        if r is not None:
            table.add_row(f"{name} at least (by {r.bound_by})", f"{r.step * 1e3:.3f} ms")
    if found.tokens_per_second is not None:
        table.add_row("tokens per second at most", f"{found.tokens_per_second:,.0f}")
    console.print(table, highlight=False)
    console.print(f"compiled in {found.compile_seconds:.1f} s", highlight=False)


def settings(config: TrainConfig, phase: int, found: plans.StepPlan) -> str:
    """The options that make ``config`` a plan of a search, as on the command line."""
    given = dataclasses.asdict(config.mesh)
    mesh = {name: found.mesh.get(name, 1) for name in given}
    shown = ("data", "fsdp", *(name for name in given if {mesh[name], given[name]} != {1}))
    parts = [f"--mesh.{name} {mesh[name]}" for name in dict.fromkeys(shown)]
    parts.append(f"--compute.remat {found.remat}")
    if {found.micro_batches, config.phases[phase].micro_batches} != {1}:
        parts.append(f"--phases.{phase}.micro-batches {found.micro_batches}")
    return " ".join(parts)


def outcome(found: plans.StepPlan) -> str:
    total = f"{found.memory.total / 2**30:.2f} GiB"
    if not found.fits:
        return f"{total}, does not fit"
    if found.roofline is None:
        return f"{total}, time unknown"
    return f"{total}, {found.roofline.step * 1e3:.1f} ms at least (by {found.roofline.bound_by})"


def show_ranked(ranked: Sequence[plans.StepPlan], names: Callable[[plans.StepPlan], str]) -> None:
    """Prints the plans of a search, best first. ``names``: the settings of each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "settings", "memory, time", "MFU at most", box=None, pad_edge=False)
    for rank, one in enumerate(ranked, 1):
        bound = "" if one.mfu_bound is None or not one.fits else f"{one.mfu_bound:.1%}"
        table.add_row(str(rank), names(one), outcome(one), bound)
    Console(markup=False, emoji=False).print(table, highlight=False)


def as_json(found: plans.StepPlan) -> dict:
    """All figures; `planning.plan.StepPlan` describes them."""
    values = dataclasses.asdict(found)
    if found.roofline is not None:
        values["roofline"] |= {"step": found.roofline.step, "bound_by": found.roofline.bound_by}
    return values | {"recomputation": found.recomputation}


def show(found: plans.StepPlan) -> None:
    """Prints a plan as a table."""
    console, table = _begin(
        found,
        f"batch {'x'.join(map(str, found.batch_shape))}, micro-batches {found.micro_batches}, "
        f"remat {found.remat}",
        {name.replace("_", " "): n for name, n in dataclasses.asdict(found.memory).items()},
    )
    table.add_section()
    table.add_row("model", f"{found.model_flops / 1e12:.3f} TFLOP")
    if found.program_flops is not None:
        table.add_row(
            f"program ({found.recomputation:.2f} of the model)",
            f"{found.program_flops / 1e12:.3f} TFLOP",
        )
    for row in found.traffic:
        table.add_row(
            f"{row.kind} over {'+'.join(row.axes)}, {row.runs} runs",
            f"{row.sent_bytes / 1e9:.3f} GB",
        )
    if found.roofline is not None:
        r = found.roofline
        table.add_section()
        table.add_row("matmuls at peak", f"{r.compute * 1e3:.1f} ms")
        table.add_row("memory traffic", f"{r.memory * 1e3:.1f} ms")
        for axes, seconds in sorted(r.interconnect.items(), key=lambda item: -item[1]):
            table.add_row(f"links of {axes}", f"{seconds * 1e3:.1f} ms")
        table.add_row(f"step at least (by {r.bound_by})", f"{r.step * 1e3:.1f} ms")
        table.add_row("MFU at most", f"{found.mfu_bound:.1%}")
    console.print(table, highlight=False)
    instructions = "" if found.instructions is None else f", {found.instructions:,} instructions"
    console.print(
        f"lowered in {found.lower_seconds:.1f} s, compiled in {found.compile_seconds:.1f} s"
        f"{instructions}",
        highlight=False,
    )
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)
