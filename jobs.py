"""
Several train.py at a time on one machine: their shares of it, and how they are asked to stop.
"""
import os
import subprocess
import sys
import time

import torch

from configurator import ROOT, UserError


def share(slot, jobs):
    """Environment of the slot-th of jobs processes at a time: its part of the threads that one
    alone would use, and a GPU of its own while there are enough."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(i) for i in range(torch.cuda.device_count())] or gpus
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)),
            "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}


def start(config, environment):
    """A process of train.py; what it prints is added to output.txt in its out_dir."""
    # Every setting is a flag: a config file that is edited meanwhile changes no run.
    words = [f"--{name}={value}" for name, value in config.items()]
    try:
        os.makedirs(config["out_dir"], exist_ok=True)
        with open(os.path.join(config["out_dir"], "output.txt"), "ab") as output:
            return subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *words],
                                    env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                                    stdout=output, stderr=output)
    except OSError as error:
        raise UserError(f"cannot start {config['out_dir']}: {error.strerror}") from None


def train_all(configs, jobs, stop):
    """
    Train with each of configs, a dict of dicts of all settings, jobs at a time; yields (key, exit
    code) as they end. On a signal, which stop has then seen, and on an error, those that run are
    asked to save and leave, and waited for.
    """
    waiting, running = list(configs), {}   # keys; key and process by slot
    jobs = min(jobs, len(configs))         # fewer have a larger share each
    try:
        while (waiting or running) and not stop.name:
            for slot in range(jobs):
                if waiting and slot not in running:
                    key = waiting.pop(0)
                    running[slot] = key, start(configs[key], share(slot, jobs))
            time.sleep(0.1)
            for slot, (key, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    yield key, process.returncode
    finally:
        for _, process in running.values():
            process.terminate()   # SIGTERM: after Ctrl-C, a second SIGINT would interrupt at once
        for _, process in running.values():
            process.wait()
