"""`hf-radam inspect`: describe a checkpoint or a run by its manifests; needs neither torch nor transformers."""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_radam.checkpoints import layouts
from hf_radam.checkpoints.manifest import MANIFEST_NAME, CheckpointError, read_manifest, recorded_step
from hf_radam.checkpoints.runs import PREFIX, is_checkpoint, list_checkpoints, run_of
from hf_radam.checkpoints.storage import STAGING
from hf_radam.checkpoints.verify import is_model_file, verify_checkpoint
from hf_radam.cli.main import add_command, folder, printable, table
from hf_radam.schedules import DECAY, STABLE, WARM_UP, Schedule, describe_schedule

Facts = dict[str, Any]
CONSTANT = ("constant", "constant_with_warmup")
FINISHED = "finished"
WEIGHTS = {
    "ewa": "the averaged weights (EWA), in float32",
    "schedule_free": "x, the schedule-free average; the root holds y, which trains",
}
EXTEND = "--extend_from"
LABEL, WIDTH = 11, 118  # characters
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        run,
        description="Describe a checkpoint or a run: method, schedule, progress, which weights lie where, and the "
        "commands to resume, extend or evaluate it. Files are compared with the manifest by their sizes, with --verify "
        "by their hashes. Nothing is written, and no code in the files is run. Exit code 1 if anything is corrupted.",
        examples=["hf-radam inspect runs/wsd", "hf-radam inspect runs/wsd/checkpoint-18 --verify --json"],
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or the folder of a run")
    parser.add_argument("--verify", action="store_true", help="hash every file, which takes time for a large model")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """Return the output and the exit code; a folder that is neither a checkpoint nor a run is a `ValueError`."""
    path = Path(folder(arguments.path))
    inspect, report = (inspect_checkpoint, checkpoint_report) if is_checkpoint(path) else (inspect_run, run_report)
    facts = inspect(path, verify=arguments.verify)
    output = json.dumps(facts, indent=2) if arguments.json else printable("\n".join(report(facts)))
    return f"{output}\n", int(bool(facts.get("problems") or facts.get("damaged")))


def inspect_checkpoint(path: Path, *, verify: bool = False) -> Facts:
    """Describe a checkpoint by its manifest and its files, which `verify` hashes, as `--json` prints it."""
    problems = verify_checkpoint(path, hashes=verify)
    manifest = None
    facts: Facts = {"step": recorded_step(path), "phase": None}
    if MANIFEST_NAME not in problems:
        try:
            manifest = read_manifest(path)
            facts |= _progress(manifest) if manifest else {}
        except (CheckpointError, *MALFORMED) as error:
            problems, manifest = {MANIFEST_NAME: f"has an unexpected form ({error!r})", **problems}, None
    stock = manifest is None and MANIFEST_NAME not in problems
    facts |= {
        "kind": "checkpoint",
        "path": str(path),
        "run": str(run_of(path)),
        "written_by": "stock Trainer" if stock else f"hf_radam {(manifest or {}).get('hf_radam_version', '')}".strip(),
        "layout": layouts.layout_of(path).words,
        "processes": layouts.process_count(path),
        "missing_state": layouts.missing_state(path),
        "weights": {name: WEIGHTS[name] for name in WEIGHTS if (path / name).is_dir()},
        "verified": verify,
        "problems": problems,
        "files": _files(path, manifest),
    }
    return facts | {"resume": _resume(facts), "extend": _extend(facts, manifest), "evaluate": _evaluate(facts)}


def _progress(manifest: Mapping[str, Any]) -> Facts:
    """Return method, schedule and progress from a manifest."""
    method, step = manifest["method"], int(manifest["schedule_step"])
    name, total = method["lr_scheduler_type"], int(manifest["max_steps"])
    schedule, peak = _schedule(manifest), float(manifest["learning_rate"])
    phase = _phase(schedule, name, step, int(manifest["warmup_steps"]))
    return {
        "step": int(manifest["global_step"]),
        "max_steps": total,
        "schedule_step": step,
        "method": {key: method[key] for key in ("optim", "lr_scheduler_type", "ewa")},
        "schedule": manifest["schedule"],
        "schedule_summary": describe_schedule(schedule, name=name, total_steps=total),
        "phase": FINISHED if manifest["global_step"] >= total else phase,
        "learning_rate": peak * schedule.multiplier(step) if schedule else peak if name == "constant" else None,
        "evaluation_folder": str(manifest["evaluation"]["folder"] or ""),
        "averaging": None if manifest["averaging"] is None else dict(manifest["averaging"]),
    }


