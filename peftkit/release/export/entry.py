"""One entry for all engines: check what the engine can read, write beside the target, read back, rename into place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.deltas.delta import Deltas
from peftkit.deltas.merging.settings import Onto
from peftkit.errors import DeltaError, RegistryError
from peftkit.events import Decision, Note, Phase, Progress, Report, silent
from peftkit.registry.exchange.export import building, check_target
from peftkit.registry.store import Registry
from peftkit.release.export import llama_cpp
from peftkit.release.export.capabilities import Finding, check, refuse, say
from peftkit.release.export.capability_table import RANKS, Engine
from peftkit.release.export.peft import Canonical, canonical, write_canonical
from peftkit.release.export.receipt import write_receipt
from peftkit.release.export.source import Cut, Source, cut_to, open_source, with_cut
from peftkit.release.export.vllm import served_names, write_serving
from peftkit.release.recommend import needs_choice
from peftkit.release.repaired import check_onto


@dataclass(frozen=True)
class ExportOptions:
    """How to write: all have a default that loses nothing."""

    dtype: str | None = None
    """float32, bfloat16, float16, or q8_0 for a model in GGUF; None keeps what the canonical factors have."""
    rank: int | None = None
    """Cut larger ranks to this one by SVD."""
    base: str | None = None
    """The base, where the manifest's cannot be found on this machine."""
    merged: bool = False
    """For gguf and ollama: the whole merged model instead of the adapter."""
    onto: Onto | None = None
    """Onto which weights to merge; None is `original`, unless the adapter was trained over a quantized base; with what
    loftq began, None is `dequantized`."""
    force: bool = False
    """Write what keeps less than 90 % of the delta when it is merged, or loses more than 5 % to its rank, too."""


@dataclass(frozen=True)
class ExportReceipt:
    """What was written, for whom, and what it lost."""

    engine: str
    folder: Path
    files: tuple[str, ...]
    versions: dict[str, dict[str, Any]]
    """Name of the adapter in the export → its receipt, which also lies beside its files."""
    command: tuple[str, ...] = ()
    """What starts the engine with it."""

    def as_record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "engine": self.engine,
            "folder": str(self.folder),
            "files": list(self.files),
            "versions": self.versions,
            "command": list(self.command),
        }


@dataclass(frozen=True)
class Job:
    """One export: its sources, checked, and what is known about each."""

    engine: Engine
    sources: tuple[Source, ...]
    originals: tuple[Deltas, ...]
    cuts: tuple[Cut | None, ...]
    findings: tuple[list[Finding], ...]
    options: ExportOptions
    cache: Path
    report: Report = field(default=silent)


Writer = Callable[[Job, Path], ExportReceipt]


def export_for(
    engine: str,
    registry: Registry,
    references: Sequence[str],
    out: Path,
    cache: Path,
    *,
    options: ExportOptions | None = None,
    report: Report = silent,
) -> ExportReceipt:
    """Write versions for an engine into the new folder `out`, which is complete or absent.

    Raises DeltaError with everything that the engine would refuse or misread, and what works instead; RegistryError
    when `out` holds anything or lies inside the registry; and what `open_source` raises.
    """
    if engine not in ENGINES:
        raise DeltaError(f"no export for {engine!r}", expected=" or ".join(ENGINES), hint="--to vllm")
    options, out = options or ExportOptions(), Path(out)
    if engine != "vllm" and len(references) != 1:
        raise DeltaError(f"{len(references)} adapters for {engine}", expected="one; vllm takes several")
    _check_options(engine, options)
    check_target(registry, out)
    job = _checked(engine, registry, references, cache, options, report)
    try:
        with building(out.absolute()) as folder:
            receipt = ENGINES[engine](job, folder)
            files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    except OSError as error:
        raise RegistryError(
            f"{', '.join(references)} could not be exported to {out}: {error}",
            expected="a new or empty folder on a disk with room; nothing was left there",
            hint="choose another folder with --out",
        ) from error
    return ExportReceipt(engine, out, files, receipt.versions, receipt.command)


def _check_options(engine: str, options: ExportOptions) -> None:
    """Nothing is ignored."""
    if options.merged and engine not in ("gguf", "ollama"):
        raise DeltaError(
            f"a merged model for {engine}", expected="gguf or ollama", hint="peftkit merge writes a folder"
        )
    if options.merged and options.rank is not None:
        raise DeltaError("a rank for a merged model", expected="a rank with an adapter", hint="leave --rank out")
    if options.onto is not None and not options.merged:
        raise DeltaError(
            f"--onto {options.onto} without --merged", expected="--onto with a merged model", hint="add --merged"
        )
    if options.force and not options.merged and options.rank is None:
        raise DeltaError(
            "force without a merge or a rank", expected="something that can lose ΔW", hint="leave --force out"
        )


