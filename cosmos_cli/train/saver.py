"""Save a run while it trains: copy a save to CPU memory, and write it in a thread.

A save is either complete or absent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_cli import console, files, hashes
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import lora, lora_files, weights
from cosmos_cli.model.ema import PowerEMA
from cosmos_cli.paths import MANIFEST_FILE, Run
from cosmos_cli.recipe import plan
from cosmos_cli.train import checkpoint, status
from cosmos_cli.train.staging import Staging

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# How often a rank looks for the files of others.
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Save:
    """Holds one save: copies in CPU memory or, if training waits, the live tensors.

    `models` holds the model files that this rank writes, by kind. `states` holds DeepSpeed's state
    by the path of its file. `best` is the best step when training arrived at this one.
    """

    step: int
    building: Path
    models: dict[str, dict[str, Tensor]]
    states: dict[Path, Any]
    best: int | None


class Saver:
    """Saves the steps of one run from a background thread.

    A rank reports its files by a file of its own in the unfinished folder, so that the threads need
    no collective. Rank 0 waits for all reports and gives the folder its name. Use it as a context:
    it ends when all is on disk, unless another rank is lost.

    DeepSpeed's own engines for this do not serve. Its decoupled engine starts a process that pulls
    each rank's state out of GPU memory, and holds the optimizer step back until that process has
    written it to disk; it knows no hash, no temporary name and no failed write, after which it
    returns from `save` in silence. Its fast engine writes while training waits, through a compiled
    module.
    """

    def __init__(
        self, engine: Any, ema: PowerEMA, run: Run, r: Recipe, about: dict[str, Any]
    ) -> None:
        self.engine, self.ema, self.run, self.r, self.about = engine, ema, run, r, about
        self.staging = Staging(engine.device)
        self.thread = ThreadPoolExecutor(1, "save")
        self.lost = threading.Event()
        self.saved = 0
        self.stalled = 0.0
        self._writing: Future[float] | None = None
        self._save: Save | None = None
        if r.saves == "background":
            self._reserve()

    def _reserve(self) -> None:
        """Take the CPU memory of a save on every rank, or on none."""
        began, ranks = time.monotonic(), dist.get_world_size()
        sizes = [int(plan.staged_bytes(self.r, ranks, rank)) for rank in range(ranks)]
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        reason, reasons = "", [""] * ranks
        try:
            self.staging.reserve(sizes[dist.get_rank()], here)
        except MemoryError as error:
            reason = str(error)
        dist.all_gather_object(reasons, reason)
        needed = console.size(sum(sizes))
        if reason := next(filter(None, reasons), ""):
            self.staging.release()
            console.warn(
                f"training waits while a save is written: its copy takes {needed} of CPU memory, "
                f"{reason}"
            )
            return
        seconds = console.duration(time.monotonic() - began)
        console.say(f"took {needed} of CPU memory for saves in the background in {seconds}")

    def save(self, step: int) -> None:
        """Copy the save of `step`, and let the thread write it; every rank must call this.

        It waits for the save before. Without the CPU memory for a copy it waits for this one, too.

        Raises:
            UserError: the disk is too full, or a write of the save before failed.
        """
        self.finish()
        began, best = time.monotonic(), None
        final = self.run.resume_state(step)
        building = final.with_name(f".{final.name}.tmp")
        if dist.get_rank() == 0:
            shutil.rmtree(building, ignore_errors=True)
            fix = "free some space, then `cosmos train RECIPE` resumes; the last save is intact"
            needed = plan.disk(self.r, step).save_bytes
            files.require_free(self.run.checkpoints, needed, f"the files of step {step}", fix)
            with files.disk_errors(self.run.checkpoints):
                best = status.best_step(self.run)
        dist.barrier()
        self.staging.clear()
        models = self._copy_models()
        states = self._copy_states(building)
        self._save = Save(step, building, models, states, best)
        self._writing = self.thread.submit(self._write, self._save, self.staging.start())
        self.stalled = time.monotonic() - began
        if self.staging.memory is None:
            self.finish()

    def wait_copied(self) -> None:
        """Wait until a save is copied; call it before each optimizer step."""
        self.stalled += self.staging.wait()

    def check(self) -> int:
        """Return the newest step that this process saved, 0 before the first save.

        Raises:
            UserError: a write failed.
        """
        if self._writing and self._writing.done():
            self.finish()
        return self.saved

    def finish(self) -> None:
        """Wait until this rank has written its part; on rank 0, until the save is complete.

        Raises:
            UserError: a write failed.
        """
        if self._writing is None or self._save is None:
            return
        began, save, writing = time.monotonic(), self._save, self._writing
        self._writing = self._save = None
        seconds = writing.result()
        self.stalled += time.monotonic() - began
        self.saved = save.step
        console.say(
            f"saved step {save.step} to {self.run.resume_state(save.step)}: training stood still "
            f"for {self.stalled:.1f} s, writing took {seconds:.1f} s"
        )

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        save = self._save
        try:
            if isinstance(error, UserError | torch.OutOfMemoryError | None):
                self.finish()
                # A launcher ends all ranks when the first one fails.
                while error and save and save.building.exists():
                    time.sleep(_POLL_SECONDS)
        finally:
            self.lost.set()
            self.thread.shutdown()

    # --- copying ----------------------------------------------------------------------------------

    def _copy_models(self) -> dict[str, dict[str, Tensor]]:
        """Gather the trained weights and their EMA, and copy them, on two ranks if possible."""
        module, rank, second = self.engine.module, dist.get_rank(), 1 % dist.get_world_size()
        models: dict[str, dict[str, Tensor]] = {"reg": {}, "ema": {}}
        for (name, parameter), average in zip(
            checkpoint.trained(module).items(), self.ema.shards, strict=True
        ):
            # By turns, so that the copies of both ranks overlap.
            for kind, part, writer in (
                ("reg", checkpoint.shard(parameter), 0),
                ("ema", average, second),
            ):
                full = checkpoint.gather(parameter, part, self.engine.device)
                if rank == writer:
                    models[kind][name] = self.staging.copy(full.detach())
        if not lora.attached(module):
            buffers = {name: buffer.cpu() for name, buffer in module.named_buffers()}
            models = {kind: {**buffers, **state} for kind, state in models.items() if state}
        return {kind: state for kind, state in models.items() if state}

    def _copy_states(self, building: Path) -> dict[Path, Any]:
        """Return a copy of what DeepSpeed would write, by path; its tensors are copied later."""
        states: dict[Path, Any] = {}

        def copy(state_dict: Any, path: str) -> None:
            file = Path(path)
            file.parent.mkdir(parents=True, exist_ok=True)
            states[file] = self.staging.later(state_dict)

        self.engine.checkpoint_engine.save = copy
        try:
            with weights.write_errors(building):
                # Frozen weights come from the base, not from the checkpoint.
                self.engine.save_checkpoint(
                    str(building),
                    tag=checkpoint.SHARDS,
                    save_latest=False,
                    exclude_frozen_parameters=True,
                )
                if dist.get_rank() == 0:
                    # DeepSpeed adds scripts that convert its state to a model file.
                    for script in building.glob("*.py"):
                        script.unlink()
        except UserError:
            self._discard(building)
            raise
        return states

    def _discard(self, building: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(building, ignore_errors=True)

    # --- writing, in the thread -------------------------------------------------------------------

    def _write(self, save: Save, start: Any) -> float:
        """Write this rank's files of a save; rank 0 completes it. Return the seconds it took."""
        began = time.monotonic()
        self.staging.fill(start)
        final = self.run.resume_state(save.step)
        report, own = save.building / f"rank_{dist.get_rank()}.json", list(save.states)
        try:
            with weights.write_errors(final):
                files.write_json(report, self._write_files(save))
                if dist.get_rank() == 0:
                    self._complete(save, final, self._wait_for_reports(save.building))
        except UserError as error:
            if dist.get_rank() and not save.building.exists():
                # Rank 0 has given this save up, and says why.
                raise dist.DistError("rank 0 has ended") from error
            for path in own:
                path.unlink(missing_ok=True)
            with contextlib.suppress(UserError):
                files.write_json(report, {"code": int(error.code), "error": str(error)})
            self._discard(save.building)
            raise
        if dist.get_rank() == 0:
            prune(self.run, self.r, save.best)
        return time.monotonic() - began

    def _write_files(self, save: Save) -> dict[str, dict[str, Any]]:
        """Write this rank's files, and return the size and the hashes of each, by name."""
        written = {}
        # Pop each one so that its memory is freed if it lies outside the staging memory.
        for kind in tuple(save.models):
            path = checkpoint.model_file(self.run, self.engine.module, save.step, kind)
            written[kind] = _save_model(self.engine.module, save.models.pop(kind), path)
        for path in tuple(save.states):
            name = str(path.relative_to(save.building))
            written[name] = weights.write_pt(save.states.pop(path), path)
        return {name: one._asdict() for name, one in written.items()}

    def _wait_for_reports(self, building: Path) -> dict[str, dict[str, Any]]:
        """Wait until all ranks have written their files, and return what they report."""
        paths = [building / f"rank_{rank}.json" for rank in range(dist.get_world_size())]
        while not all(path.exists() for path in paths):
            if self.lost.wait(_POLL_SECONDS):
                raise dist.DistError("another rank has ended")
        reports = list(map(files.read_json, paths))
        if failed := next((report for report in reports if "error" in report), None):
            raise UserError(failed["error"], code=ExitCode(failed["code"]))
        for path in paths:
            path.unlink()
        return dict(sorted(item for report in reports for item in report.items()))

    def _complete(self, save: Save, final: Path, written: dict[str, dict[str, Any]]) -> None:
        """Write the manifest, and give the folder its name."""
        ema = written.pop("ema")
        written.pop("reg")
        manifest = {
            "step": save.step,
            "world_size": dist.get_world_size(),
            "ema_sha256": ema["sha256"],
            **self.about,
            "files": {
                name: {"bytes": one["bytes"], "sha256": one["sha256"]}
                for name, one in written.items()
            },
            "pieces": {
                "bytes": hashes.PIECE,
                "ema": ema["pieces"],
                "files": {name: one["pieces"] for name, one in written.items()},
            },
        }
        files.write_json(save.building / MANIFEST_FILE, manifest)
        files.sync(save.building / checkpoint.SHARDS)
        shutil.rmtree(final, ignore_errors=True)
        save.building.rename(final)
        files.sync(self.run.checkpoints)