def _schedule(manifest: Mapping[str, Any]) -> Schedule | None:
    """Return the schedule in a manifest; None for one of transformers, or of a class that is not imported here."""
    name, options = manifest["method"]["lr_scheduler_type"], manifest["schedule"]
    return None if options is None or name not in Schedule.registered() else Schedule.from_dict(name, options)


def _phase(schedule: Schedule | None, name: str, step: int, warmup_steps: int) -> str | None:
    """Return the phase of the state after `step` completed steps; None if a schedule of transformers does not tell."""
    if schedule is None:
        return None if name not in CONSTANT else WARM_UP if name != "constant" and step < warmup_steps else STABLE
    if schedule.resets_to_peak(step):
        return "end of a decay"
    if schedule.decay_at(step):
        return DECAY
    # Before the first step of a decay the state is that of the stable phase.
    return WARM_UP if any(p.name == WARM_UP and p.start <= step < p.end for p in schedule.phases()) else STABLE


def _files(path: Path, manifest: Mapping[str, Any] | None) -> dict[str, int | None]:
    """Return the size of each file by its path in the checkpoint; None for a missing one."""
    there = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    return dict(sorted(({name: None for name in (manifest or {}).get("files", ())} | there).items()))


def _unfit(facts: Facts) -> str | None:
    if facts["problems"]:
        return f"no: it is corrupted ({', '.join(facts['problems'])})"
    missing = " and ".join(facts["missing_state"])
    advice = "(save_only_model?). Start a new run with it as the model instead."
    return f"no: it has no {missing} {advice}" if missing else None


def _resume(facts: Facts) -> str:
    if unfit := _unfit(facts):
        return unfit
    if facts["phase"] == FINISHED:
        return f"no: the run has completed its {facts['max_steps']} steps. Extend it instead."
    same = f", under DeepSpeed with the same stage and {facts['processes']} processes"
    advice = f"--resume_from_checkpoint {shlex.quote(facts['path'])}, with the flags of the run"
    return advice + (same if facts["layout"] == layouts.DEEPSPEED.words else "")


def _extend(facts: Facts, manifest: Mapping[str, Any] | None) -> str:
    unfit = _unfit(facts)
    if unfit or manifest is None:
        return unfit or "not known: a stock checkpoint does not record its schedule"
    schedule, step, name = _schedule(manifest), facts["schedule_step"], facts["method"]["lr_scheduler_type"]
    if schedule is None and name not in CONSTANT:
        return f"no: {name} is not a schedule of this package that can be extended"
    if schedule is not None and schedule.decay_at(step) is not None:
        return f"no: it is in the decay. Extend the run instead: --extend_from {shlex.quote(facts['run'])}"
    total = step if schedule is None or schedule.resets_to_peak(step) else schedule.total_steps
    return f"{EXTEND} {shlex.quote(facts['path'])} --max_steps N, with N above {total}"


def _evaluate(facts: Facts) -> str:
    path, inside = Path(facts["path"]), facts.get("evaluation_folder", "")
    bad = [name for name in facts["problems"] if name == MANIFEST_NAME or is_model_file(name, inside)]
    model = path / inside
    if bad:
        return f"no: it is corrupted ({', '.join(bad)})"
    if not any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        return f"no: {model} has no config.json. Read its weights with safetensors instead."
    shards = (layouts.SHARDED_FOLDER, layouts.FSDP_WEIGHTS_FOLDER)
    in_shards = not layouts.has_weights(model) and any((model / name).is_dir() for name in shards)
    advice = f", which is in shards. For from_pretrained: hf-radam consolidate {shlex.quote(str(path))}"
    call = f'load_evaluation_model("{path}") loads {f"{inside}/" if inside else "the root"}'
    return call + (advice if in_shards else "")


def inspect_run(path: Path, *, verify: bool = False) -> Facts:
    """Describe the folder of a run as `--json` prints it; one with nothing of a run in it is a `ValueError`."""
    checkpoints = {
        str(Path(ref.pinned_in, f"{PREFIX}{ref.step}")): inspect_checkpoint(ref.path, verify=verify)
        for ref in list_checkpoints(path)
    }
    has_config = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    model = has_config and (layouts.has_weights(path) or (path / layouts.SHARDED_FOLDER).is_dir())
    leftovers = sorted(str(p.relative_to(path)) for p in (path / STAGING).rglob(f"{PREFIX}*") if p.is_dir())
    if not (checkpoints or model or leftovers):
        raise ValueError(f"{path} is neither a checkpoint nor a run: it holds no checkpoint-N and no model.")

    def newest(accept: Callable[[Facts], Any]) -> str | None:
        return next((str(path / name) for name, facts in checkpoints.items() if accept(facts)), None)

    return {
        "kind": "run",
        "path": str(path),
        "checkpoints": checkpoints,
        "damaged": [name for name, facts in checkpoints.items() if facts["problems"]],
        "model": model,
        "resumes": newest(lambda facts: not _unfit(facts)),
        "evaluates": str(path) if model else newest(lambda facts: facts["evaluate"].startswith("load")),
        "extends": newest(lambda facts: facts["extend"].startswith(EXTEND)),
        "leftovers": leftovers,
    }