def _checked(
    engine: Any, registry: Registry, references: Sequence[str], cache: Path, options: ExportOptions, report: Report
) -> Job:
    """Every source with its findings; all that blocks any of them is raised at once."""
    if not references:
        raise DeltaError("no adapter is named", expected="one or more", hint="peftkit list shows them")
    whole = [open_source(registry, each, cache, base=options.base, report=report) for each in references]
    fingerprints = {source.version.manifest.base.fingerprint for source in whole}
    if len(fingerprints) > 1:
        bases = sorted({source.version.manifest.base.source for source in whole})
        raise DeltaError(
            f"the adapters belong to different bases: {', '.join(bases)}",
            expected="adapters of one base",
            hint="export them one base at a time",
        )
    check_onto(registry, [source.version for source in whole], options.onto)
    cuts = [with_cut(source, options.rank, force=options.force) for source in whole]
    sources = tuple(source for source, _ in cuts)
    # Whole weights hold whatever the adapter does.
    findings = tuple([] if options.merged else check(engine, source.features) for source in sources)
    problems = []
    for source, found in zip(sources, findings, strict=True):
        try:
            refuse(engine, source.version.name, found, _offers(engine, source))
        except DeltaError as error:
            problems.append(error)
        say(found, report)
    if problems:
        facts, hints = "\n".join(e.fact for e in problems), dict.fromkeys(e.hint for e in problems if e.hint)
        raise DeltaError(facts, expected=problems[0].expected, hint="\n  or ".join(hints))
    originals = tuple(source.deltas for source in whole)
    return Job(engine, sources, originals, tuple(cut for _, cut in cuts), findings, options, cache, report)


def _offers(engine: str, source: Source) -> list[str]:
    """What cutting the rank to the engine's largest would cost."""
    limits = RANKS.get(engine)
    if not limits or source.features.rank <= limits[-1]:
        return []
    cut = cut_to(source, limits[-1])
    return [f"add --rank {limits[-1]}: loses {cut.error:.2g} of ‖ΔW‖, at most {cut.worst[1]:.2g} ({cut.worst[0]})"]


def _peft(job: Job, folder: Path) -> ExportReceipt:
    """The files themselves in the export's folder."""
    scratch = folder / "adapter"
    receipt = write_canonical(_canonical(job, 0), scratch, job.engine, job.findings[0])
    for path in sorted(scratch.iterdir()):
        path.rename(folder / path.name)
    scratch.rmdir()
    return ExportReceipt("peft", folder, (), {job.sources[0].version.name: receipt})


def _vllm(job: Job, folder: Path) -> ExportReceipt:
    """One folder for each adapter, the script and the notes."""
    receipts = {}
    job.report(Phase("writing adapters", len(job.sources), "adapters"))
    for index, name in enumerate(served_names([source.version for source in job.sources])):
        receipts[name] = write_canonical(_canonical(job, index), folder / name, job.engine, job.findings[index])
        job.report(Progress(index + 1, {"error": receipts[name]["error"]["max"]}))
    arguments = write_serving(folder, job.sources[0].base, receipts)
    job.report(Note("start it with serve.sh in that folder"))
    return ExportReceipt("vllm", folder, (), receipts, tuple(arguments))


def _gguf(job: Job, folder: Path) -> ExportReceipt:
    """One GGUF file: the adapter, or the merged model."""
    merged = job.options.merged
    figures = _merged_gguf(job, folder) if merged else _lora_gguf(job, folder, job.options.dtype)
    models = [llama_cpp.MODEL] if merged else ["BASE.gguf", "--lora", llama_cpp.ADAPTER]
    return _received(job, folder, figures, ["llama-server", "--jinja", "-m", *models])


def _ollama(job: Job, folder: Path) -> ExportReceipt:
    """A Modelfile, and beside it the merged model, or the adapter and its base; the dtype is the model's."""
    source, dtype = job.sources[0], job.options.dtype
    if job.options.merged:
        figures, notes = _merged_gguf(job, folder), []
    else:
        figures = _lora_gguf(job, folder, None)
        notes = llama_cpp.write_over_base(source, folder, job.cache, dtype=dtype, report=job.report)
    command, more = llama_cpp.write_for_ollama(source, folder)
    return _received(job, folder, figures | {"notes": [*figures["notes"], *notes, *more]}, command)


def _received(job: Job, folder: Path, figures: dict[str, Any], command: Sequence[str]) -> ExportReceipt:
    source = job.sources[0]
    receipt = write_receipt(source, job.engine, job.findings[0], folder, figures)
    return ExportReceipt(job.engine, folder, (), {source.version.name: receipt}, tuple(command))


def _lora_gguf(job: Job, folder: Path, dtype: str | None) -> dict[str, Any]:
    source, original = job.sources[0], job.originals[0]
    return llama_cpp.write_adapter(
        source, original, folder, job.findings[0], cut=job.cuts[0], dtype=dtype, report=job.report
    )


def _merged_gguf(job: Job, folder: Path) -> dict[str, Any]:
    source, options = job.sources[0], job.options
    onto = options.onto
    if onto is None and source.repaired:
        onto = "dequantized"
        job.report(Decision("merge onto", onto, "it repairs their error, which the original weights do not have"))
    if onto is None and needs_choice(source.version):
        raise DeltaError(
            f"{source.version.reference} was trained over a quantized base, and --onto is not given",
            expected="--onto original, the base's own weights, or dequantized, those it was trained over",
            hint=f"peftkit merge {source.version.name} --out FOLDER measures both on held-out rows",
        )
    return llama_cpp.write_merged(
        source,
        folder,
        onto or "original",
        job.cache,
        dtype=options.dtype,
        force=options.force,
        report=job.report,
    )


def _canonical(job: Job, index: int) -> Canonical:
    return canonical(job.sources[index], job.originals[index], job.cuts[index], job.options.dtype)


ENGINES: dict[str, Writer] = {"peft": _peft, "vllm": _vllm, "gguf": _gguf, "ollama": _ollama}
"""Engine → what writes for it."""