def prune(run: Run, r: Recipe, best: int | None) -> None:
    """Delete the resume states and model files that the recipe does not keep.

    Call it after a complete save. A resume reads the model file of the EMA, so those of the resume
    states stay, and those of the step `best`.
    """
    with files.disk_errors(run.checkpoints):
        for step in run.resumable_steps()[: -r.keep_last]:
            if r.keep_every_steps and step % r.keep_every_steps == 0:
                continue
            old = run.resume_state(step)
            # Rename it first: a partly deleted folder must not pass for a complete state.
            condemned = old.with_name(f".{old.name}.tmp")
            old.rename(condemned)
            shutil.rmtree(condemned)
        written = run.weight_files()
        kept = {*[*written][-r.keep_models :], *run.resumable_steps(), best}
        for step in written.keys() - kept if r.keep_models else ():
            for path in written[step]:
                path.unlink()


def _save_model(module: nn.Module, state: dict[str, Tensor], path: Path) -> weights.Written:
    """Write the trained weights, and return the size and hashes of their file."""
    if not lora.attached(module):
        return weights.save_released(path, state)
    lora_files.save_lora(path, state, lora.scale(module))
    digests = [hashes.sha256_piece(path, i) for i in range(hashes.piece_count(path))]
    return weights.Written(
        path.stat().st_size, hashes.sha256_file(path), hashes.sha256_pieces(digests)
    )