def checkpoint_report(facts: Facts) -> list[str]:
    """Return the description of a checkpoint as text, by lines."""
    kind = "a stock checkpoint" if facts["written_by"] == "stock Trainer" else f"a checkpoint of {facts['written_by']}"
    state = "corrupted" if facts["problems"] else "verified" if facts["verified"] else "complete"
    lines = [f"{facts['path']}: {kind}, step {facts['step']} of {facts.get('max_steps', '?')}, {state}", ""]
    lines += [line for label, text in _rows(facts) for line in _row(label, text)]
    problems = facts["problems"]
    sizes = {**dict.fromkeys(problems), **facts["files"]}
    rows = [["" if size is None else f"{size:,}", name, problems.get(name, "")] for name, size in sizes.items()]
    return [*lines, "", "files:", *table(rows, right=(0,))]


def _row(label: str, text: str) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False)  # not paths and flags
    wrapper.initial_indent, wrapper.subsequent_indent = label.ljust(LABEL), " " * LABEL
    return wrapper.wrap(text)


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    method, average = facts.get("method"), facts.get("averaging")
    if method is not None:
        ewa = "with" if method["ewa"] else "without"
        yield "method", f"{method['optim']}, {method['lr_scheduler_type']}, {ewa} EWA"
        yield "schedule", facts["schedule_summary"]
        rate = "" if facts["learning_rate"] is None else f"; learning rate of the next step {facts['learning_rate']:g}"
        yield "progress", f"{facts['step']} of {facts['max_steps']} steps; phase: {facts['phase'] or 'not known'}{rate}"
    for name, text in facts["weights"].items():
        used = facts.get("evaluation_folder", "").split("/")[0] == name
        yield "beside it", f"{name}/: {text}{', used for evaluation' if used else ''}"
    if average:
        yield "average", ", ".join(f"{name} {value}" for name, value in average.items())
    processes = facts["processes"] or "an unknown number of"
    yield "layout", f"{facts['layout']}, written by {processes} process{'' if processes == 1 else 'es'}"
    yield from ((use, facts[use]) for use in ("resume", "extend", "evaluate"))


def run_report(facts: Facts) -> list[str]:
    """Return the description of a run as text, by lines: its checkpoints, then the newest complete one."""
    path, checkpoints = facts["path"], facts["checkpoints"]
    corrupted = f"; corrupted: {', '.join(facts['damaged'])}" if facts["damaged"] else ""
    rows = [["checkpoint", "step", "phase", "state"]]
    for name, one in checkpoints.items():
        if not one["files"]:
            rows.append([name, "-", "-", "holds no checkpoint: the folder is empty"])
            continue
        state = "; ".join(f"{file} {problem}" for file, problem in one["problems"].items())
        state = f"corrupted: {state}" if state else "not resumable" if one["missing_state"] else "complete"
        rows.append([name, f"{one['step']} of {one.get('max_steps', '?')}", one["phase"] or "not known", state])
    lines = [f"{path}: a run with {len(checkpoints)} checkpoints{corrupted}", "", *(table(rows) if checkpoints else ())]
    lines += ["", *_row("model", "at the root: the evaluation weights" if facts["model"] else "none at the root")]
    calls = {
        "resume": "--resume_from_checkpoint true",
        "evaluate": f'load_evaluation_model("{path}")',
        "extend": f"{EXTEND} {shlex.quote(path)} --max_steps N",
    }
    for use, call in calls.items():
        lines += _row(use, f"{call} takes {facts[f'{use}s'] or 'nothing'}")
    if facts["leftovers"]:
        lines += _row("left over", f"{', '.join(facts['leftovers'])}: of an interrupted save; resuming recovers it")
    complete = next((one for one in checkpoints.values() if not one["problems"]), None)
    return lines + (["", *checkpoint_report(complete)] if complete else [])
