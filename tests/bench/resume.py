"""SIGKILL at random moments, resumed, compared bit for bit with a run that nobody killed.

Each trial is a run of `fit` in a process of its own, killed once: half of them at a random moment
of the run, half at a random moment inside a save (the child says when a save begins). Then a
second process resumes it. Compared: every loss, every epoch record, the SHA-256 of the final
weights. The trials go through plans that differ (accumulation, workers, schedules, bf16, early
stopping). The children are forks of a clean server that has done nothing but import. Last line:
{"killed": K, "identical": n}.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
os.environ["PYTHONPATH"] = str(TESTS)  # for the server
os.environ.setdefault("OMP_NUM_THREADS", "1")

BASE = dict(epochs=5, batch_size=8, checkpoint_steps=2, lr=0.01)
PLANS = [
    {},
    dict(accumulate=2),
    dict(schedule="onecycle", checkpoint_steps=1),
    dict(workers=2),
    dict(accumulate=3, schedule="plateau", plateau_patience=1, lr=0.3),
    dict(precision="bf16", patience=2),
    dict(optimiser="sgd", schedule="cosine", checkpoint_steps=3),
]


def child(folder, plan, out, slow, saving):
    """A run; with `saving`, a file that is touched when a save begins, and saves slowed so that a
    kill can fall inside.
    """
    import tiny

    multiprocessing.set_start_method("fork", force=True)  # of its workers
    # workers whose parent was killed complain
    if not out:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if saving:
        import mmemo.training.checkpoint as module

        write = module.write_through

        def slowly(path, data):
            Path(saving).touch()
            time.sleep(0.004)
            line = write(path, data)
            time.sleep(0.004)
            return line

        module.write_through = slowly
    tiny.run(folder, plan, out, slow)


def main(kills: int, seed: int) -> dict:
    context, chance, identical, inside = (
        multiprocessing.get_context("forkserver"),
        random.Random(seed),
        0,
        0,
    )
    context.set_forkserver_preload(["tiny", "accelerate", "torch._dynamo"])

    def start(folder, plan, out=None, slow=0.0, saving=None):
        process = context.Process(
            target=child,
            args=(str(folder), dict(plan), out and str(out), slow, saving and str(saving)),
        )
        process.start()
        return process

    def finish(folder, plan):
        process = start(folder, plan, folder.with_suffix(".json"))
        process.join()
        assert process.exitcode == 0, f"{folder} ended with {process.exitcode}"
        return json.loads(folder.with_suffix(".json").read_text())

    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as place:
        place = Path(place)
        wholes = [finish(place / f"whole-{i}", BASE | plan) for i, plan in enumerate(PLANS)]
        killed = 0
        while killed < kills:
            which, in_save, folder = (
                killed % len(PLANS),
                killed % 2 == 1,
                place / f"trial-{killed}-{time.monotonic_ns()}",
            )
            plan, mark = BASE | PLANS[which], folder.with_suffix(".saving")
            process, log = (
                start(folder, plan, slow=0.01, saving=mark if in_save else None),
                folder / "log.jsonl",
            )
            lines = chance.randint(2, len(wholes[which]["losses"]) * 9 // 10)
            while process.is_alive() and not (
                log.exists() and log.read_bytes().count(b"\n") >= lines
            ):
                time.sleep(0.001)
            if in_save:
                mark.unlink(missing_ok=True)
                while process.is_alive() and not mark.exists():
                    time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.03))
            process.kill()
            process.join()
            # it was over already: no kill, another try
            if process.exitcode != -9:
                continue
            killed += 1
            torn = len(list((folder / "checkpoints").glob(".step-*"))) > 0
            inside += torn
            same = finish(folder, plan) == wholes[which]
            identical += same
            shutil.rmtree(folder)
            print(
                f"kill {killed:2d} at line {lines:2d} of the log,"
                f" {'inside a save' if torn else 'between saves'},"
                f" {'identical' if same else 'DIFFERENT'}: {PLANS[which]}",
                flush=True,
            )
    print(f"{inside} of {killed} kills fell inside a save")
    return {"killed": killed, "identical": identical}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(main(args.kills, args.seed)))
