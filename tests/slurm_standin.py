"""sbatch, srun and sacct of a cluster that is this machine: enough of SLURM for submitit's job arrays.

`install(folder)` makes the three commands there; put the folder first on PATH. Jobs run one after another, each task
in the folder that sbatch was called in, as SLURM has it; sacct tells PENDING, RUNNING, COMPLETED or FAILED.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def install(folder: Path) -> None:
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} {name} "$@"\n')
        command.chmod(0o755)


def sbatch(states: Path, script: Path) -> None:
    text = script.read_text()
    found = re.search(r"--array=0-(\d+)", text)
    tasks = [f"_{i}" for i in range(int(found[1]) + 1)] if found else [""]
    job = str(1 + len(list(states.glob("batch*.sh"))))
    kept = states / f"batch{job}.sh"
    kept.write_text(text)  # submitit removes its own
    for task in tasks:
        (states / f"{job}{task}").write_text("PENDING")
    arguments = [sys.executable, __file__, str(states), "work", job, str(kept), *tasks]
    log = (states / "log").open("w")
    subprocess.Popen(arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    print(f"Submitted batch job {job}")


def work(states: Path, job: str, script: str, tasks: list[str]) -> None:
    for number, task in enumerate(tasks):
        state = states / f"{job}{task}"
        state.write_text("RUNNING")
        environment = os.environ | {
            "SLURM_JOB_ID": f"{job}{task}",
            "SLURM_ARRAY_JOB_ID": job,
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_NTASKS": "1",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        }
        code = subprocess.run(["/bin/bash", script], env=environment, check=False).returncode
        state.write_text("COMPLETED" if code == 0 else "FAILED")


def srun(arguments: list[str]) -> None:
    begin = next(i for i, text in enumerate(arguments) if "python" in Path(text).name)
    ids = {
        "%A": os.environ["SLURM_ARRAY_JOB_ID"],
        "%a": os.environ["SLURM_ARRAY_TASK_ID"],
        "%j": os.environ["SLURM_JOB_ID"],
        "%t": "0",
    }
    command = arguments[begin:]
    for sign, value in ids.items():
        command = [text.replace(sign, value) for text in command]
    os.execvp(command[0], command)


def sacct(states: Path) -> None:
    print("JobID|State|NodeList")
    for state in sorted(states.glob("[0-9]*")):
        print(f"{state.name}|{state.read_text()}|here")


def main() -> None:
    states, name, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if name == "sbatch":
        sbatch(states, Path(arguments[-1]))
    elif name == "work":
        work(states, arguments[0], arguments[1], arguments[2:])
    elif name == "srun":
        srun(arguments)
    else:
        sacct(states)


if __name__ == "__main__":
    main()
